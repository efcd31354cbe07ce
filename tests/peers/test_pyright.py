"""What pyright, the type checker of many editors, says of the package and its public calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.conftest import absent
from tests.peers.venvs import ROOT, install_project, venv

CASES = ROOT / "tests" / "data" / "typing_cases.py"


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the package, pyright and the Node.js that it needs."""
    python = venv("pyright", "pyright[nodejs]", "typing-extensions", "pydantic>=2.12")
    install_project(python)
    return python


def pyright(python: Path, *arguments: str | Path, cwd: Path) -> Any:
    """Run pyright and return its report."""
    done = subprocess.run(
        [python, "-m", "pyright", "--outputjson", *arguments],
        cwd=cwd,
        # Where it looks for the package; --verifytypes takes no notice of --pythonpath.
        env={**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout)
    except ValueError:
        absent(f"pyright cannot be run: {(done.stdout + done.stderr).strip()[-500:]}")


def test_public_types_are_complete(python: Path, tmp_path: Path) -> None:
    """Everything public has a type that is known, including that of the local platform: 100 % by `--verifytypes`."""
    report = pyright(python, "--verifytypes", "zamp_sdk", cwd=tmp_path)

    completeness = report["typeCompleteness"]
    incomplete = [symbol["name"] for symbol in completeness["symbols"] if is_incomplete(symbol)]
    assert incomplete == [], "\n".join(incomplete)
    assert completeness["exportedSymbolCounts"]["withKnownType"] > 50, report["generalDiagnostics"]
    assert completeness["completenessScore"] == 1


def is_incomplete(symbol: dict[str, Any]) -> bool:
    """Whether a public symbol's type is unknown, or other checkers may infer another one."""
    return bool(symbol["isExported"]) and not (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"])


def test_inferred_types(python: Path, tmp_path: Path) -> None:
    """Pyright infers every type as the cases say, and refuses every line that they mark as wrong."""
    shutil.copy(CASES, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error"})
    )

    report = pyright(python, CASES.name, cwd=tmp_path)

    assert [
        f"{found['range']['start']['line'] + 1}: {found['message']}" for found in report["generalDiagnostics"]
    ] == []
    assert report["summary"]["filesAnalyzed"] == 1
