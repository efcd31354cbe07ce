"""The exceptions: their kinds, their attributes, and that they survive pickle and copy."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from zamp_sdk import ActionFailedError, ActionTimeoutError, HttpClientError, MissingConfigError, ZampError
from zamp_sdk.action_executor.utils import HttpClientError as DocumentedHttpClientError

ERRORS: list[tuple[ZampError, type[Exception], dict[str, Any]]] = [
    (
        HttpClientError(
            "m", status_code=503, response_body="b", headers={"a": "b"}, action_id="act-1", may_have_started=True
        ),
        Exception,
        {
            "status_code": 503,
            "response_body": "b",
            "headers": {"a": "b"},
            "action_id": "act-1",
            "may_have_started": True,
        },
    ),
    (
        ActionFailedError("m", action_id="act-1", status="FAILED", error={"code": 7}),
        RuntimeError,
        {"action_id": "act-1", "status": "FAILED", "error": {"code": 7}},
    ),
    (
        ActionTimeoutError("m", action_id="act-1", status="RUNNING", waited=1.5),
        TimeoutError,
        {"action_id": "act-1", "status": "RUNNING", "waited": 1.5},
    ),
    (MissingConfigError("m"), KeyError, {}),
]


@pytest.mark.parametrize(("error", "kind", "attributes"), ERRORS)
def test_errors_survive(error: ZampError, kind: type[Exception], attributes: dict[str, Any]) -> None:
    """Every error is a ZampError and of its standard kind, and a pickled or copied one has the same attributes."""
    assert isinstance(error, (ZampError, kind))
    assert isinstance(error, kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == "m"
        assert twin.message == "m"
        assert {name: getattr(twin, name) for name in attributes} == attributes


def test_documented_path() -> None:
    """HttpClientError is found where the official SDK documents it."""
    assert DocumentedHttpClientError is HttpClientError


def test_positional_arguments() -> None:
    """An HttpClientError takes status and body by position, as the official SDK's does."""
    error = HttpClientError("m", 503, "body")
    assert (str(error), error.status_code, error.response_body) == ("m", 503, "body")
