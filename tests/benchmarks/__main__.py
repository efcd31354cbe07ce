"""Measure this SDK beside the newest official one: `python -m tests.benchmarks [PART...]`, or `make bench`.

A whole run is on two Pythons; it writes tests/benchmarks/README.md, the chart beside it, and the figures of the newest
Python into the project's README.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import official_sdk
from tests.pythons import pythons

from .laboratory import ROOT, Laboratory
from .parts import PARTS, RATIOS, ROUNDS, expect_ratios
from .report import Part, Row, block, replace_block, summary, table

HERE = Path(__file__).parent
OURS, THEIRS = "ours", "official"

INTRODUCTION = """# Measured beside the official SDK

`make bench` wrote this file. It runs both SDKs on the same Python and against the same server on loopback, in turn, in
fresh processes, and takes the medians of the rounds; the ratio is the median of the ratios pair by pair. Everything
here is better when it is lower. *50 ms round trip* means that the server delays every byte by 25 ms each way."""


class Measured(NamedTuple):
    """What was found on one Python."""

    python_version: str
    headers: tuple[str, str]
    about: str
    parts: dict[str, Part]

    @property
    def rows(self) -> dict[str, Row]:
        """All rows that compare with the official SDK, by name."""
        return {row.name: row for part in self.parts.values() if part.other is None for row in part.rows}


def measure(official: official_sdk.Official, names: Iterable[str], rounds: int) -> Measured:
    """Run the parts on one Python, and print their tables."""
    found: dict[str, Part] = {}
    with Laboratory(official.python, {OURS: ROOT, THEIRS: official.requirement}, rounds) as laboratory:
        headers = ("zamp-sdk (this)", f"official {official.version}")
        about = (
            f"Measured on {dt.date.today()} with Python {laboratory.python_version} on {platform.system()} "
            f"{platform.machine()}, beside the official zamp-sdk {official.version}, the newest on the index that day; "
            f"{rounds} rounds."
        )
        print(about, flush=True)
        for name in names:
            part = found[name] = PARTS[name](laboratory)
            expect_ratios(part)
            laboratory.progress("")
            print(f"\n{part.as_text(*headers)}", flush=True)
        return Measured(laboratory.python_version, headers, about, found)


def write(runs: Sequence[Measured]) -> None:
    """Write the report, which tells the first run in full, the chart, and the last run's sentence into README."""
    shown = [f"{summary(run.rows)}\n\n{run.about}" for run in runs]
    print("", *shown, sep="\n\n")
    first = runs[0]
    lost = [row for row in first.rows.values() if row.ratio is not None and row.ratio > 1]
    text = "\n\n".join(
        [
            INTRODUCTION,
            block("\n\n".join(shown)),
            "![How late each SDK tells of an action, by how long the action takes](time-to-result.svg)",
            f"## Where the official SDK is better, on Python {first.python_version}",
            table(lost, *first.headers),
            *(part.as_text(*first.headers) for part in first.parts.values()),
            *(
                f"## The same on Python {run.python_version}\n\n{table(list(run.rows.values()), *run.headers)}"
                for run in runs[1:]
            ),
        ]
    )
    (HERE / "README.md").write_text(text + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), shown[-1]), encoding="utf-8")
    from .chart import draw

    names = dict(zip((OURS, THEIRS), first.headers))
    draw(first.parts["time-to-result"].series, names, HERE / "time-to-result.svg")
    print("\nWritten: tests/benchmarks/README.md, its chart, and the sentence in README.md.")


def main() -> None:
    """Run the parts, print their tables, and after a whole run write them down."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each measurement (%(default)s)")
    parser.add_argument(
        "--python",
        type=Path,
        action="append",
        help="runs both; may be repeated (default: 3.13, and the newest that can)",
    )
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    try:
        usual = [path for version, path in pythons().items() if version == "3.13"]
        chosen = options.python or [*usual, official_sdk.find().python]
        officials = [official_sdk.find([python]) for python in dict.fromkeys(chosen)]
    except LookupError as exc:
        parser.error(str(exc))

    started = time.monotonic()
    runs = [measure(official, options.parts or PARTS, options.rounds) for official in officials]
    targets = [target for run in runs for part in run.parts.values() for target in part.targets]
    reached = f"{sum(target.reached for target in targets)} of {len(targets)} targets reached"
    print(f"\n{reached}, in {time.monotonic() - started:.0f} s.")
    for run in runs:
        missing = RATIOS.keys() - run.rows.keys()
        if missing and not options.parts:
            raise LookupError(f"targets for rows that nothing measured: {', '.join(missing)}")
    if not options.parts and not options.python:
        write(runs)


if __name__ == "__main__":
    main()
