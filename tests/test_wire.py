"""The wire format: params to JSON and back, durations, replies; checked against recordings in tests/data."""

from __future__ import annotations

import enum
import json
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pydantic
import pytest

from zamp_sdk import RetryPolicy
from zamp_sdk.action_executor import wire

DATA = Path(__file__).parent / "data"
EXCHANGES = json.loads((DATA / "exchanges.json").read_text(encoding="utf-8"))["exchanges"]
DURATIONS = json.loads((DATA / "durations.json").read_text(encoding="utf-8"))["rows"]


def start(action_name: Any = "a", params: Any = None, **more: Any) -> wire.Request:
    """Build a start of which the test names what it is about."""
    arguments = {"summary": None, "retry_policy": None, "start_to_close_timeout": None, "idempotency_key": "k"}
    return wire.start_request(action_name, params, **{**arguments, **more})


def recorded_policy(*, initial_interval_seconds: float, maximum_interval_seconds: float, **others: Any) -> RetryPolicy:
    """Build a recorded policy unchecked: its maximum interval is under its initial one, which we no longer accept."""
    policy = object.__new__(RetryPolicy)
    initial, maximum = timedelta(seconds=initial_interval_seconds), timedelta(seconds=maximum_interval_seconds)
    vars(policy).update(initial_interval=initial, maximum_interval=maximum, **others)
    return policy


def sent(params: Any) -> Any:
    """Read back the params that a start would send."""
    body = start(params=params).body
    assert body is not None
    return json.loads(body)["params"]


def recorded_calls() -> list[Any]:
    """Take the calls from the recordings."""
    calls = [exchange for exchange in EXCHANGES if "call" in exchange]
    assert calls, "tests/data/exchanges.json holds no call"
    return calls


@pytest.mark.parametrize("exchange", recorded_calls())
def test_recorded_call(exchange: Any) -> None:
    """A call becomes the request that was recorded."""
    call, recorded = exchange["call"], exchange["request"]
    policy, limit = call.get("action_retry_policy"), call.get("action_start_to_close_timeout_seconds")
    request = start(
        call["action_name"],
        call["params"],
        summary=call.get("summary"),
        retry_policy=policy and recorded_policy(**policy),
        start_to_close_timeout=limit and timedelta(seconds=limit),
    )
    assert (request.method, request.path) == (recorded["method"], recorded["path"])
    assert request.headers == {"Content-Type": "application/json", "Idempotency-Key": "k"}
    assert request.body is not None
    assert json.loads(request.body) == recorded["body"]
    assert wire.parse_action(json.dumps(exchange["reply"]["body"]).encode()).id == exchange["reply"]["body"]["id"]


def recorded_polls() -> list[Any]:
    """Take the replies to polls from the recordings."""
    polls = [reply for exchange in EXCHANGES for reply in exchange.get("replies", [])]
    assert polls, "tests/data/exchanges.json holds no poll"
    return polls


@pytest.mark.parametrize("reply", recorded_polls(), ids=lambda reply: reply["means"])
def test_recorded_poll(reply: Any) -> None:
    """A recorded reply means what was noted beside it."""
    means = reply["means"]
    parsed = wire.parse_action(json.dumps(reply["body"]).encode())
    if means.startswith("HttpClientError"):
        assert parsed.status is None
        assert wire.reason(parsed.error) == "quota exceeded"
        return
    assert parsed.id == "act-1"
    inner = reply["body"].get("data") or reply["body"]
    assert (parsed.status, parsed.result) == (inner["status"], inner.get("result"))
    if "boom" in means:
        assert wire.reason(parsed.error) == "boom"


@pytest.mark.parametrize("row", DURATIONS, ids=lambda row: row["iso8601"])
def test_recorded_duration(row: Any) -> None:
    """A duration is written as pydantic writes it."""
    assert wire.iso8601_duration(timedelta(microseconds=row["microseconds"])) == row["iso8601"]


@pytest.mark.parametrize(
    "duration",
    [
        *(sign * timedelta(microseconds=7**power) for power in range(22) for sign in (1, -1)),
        timedelta(days=365),
        timedelta(days=400, seconds=1),
        timedelta(days=999_999_999),
    ],
)
def test_pydantic_reads_the_same_duration(duration: timedelta) -> None:
    """What real pydantic reads back equals the timedelta, negative and years long ones included."""
    text = wire.iso8601_duration(duration)
    assert pydantic.TypeAdapter(timedelta).validate_json(json.dumps(text)) == duration


