"""What is sent: params become JSON, durations ISO 8601; checked against recordings in tests/data."""

from __future__ import annotations

import enum
import json
import sys
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import pydantic
import pytest

from zamp_sdk import RetryPolicy
from zamp_sdk.action_executor import params as encoding

DATA = Path(__file__).parent / "data"
EXCHANGES = json.loads((DATA / "exchanges.json").read_text(encoding="utf-8"))["exchanges"]
DURATIONS = json.loads((DATA / "durations.json").read_text(encoding="utf-8"))["rows"]


def start(action_name: Any = "a", params: Any = None, **more: Any) -> encoding.Call:
    """Build a start of which the test names what it is about."""
    arguments = {"summary": None, "retry_policy": None, "start_to_close_timeout": None, "idempotency_key": "k"}
    return encoding.start_call(action_name, params, **{**arguments, **more})


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
def test_a_call_becomes_the_request_that_was_recorded(exchange: Any) -> None:
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


@pytest.mark.parametrize("row", DURATIONS, ids=lambda row: row["iso8601"])
def test_a_duration_is_written_as_pydantic_writes_it(row: Any) -> None:
    """A duration is written as pydantic writes it."""
    assert encoding.iso8601_duration(timedelta(microseconds=row["microseconds"])) == row["iso8601"]


@pytest.mark.parametrize(
    "duration",
    [
        *(sign * timedelta(microseconds=7**power) for power in range(22) for sign in (1, -1)),
        timedelta(days=365),
        timedelta(days=400, seconds=1),
        timedelta(days=999_999_999),
    ],
)
def test_pydantic_reads_back_the_same_duration(duration: timedelta) -> None:
    """What real pydantic reads back equals the timedelta, negative and years long ones included."""
    text = encoding.iso8601_duration(duration)
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


class Foreign:
    """A class of someone's own."""


class NotADate(date):
    """What pandas' NaT is: a date by its class, and none by what it says."""

    def isoformat(self) -> str:
        return "NaT"


