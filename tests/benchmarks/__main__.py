"""Measure this SDK beside the newest official one: `python -m tests.benchmarks [PART...]`, or `make bench`.

A whole run writes tests/benchmarks/README.md, the chart beside it, and the sentence of figures in the project's README.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import time
from pathlib import Path

from tests import official_sdk

from .laboratory import ROOT, Laboratory
from .parts import PARTS, RATIOS, ROUNDS, expect_ratios
from .report import Part, block, replace_block, summary, table

HERE = Path(__file__).parent
OURS, THEIRS = "ours", "official"

INTRODUCTION = """# Measured beside the official SDK

`make bench` wrote this file. It runs both SDKs on the same Python and against the same server on loopback, in turn, in
fresh processes, and takes the medians of the rounds; the ratio is the median of the ratios pair by pair. Everything
here is better when it is lower. *50 ms round trip* means that the server delays every byte by 25 ms each way."""


def main() -> None:
    """Run the parts, print their tables, and after a whole run write them down."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each measurement (%(default)s)")
    parser.add_argument("--python", type=Path, help="runs both (default: the newest that can)")
    parser.add_argument("--write", action="store_true", help="write the files although there are fewer rounds")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    try:
        official = official_sdk.find(options.python and [options.python])
    except LookupError as exc:
        parser.error(str(exc))

    started = time.monotonic()
    found: dict[str, Part] = {}
    with Laboratory(official.python, {OURS: ROOT, THEIRS: official.requirement}, options.rounds) as laboratory:
        headers = ("zamp-sdk (this)", f"official {official.version}")
        about = (
            f"Measured on {dt.date.today()} with Python {laboratory.python_version} on {platform.system()} "
            f"{platform.machine()}, beside the official zamp-sdk {official.version}, the newest on the index that day; "
            f"{options.rounds} rounds."
        )
        print(about, flush=True)
        for name in options.parts or PARTS:
            part = found[name] = PARTS[name](laboratory)
            expect_ratios(part)
            laboratory.progress("")
            print(f"\n{part.as_text(*headers)}", flush=True)

    targets = [target for part in found.values() for target in part.targets]
    reached = f"{sum(target.reached for target in targets)} of {len(targets)} targets reached"
    print(f"\n{reached}, in {time.monotonic() - started:.0f} s.")
    if set(found) != set(PARTS):
        return
    rows = {row.name: row for part in found.values() if part.other is None for row in part.rows}
    missing = RATIOS.keys() - rows.keys()
    if missing:
        raise LookupError(f"targets for rows that nothing measured: {', '.join(missing)}")
    shown = f"{summary(rows)}\n\n{about}"
    print(f"\n{shown}")
    if options.rounds < ROUNDS and not options.write:
        return
    lost = [row for row in rows.values() if row.ratio is not None and row.ratio > 1]
    text = "\n\n".join(
        [
            INTRODUCTION,
            block(shown),
            "![How late each SDK tells of an action, by how long the action takes](time-to-result.svg)",
            "## Where the official SDK is better",
            table(lost, *headers),
            *(part.as_text(*headers) for part in found.values()),
        ]
    )
    (HERE / "README.md").write_text(text + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), shown), encoding="utf-8")
    from .chart import draw

    draw(found["time-to-result"].series, dict(zip(laboratory.sides, headers)), HERE / "time-to-result.svg")
    print("\nWritten: tests/benchmarks/README.md, its chart, and the sentence in README.md.")


if __name__ == "__main__":
    main()