@dataclass
class Line:
    due: Any
    price: Decimal = Decimal("9.90")


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: int


class Model(pydantic.BaseModel):
    when: datetime
    blob: bytes = b"x"


class Dumps:
    def model_dump(self) -> Any:
        return {"day": date(2026, 1, 2)}


class Stubborn:
    def model_dump(self, mode: str = "python") -> Any:
        if mode == "json":
            raise TypeError("not in JSON mode")
        return {"other": "data"}


UTC = timezone.utc


def test_an_error_of_a_model_is_not_another_dump() -> None:
    """A TypeError out of model_dump raises; what it would give in another mode is other data."""
    with pytest.raises(TypeError, match="not in JSON mode"):
        sent(Stubborn())


@pytest.mark.parametrize(
    ("params", "json_value"),
    [
        (None, None),
        ([1, 2.5, True, "é☃", None], [1, 2.5, True, "é☃", None]),
        ({"a": {"b": [{}]}}, {"a": {"b": [{}]}}),
        (2**70, 2**70),
        (Line(date(2026, 1, 2)), {"due": "2026-01-02", "price": "9.90"}),
        ({"lines": [Line(Color.RED)]}, {"lines": [{"due": "red", "price": "9.90"}]}),
        (Level.HIGH, 3),
        (Point(1, 2), [1, 2]),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
        (time(3, 4, 5), "03:04:05"),
        (timedelta(days=1, seconds=1.5), "P1DT1.5S"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (Model(when=datetime(2026, 1, 2, tzinfo=UTC)), {"when": "2026-01-02T00:00:00Z", "blob": "x"}),
        ([Dumps()], [{"day": "2026-01-02"}]),
        (MappingProxyType({"a": (1,)}), {"a": [1]}),
        (OrderedDict(a=1), {"a": 1}),
        (
            {1: "a", None: "b", 2.5: "c", False: "d"},
            {"1": "a", "null": "b", "2.5": "c", "false": "d"},
        ),
        ({Color.RED: 1, uuid.UUID(int=7): 2}, {"red": 1, "00000000-0000-0000-0000-000000000007": 2}),
    ],
)
def test_params(params: Any, json_value: Any) -> None:
    """What people pass arrives as the JSON that they would expect, nested anywhere."""
    assert sent(params) == json_value


def test_the_same_value_twice_is_no_cycle() -> None:
    """A value may stand in two places, as long as it does not contain itself."""
    twice = {"a": 1}
    assert sent([twice, twice]) == [{"a": 1}, {"a": 1}]


def circular() -> list[Any]:
    """Make a value that contains itself."""
    value: list[Any] = []
    value.append({"self": value})
    return value


def deep() -> Any:
    """Make a value that no recursion reaches the bottom of."""
    value: Any = None
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"items": [1, 2, 3, {"due": {1, 2}}]}, TypeError, "params.items[3].due: cannot send a set as JSON"),
        (b"x", TypeError, "params: cannot send a bytes as JSON"),
        ([object()], TypeError, "params[0]: cannot send a object as JSON"),
        ([Line], TypeError, "params[0]: cannot send a type as JSON"),
        ([Model], TypeError, "params[0]: cannot send a ModelMetaclass as JSON"),
        (Line(b""), TypeError, "params.due: cannot send a bytes as JSON"),
        ({"a": float("nan")}, ValueError, "params.a: cannot send nan as JSON"),
        ([-float("inf")], ValueError, "params[0]: cannot send -inf as JSON"),
        ({"a": "\ud800"}, ValueError, "params.a: cannot send text with a lone surrogate as JSON"),
        (circular(), ValueError, "params[0].self: cannot send a value that contains itself as JSON"),
        (deep(), ValueError, "params: nested too deeply to send as JSON"),
        ({"a": {1: 1, "1": 2}}, ValueError, "params.a: two keys become '1' in JSON"),
        ({"a": {(1, 2): 1}}, TypeError, "params.a: cannot send a tuple as a key in JSON"),
    ],
)
def test_params_that_cannot_be_sent(params: Any, error: type[Exception], message: str) -> None:
    """What JSON cannot hold is refused with its place."""
    with pytest.raises(error) as caught:
        start(params=params)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"action_name": ""}, ValueError, "action_name must not be empty"),
        ({"action_name": 1}, TypeError, "action_name must be text, not int"),
        ({"summary": 1}, TypeError, "summary must be text, not int"),
        ({"retry_policy": {}}, TypeError, "action_retry_policy must be a RetryPolicy, not dict"),
        ({"start_to_close_timeout": 60}, TypeError, "action_start_to_close_timeout must be a timedelta, not int"),
        (
            {"start_to_close_timeout": timedelta(0)},
            ValueError,
            "action_start_to_close_timeout must be over zero: 0:00:00",
        ),
    ],
)
def test_other_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    """Every other argument is checked by name too."""
    with pytest.raises(error) as caught:
        start(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("action_id", "path"),
    [
        ("act-1", "/actions/act-1"),
        ("../../admin", "/actions/..%2F..%2Fadmin"),
        ("a?b#c%2e", "/actions/a%3Fb%23c%252e"),
        ("ä\n", "/actions/%C3%A4%0A"),
    ],
)
def test_an_id_is_never_a_path(action_id: str, path: str) -> None:
    """Whatever the platform gives as an id becomes one path segment."""
    assert wire.poll_request(action_id) == wire.Request("GET", path)


