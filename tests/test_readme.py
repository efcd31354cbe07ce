"""Every Python example in the README runs, against the local platform."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from zamp_sdk.local_platform import LocalPlatform

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def run(example: str) -> dict[str, Any]:
    """Run an example as a program, and return what it defines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(example, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs, and its Lambda handlers answer."""
    platform = LocalPlatform()
    platform.action("send_invoice")(lambda params: params)

    @platform.action
    def charge_card(params: Any) -> Any:
        raise ValueError("expired")

    with platform:
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        names = run(example)
        event = {"invoice_id": "inv_123"}
        if "handler" in names:
            assert names["handler"](event, None) == event
        if "start_handler" in names:
            assert names["collect_handler"](names["start_handler"](event, None), None) == {"result": event}


def test_there_are_examples() -> None:
    """The README has examples, and its first screen the two commands."""
    assert len(EXAMPLES) >= 8
    first_screen = "\n".join(README.splitlines()[:30])
    assert "python3 -m zamp_sdk demo" in first_screen
    assert "make test" in first_screen
