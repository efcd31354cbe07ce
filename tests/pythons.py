"""The Pythons that this machine has: on PATH, and among pyenv's versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """Return one interpreter for each version from 3.9 on, oldest first."""
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


def older_python(version: str) -> Path | None:
    """Return an interpreter of a version that is too old for the package, as in "3.8", if there is one."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which(f"python{version}")
    for path in [*pyenv.glob(f"versions/{version}.*/bin/python"), *([Path(on_path)] if on_path else [])]:
        asked = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=30, check=False)
        # Python 2 writes its version to stderr. What pyenv puts on PATH runs only the versions that it was told to.
        if asked.returncode == 0 and f"{asked.stdout}{asked.stderr}".startswith(f"Python {version}."):
            return path
    return None
