"""Virtual environments with real packages in them, made once and kept in .venvs/, for the tests beside this file.

Making one needs the package index; using it later does not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.peers.conftest import absent

ROOT = Path(__file__).resolve().parent.parent.parent


def venv(name: str, *requirements: str, interpreter: Path | None = None) -> Path:
    """Return the Python of an environment that has these packages; it is made anew when they change.

    The environment is of this Python, or of another ``interpreter``.
    """
    folder = ROOT / ".venvs" / f"{name}-{sys.version_info[0]}.{sys.version_info[1]}"
    python = folder / "bin" / "python"
    installed = folder / "installed.txt"
    wanted = "\n".join((sys.version, str(interpreter), *requirements))
    if not installed.exists() or installed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _run(interpreter or sys.executable, "-m", "venv", "--clear", folder)
            _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
        except subprocess.CalledProcessError as exc:
            absent(f"cannot install {', '.join(requirements)}: {exc.stderr.strip()[-500:]}")
        installed.write_text(wanted)
    return python


def install_project(python: Path) -> None:
    """Install the project as it is now, from a wheel, replacing what an earlier run has installed."""
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        _run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall", wheel)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
