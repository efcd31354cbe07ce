"""Compare two states of this project in pairs, in one run: `python -m tests.benchmarks.versus BEFORE [AFTER]`.

Each is a folder with a checkout, or a git revision of this one; the ratios are AFTER to BEFORE, so less is better.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .laboratory import ROOT, Laboratory
from .parts import at_once, cold_start, cpu_per_request
from .report import table

PARTS = {"cpu": cpu_per_request, "at-once": at_once, "start": cold_start}


def checkout(name: str, into: Path) -> Path:
    """Return the folder of this name, or one with the files of this git revision."""
    if Path(name).is_dir():
        return Path(name).resolve()
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        # Git wrote it, from this repository. Only newer versions of Python have the parameter `filter`.
        files.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]  # mypy takes the literal for every parameter
    return into


def main() -> None:
    """Run the parts on both, and print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.versus", description=__doc__)
    parser.add_argument("before", metavar="BEFORE", help="a folder or a git revision")
    parser.add_argument("after", metavar="AFTER", nargs="?", default=str(ROOT), help="the same (default: this one)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of each measurement (%(default)s)")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="what runs both (default: this one)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        sources = {
            "after": checkout(options.after, Path(after)),
            "before": checkout(options.before, Path(before)),
        }
        with Laboratory(options.python, sources, options.rounds) as laboratory:
            print(
                f"{options.after} beside {options.before}, medians of {options.rounds} pairs, "
                f"Python {laboratory.python_version}"
            )
            for name in options.part or PARTS:
                part = PARTS[name](laboratory)
                laboratory.progress("")
                print(f"\n{part.title}\n\n{table(part.rows, 'after', 'before')}", flush=True)


if __name__ == "__main__":
    main()