class Nanoseconds(timedelta):
    """What pandas' Timedelta is: a timedelta that holds more than its microseconds tell."""

    nanoseconds: int

    def __new__(cls, nanoseconds: int) -> Nanoseconds:  # noqa: PYI034  # typing.Self came with Python 3.11
        duration = super().__new__(cls, microseconds=nanoseconds // 1000)
        duration.nanoseconds = nanoseconds
        return duration

    def __eq__(self, other: object) -> bool:
        return self.nanoseconds % 1000 == 0 and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = timedelta.__hash__

    def __repr__(self) -> str:
        return f"{self.nanoseconds} ns"


class OwnParts(timedelta):
    """What pendulum's Duration is: a timedelta whose parts are counted in another way."""

    @property
    def days(self) -> int:
        return 0

    @property
    def seconds(self) -> int:
        return int(self.total_seconds())


class ShortUUID(uuid.UUID):
    def __str__(self) -> str:
        return self.hex[:4]


class Price(Decimal):
    def __str__(self) -> str:
        return f"{super().__str__()} EUR"


class Marked(str, enum.Enum):
    """An Enum whose text is not its value."""

    GOOD = "good", 1

    def __new__(cls, text: str, value: int) -> Marked:  # noqa: PYI034  # typing.Self came with Python 3.11
        member = str.__new__(cls, text)
        member._value_ = value
        return member


@dataclass
class Unset:
    number: int = field(init=False)


@dataclass
class Slotted:
    __slots__ = ("number",)
    number: int

    @classmethod
    def unset(cls) -> Slotted:
        return object.__new__(cls)


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
        ([Marked.GOOD, {Marked.GOOD: 1}], ["good", {"good": 1}]),  # as json itself writes it
        ({"by day": Line({date(2026, 1, 2): 1})}, {"by day": {"due": {"2026-01-02": 1}, "price": "9.90"}}),
        ([Dumps(), {None: Dumps()}], [{"day": "2026-01-02"}, {"null": {"day": "2026-01-02"}}]),
        ([ShortUUID(int=7), Price("9.90")], ["00000000-0000-0000-0000-000000000007", "9.90"]),
        (Nanoseconds(nanoseconds=90_000_000_000), "PT1M30S"),
        (OwnParts(days=1, seconds=1), "P1DT1S"),
        (OwnParts(seconds=-90), "-PT1M30S"),
        ([[[]], {}, [{}, {"a": [{"b": [None, True]}]}]], [[[]], {}, [{}, {"a": [{"b": [None, True]}]}]]),
    ],
)
def test_params_arrive_as_the_json_that_people_expect(params: Any, json_value: Any) -> None:
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
        (
            {"items": [1, 2, 3, {"due": {1, 2}}]},
            TypeError,
            "params.items[3].due: cannot send a set as JSON: make it a list",
        ),
        (range(3), TypeError, "params: cannot send a range as JSON: make it a list"),
        ({"a": (item for item in [1])}, TypeError, "params.a: cannot send a generator as JSON: make it a list"),
        ([{}.values()], TypeError, "params[0]: cannot send a dict_values as JSON: make it a list"),
        (b"x", TypeError, "params: cannot send a bytes as JSON: make it text, with decode() or base64"),
        ([object()], TypeError, "params[0]: cannot send an object as JSON"),
        ([len], TypeError, "params[0]: cannot send a builtin_function_or_method as JSON"),
        ([1j], TypeError, "params[0]: cannot send a complex as JSON"),
        ([int], TypeError, "params[0]: cannot send the class int as JSON: send an instance of it"),
        ([Line], TypeError, f"params[0]: cannot send the class {__name__}.Line as JSON: send an instance of it"),
        ([Model], TypeError, f"params[0]: cannot send the class {__name__}.Model as JSON: send an instance of it"),
        ([Foreign()], TypeError, f"params[0]: cannot send a {__name__}.Foreign as JSON"),
        (Line(b""), TypeError, "params.due: cannot send a bytes as JSON: make it text, with decode() or base64"),
        ({"a": float("nan")}, ValueError, "params.a: cannot send nan as JSON"),
        ([-float("inf")], ValueError, "params[0]: cannot send -inf as JSON"),
        ({"a": "\ud800"}, ValueError, "params.a: cannot send text with a lone surrogate as JSON"),
        (circular(), ValueError, "params[0].self: cannot send a value that contains itself as JSON"),
        (deep(), ValueError, "params: nested too deeply to send as JSON"),
        ({"a": {1: 1, "1": 2}}, ValueError, "params.a: two keys become '1' in JSON"),
        (Line([{None: 1, "null": 2}]), ValueError, "params.due[0]: two keys become 'null' in JSON"),
        ([MappingProxyType({True: 1, "true": 2})], ValueError, "params[0]: two keys become 'true' in JSON"),
        (
            {"a": [{"b": 1}, {date(2026, 1, 2): 1, "2026-01-02": 2}]},
            ValueError,
            "params.a[1]: two keys become '2026-01-02' in JSON",
        ),
        ({"a": {(1, 2): 1}}, TypeError, "params.a: cannot send a tuple as a key in JSON"),
        ({"a": {float("inf"): 1}}, ValueError, "params.a (a key): cannot send inf as JSON"),
        ({"due date": {"\n": {1}}}, TypeError, r"params['due date']['\n']: cannot send a set as JSON: make it a list"),
        ([Decimal("NaN")], ValueError, "params[0]: cannot send Decimal('NaN') as JSON"),
        ([Decimal("sNaN")], ValueError, "params[0]: cannot send Decimal('sNaN') as JSON"),
        ({"a": Decimal("-Infinity")}, ValueError, "params.a: cannot send Decimal('-Infinity') as JSON"),
        (
            {"a": NotADate(2026, 1, 2)},
            ValueError,
            "params.a: cannot send NaT as JSON: it is no date or time in ISO 8601",
        ),
        (
            [Line(datetime(1800, 1, 1, tzinfo=timezone(timedelta(seconds=3208))))],  # Berlin before time zones
            ValueError,
            "params[0].due: cannot send 1800-01-01T00:00:00+00:53:28 as JSON: it is no date or time in ISO 8601",
        ),
        (
            {"a": Nanoseconds(nanoseconds=1)},
            ValueError,
            "params.a: cannot send 1 ns as JSON: it is no whole number of microseconds",
        ),
        ([{"line": Unset()}], ValueError, "params[0].line.number: this field was never set"),
        ({"a": [Slotted.unset()]}, ValueError, "params.a[0].number: this field was never set"),
        (Line(Line(Unset())), ValueError, "params.due.due.number: this field was never set"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(params: Any, error: type[Exception], message: str) -> None:
    """What JSON cannot hold is refused with its place."""
    with pytest.raises(error) as caught:
        start(params=params)
    assert str(caught.value) == message


class Counted:
    """A model that counts how often it is dumped, and may raise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.dumps = 0

    def model_dump(self) -> Any:
        self.dumps += 1
        if self.error is not None:
            raise self.error
        return {"a": 1}


@pytest.mark.parametrize(
    "error", [RuntimeError("no session"), NotImplementedError(), TypeError("t"), ValueError("v"), RecursionError("r")]
)
@pytest.mark.parametrize("others", [[], [{date(2026, 1, 2): 1}]])
def test_what_a_model_raises_is_raised_and_it_is_not_asked_again(error: Exception, others: list[Any]) -> None:
    """An error of a user's model_dump is the user's, as it is, and nothing calls it a second time."""
    model = Counted(error)
    with pytest.raises(type(error)) as caught:
        start(params=[*others, model])
    assert caught.value is error
    assert model.dumps == 1


@pytest.mark.parametrize("refused", [{1}, float("nan"), "\ud800", Unset(), {1: 1, "1": 1}])
def test_a_model_beside_what_is_refused_is_dumped_once(refused: Any) -> None:
    """The search for the place of what cannot be sent runs no user's code that has run before."""
    model = Counted()
    with pytest.raises((TypeError, ValueError), match=r"^params\.refused"):
        start(params={"model": model, "refused": refused})
    assert model.dumps == 1


@pytest.mark.parametrize("params", [[date(2026, 1, 2)], [Line(1)], {"a": {date(2026, 1, 2): {1}}}])
def test_params_that_nobody_waits_for_are_given_up(params: Any) -> None:
    """Encoding ends as soon as it is asked about a value that JSON does not know, once nobody wants it any more."""
    with pytest.raises(encoding.GivenUpError):
        start(params=params, is_wanted=lambda: False)


@pytest.mark.parametrize("spec", [None, dict, list, str, int, Line, Model, date])
def test_a_mock_is_refused_as_what_it_is(spec: Any) -> None:
    """A mock, whatever it stands in for, is no value to send, and the refusal names it."""
    for kind in (mock.MagicMock, mock.NonCallableMock):
        params = {"a": kind(spec=spec)}
        assert encoding.is_small(params)
        with pytest.raises(TypeError, match=rf"^params\.a: cannot send a unittest\.mock\.{kind.__name__} as JSON$"):
            start(params=params)


def test_a_numpy_scalar_is_named_with_its_module() -> None:
    """A type that has the name of a built-in one is told apart by its module."""
    imposter = type("bool", (), {"__module__": "numpy"})
    with pytest.raises(TypeError, match=r"^params\.ok: cannot send a numpy\.bool as JSON$"):
        start(params={"ok": imposter()})


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python writes ints of any length")
def test_an_int_that_python_does_not_write_is_refused_with_its_place() -> None:
    """An int of more digits than Python writes is a ValueError that names it, and one of as many is sent."""
    with pytest.raises(ValueError, match=r"^params\[1\]: cannot send so long an int as JSON: Exceeds the limit"):
        start(params=[1, 10**5000])
    assert sent([10**4000]) == [10**4000]


@pytest.mark.parametrize("convert", [lambda rows: rows, tuple], ids=["plain", "converted"])
def test_plain_and_converted_params_are_the_same_bytes(convert: Any) -> None:
    """What json encodes in one go reads as what is converted value by value: UTF-8 without needless spaces."""
    rows = [{"id": 1, "name": "Müller & Söhne ☃", "total": 1.5, "paid": True, "note": None, "tags": ["a", {}]}]
    body = start(params=convert(rows)).body
    assert body is not None
    assert '"params":[{"id":1,"name":"Müller & Söhne ☃","total":1.5,"paid":true,"note":null,'.encode() in body


def test_shared_values_cost_no_more_than_their_json() -> None:
    """A value that stands in many places is looked through as often as it is written, and no more."""
    value: Any = ["x"]
    for _ in range(12):
        value = [value, value]
    assert len(json.dumps(sent(value))) > 4096


@pytest.mark.parametrize(
    ("params", "small"),
    [
        (None, True),
        ({"invoice_id": "inv_123", "lines": [{"price": Decimal(1), "due": date(2026, 1, 2)}] * 10}, True),
        (mock.MagicMock(), True),
        (list(range(999)), True),
        (list(range(1000)), False),
        ({str(key): key for key in range(500)}, False),
        ([[[1] * 9] * 9] * 20, False),
        ("x" * 9_999, True),
        (["x" * 10_001], False),
        ({"x" * 10_001: 1}, False),
        (MappingProxyType({}), False),
        (Line(None), False),
        ([Dumps()], False),
        (circular(), False),
    ],
)
def test_small_params_are_known_at_a_glance(params: Any, small: bool) -> None:
    """Under 1,000 values, or 10,000 characters, are small; what hides its size is not."""
    assert encoding.is_small(params) is small


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
def test_other_arguments_are_checked_by_name(arguments: Any, error: type[Exception], message: str) -> None:
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
    assert encoding.poll_call(action_id) == encoding.Call("GET", path)
