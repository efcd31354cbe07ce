"""Run the test suite on every Python from 3.9 on that this machine has, free-threaded ones too.

Looks on PATH and among pyenv's versions. Each Python gets a virtual environment in .venvs/, and its output goes to a
log file there. With --ends it tests only the oldest and the newest: what differs between two Pythons differs between
these first. Other arguments are pytest's. The exit status is 1 if the tests failed anywhere.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds only what is beside it

from tests.pythons import pythons  # noqa: E402  # the path comes first

VENVS = ROOT / ".venvs"


def test(version: str, interpreter: Path, arguments: list[str]) -> bool:
    """Run the tests on one Python, print a line about it, and return whether they passed."""
    started = time.monotonic()
    venv = VENVS / version
    python = venv / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet")
    log = VENVS / f"{version}.log"
    with log.open("w") as output:

        def run(*command: str | Path) -> bool:
            return subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode == 0

        is_ready = (
            (python.exists() or run(interpreter, "-m", "venv", venv))
            and run(*install, "--upgrade", "pip>=25.1")
            # An older pydantic may have a wheel where the newest one would have to be compiled.
            and run(*install, "--only-binary", "pydantic-core", "--editable", ".", "--group", "test")
        )
        # Where there is no wheel of these, the tests that need them are skipped.
        run(*install, "--only-binary", ":all:", "--group", "loops")
        pytest = (python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "4", "--dist", "worksteal")
        passed = is_ready and run(*pytest, *arguments)
    lines = log.read_text(errors="replace").splitlines() or ["no output"]
    report = f"Python {version}: {lines[-1].strip('= ')} ({time.monotonic() - started:.0f} s in all)"
    print(report if passed else "\n".join([*lines[-60:], f"{report} FAILED, see {log.relative_to(ROOT)}"]), flush=True)
    return passed


def main() -> int:
    """Test on every Python that is there, or on those at the ends."""
    found = pythons()
    arguments = sys.argv[1:]
    if "--ends" in arguments:
        arguments.remove("--ends")
        versions = list(found)
        found = {version: found[version] for version in versions[:1] + versions[-1:]}
    VENVS.mkdir(exist_ok=True)
    passed = [test(version, interpreter, arguments) for version, interpreter in found.items()]
    print(f"{sum(passed)} of {len(found)} Pythons passed: {', '.join(found)}")
    return 0 if found and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
