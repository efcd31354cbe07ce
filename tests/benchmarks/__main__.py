"""Measure this SDK beside the official one: `python -m tests.benchmarks [PART...]`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .laboratory import CACHE, OFFICIAL, Laboratory
from .parts import PARTS


def main() -> None:
    """Run the parts, print their tables, and write the figures and the chart."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--json", type=Path, default=CACHE / "figures.json", help="where the figures go (%(default)s)")
    parser.add_argument(
        "--chart", type=Path, default=CACHE / "time-to-result.svg", help="where the chart goes (%(default)s)"
    )
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if sys.version_info < (3, 11):
        parser.error("the official SDK cannot be imported before Python 3.11, so there is nothing to compare with")

    started = time.monotonic()
    about = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, against {OFFICIAL}"
    print(about)
    found = {}
    with Laboratory() as laboratory:
        for name in options.parts or PARTS:
            part = PARTS[name](laboratory)
            found[name] = part
            laboratory.progress("")
            print(part.as_text(), flush=True)
            if part.series:
                from .chart import draw

                draw(part.series, options.chart)
    options.json.write_text(
        json.dumps(
            {
                "about": about,
                "parts": {
                    name: {**asdict(part), "reached": [target.reached for target in part.targets]}
                    for name, part in found.items()
                },
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    targets = [target for part in found.values() for target in part.targets]
    reached = sum(target.reached for target in targets)
    print(
        f"\n{reached} of {len(targets)} targets reached, in {time.monotonic() - started:.0f} s. Figures: {options.json}"
    )


if __name__ == "__main__":
    main()
