"""The official SDK's newest version on the package index, and a Python on this machine that it supports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.pythons import pythons

NAME = "zamp-sdk"  # on the index; this project has the same name


class Official(NamedTuple):
    """A version of the official SDK, and the interpreter that runs it."""

    version: str
    python: Path

    @property
    def requirement(self) -> str:
        """What to give to pip."""
        return f"{NAME}=={self.version}"


def find(interpreters: list[Path] | None = None) -> Official:
    """Ask the index for the newest version, as the newest Python here that any version supports sees it.

    Args:
        interpreters: Only these, the preferred one first; the default is all of this machine, the newest first.

    Raises:
        LookupError: No Python here is supported, or the index cannot be reached; the message says what to do.
    """
    # A free-threaded build is left out: the official SDK's dependencies have few wheels for it.
    preferred = [path for version, path in reversed(pythons().items()) if not version.endswith("t")]
    said = ""
    for python in preferred if interpreters is None else interpreters:
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "index", "versions", NAME],
            capture_output=True,
            text=True,
            check=False,
        )
        newest = re.match(rf"{NAME} \((\S+)\)", asked.stdout)
        if newest:
            return Official(newest[1], python)
        said = asked.stderr.strip().rpartition("\n")[2]
    raise LookupError(
        f"no Python on this machine that the official {NAME} supports: it needs 3.12 or later, on PATH or among "
        f"pyenv's versions, and the package index within reach (pip says: {said})"
    )
