"""Run the test suite on every Python from 3.9 on that this machine has, two at a time.

Looks on PATH and among pyenv's versions. Each Python gets a virtual environment in .venvs/, and its output goes to a
log file there. The arguments are pytest's. The exit status is 1 if the tests failed anywhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"

# Two Pythons at a time: one's installation mostly waits while the other's tests run.
AT_A_TIME = 2

# Prints the version, as in "3.13", or "3.13t" for a free-threaded build, where the tests can run.
PROBE = """
import sys, sysconfig
if sys.version_info >= (3, 9) and sys.implementation.name == "cpython":
    import ensurepip, venv
    print("%d.%d" % sys.version_info[:2] + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""))
"""


def candidates() -> Iterator[Path]:
    """Yield what may be a Python: pyenv's own first, as the stand-ins that it puts on PATH run one version only."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob("versions/*/bin/python3"))
    for folder in os.get_exec_path():
        yield from sorted(
            path for path in Path(folder).glob("python3*") if re.fullmatch(r"python3(\.\d+t?)?", path.name)
        )
    yield Path(sys.executable)


def pythons() -> dict[str, Path]:
    """Return one interpreter for each version, oldest first."""
    found: dict[str, Path] = {}
    for path in candidates():
        try:
            probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=30, check=False)
        except OSError:
            continue
        version = probe.stdout.strip()
        if probe.returncode == 0 and version:
            found.setdefault(version, path)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1].rstrip("t"))))


def test(version: str, interpreter: Path) -> bool:
    """Run the tests on one Python, print a line about it, and return whether they passed."""
    started = time.monotonic()
    venv = VENVS / version
    python = venv / "bin" / "python"
    steps: list[list[str | Path]] = [
        [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1"],
        [python, "-m", "pip", "install", "--quiet", "--editable", ".", "--group", "test"],
        [python, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]],
    ]
    if not python.exists():
        steps.insert(0, [interpreter, "-m", "venv", venv])
    log = VENVS / f"{version}.log"
    with log.open("w") as output:
        passed = all(
            subprocess.run(step, cwd=ROOT, stdout=output, stderr=output, check=False).returncode == 0 for step in steps
        )
    lines = log.read_text(errors="replace").splitlines() or ["no output"]
    report = f"Python {version}: {lines[-1].strip('= ')} ({time.monotonic() - started:.0f} s in all)"
    print(report if passed else "\n".join([*lines[-60:], f"{report} FAILED, see {log.relative_to(ROOT)}"]), flush=True)
    return passed


def main() -> int:
    """Test on every Python that is there."""
    found = pythons()
    VENVS.mkdir(exist_ok=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        passed = list(pool.map(test, found.keys(), found.values()))
    print(f"{sum(passed)} of {len(found)} Pythons passed: {', '.join(found)}")
    return 0 if found and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