@pytest.mark.parametrize(
    "action_id", ["", " ", ".", "..", "../../admin", "a?b", "a#b", "a%b", "a\\b", "a b", "a\n", "\ud800"]
)
def test_bad_ids_are_refused_from_a_caller(action_id: str) -> None:
    """An id that no platform gives is a ValueError."""
    with pytest.raises(ValueError, match="not an action id"):
        wire.check_action_id(action_id)


def test_an_id_is_text() -> None:
    """An id of another type is a TypeError."""
    with pytest.raises(TypeError, match="action_id must be text, not int"):
        wire.check_action_id(7)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("action_id", [None, "", " ", ".", "..", 7, ["a"], "\ud800"])
def test_unusable_ids_of_a_reply(action_id: Any) -> None:
    """An id that is missing, empty, a path or not text is none."""
    assert not wire.is_action_id(wire.parse_action(json.dumps({"id": action_id}).encode()).id)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"null", b"\xff", b'{"a": 1', b"7" * 5000 + b"x"])
def test_replies_that_are_no_objects(body: bytes) -> None:
    """A reply that is no JSON object is a ValueError that says which of both it is not."""
    with pytest.raises(ValueError, match=r"^is not (JSON|a JSON object)$"):
        wire.parse_action(body)


def test_only_successful_replies_are_read() -> None:
    """What a successful reply says, or why it cannot be used, is in the reply; others are left as they came."""
    body = b'{"id": "act-1", "status": "RUNNING"}'
    read = wire.read_reply(200, {"a": "b"}, body)
    assert read == wire.Reply(200, {"a": "b"}, body, action=wire.ActionReply("act-1", "RUNNING", None, None, 36))
    assert wire.read_reply(404, {}, body) == wire.Reply(404, {}, body)
    assert wire.read_reply(200, {}, b"<html>").problem == "the reply is not JSON"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("boom", "boom"),
        ({"message": "boom", "code": 7}, "boom"),
        ({"message": "boom", "type": "CardError"}, "CardError: boom"),
        ({"message": "boom", "type": 7}, "boom"),
        ({"code": 7}, '{"code":7}'),
        (["a"], '["a"]'),
        (None, "no reason given"),
        ("", "no reason given"),
    ],
)
def test_reason(error: Any, reason: str) -> None:
    """Any shape of error is told in words."""
    assert wire.reason(error) == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
        (b'{"message": "no"}', "no"),
        (b"{}", "{}"),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b'{"error": "' + b"x" * 100_000 + b'"}', '{"error": "' + "x" * 100_000 + '"}'),  # too long to be read
        (b"", ""),
    ],
)
def test_refusal_reason(body: bytes, reason: str) -> None:
    """A refusal is told by the field that says why, or as it came."""
    assert wire.refusal_reason(body) == reason


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "now"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    """Retry-After is read in both of its forms, a date against the reply's own clock."""
    assert wire.retry_after(headers) == seconds
