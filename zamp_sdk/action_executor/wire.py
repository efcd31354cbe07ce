"""The wire format: Python values to a request's bytes, a reply's bytes to values. Pure.

- What cannot be sent is refused here, naming its place (``params.items[3].due``). What is sent is what was meant: an
  infinite Decimal, a date that is none (pandas' NaT) and a field that was never set are refused like a set or bytes.
- Params that hold nothing but what ``json.loads`` would return are encoded by ``json`` in one go, and looked through
  afterwards. Everything else is converted value by value, which takes several times as long, and is also how the place
  of what cannot be sent is found.
- A reply is an object, bare or inside ``{"data": {...}, "error": null}``.
- ``error`` beside a ``status`` belongs to the action; ``error`` without one belongs to the request.
- ``read_reply`` is called in a thread, so that long bodies do not hold up the event loop; only where no thread is free
  at the deadline it is called in the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
from collections import deque
from datetime import date, time, timedelta
from enum import Enum
from itertools import chain
from typing import AbstractSet, Any, Callable, Coroutine, Generator, Mapping, NamedTuple, Union, ValuesView

from .models import RetryPolicy, check_type
from .redaction import one_line

LARGE_BODY = 64 * 1024  # bytes from which JSON keeps an event loop busy for over a millisecond, and belongs in a thread

# Up to here params are encoded in about a millisecond, however they are: not worth a thread, whose start and end cost
# the event loop a tenth of that.
SMALL_VALUES = 1_000  # values and keys
SMALL_TEXT = 10_000  # characters in all

# Below this no Python refuses to write an int in decimal: sys.set_int_max_str_digits takes no limit under 640 digits.
_SHORT_INT = 2_100  # bits

# Exactly these types json encodes as they are; of a subclass it is another question what was meant.
_SCALARS = frozenset((str, int, float, bool, type(None)))
_CONTAINERS = frozenset((dict, list))

# What isoformat gives, where that is ISO 8601: an offset has no seconds there.
_ISO_8601 = re.compile(r"\d{4}-\d\d-\d\d|(\d{4}-\d\d-\d\dT)?\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?", re.ASCII)

_Place = tuple[Union[str, int, None], ...]
"""Where a value is: the argument's name, then the keys and indexes that lead to it, None for a key itself.

It is put into words only when something is refused.
"""


class Request(NamedTuple):
    """What to send; the transport adds the base URL, the token and the usual headers."""

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None


class ActionReply(NamedTuple):
    """What a reply says about an action."""

    id: Any
    """As the platform wrote it: ``is_action_id`` says whether it is one."""
    status: str | None
    result: Any
    error: Any
    size: int = 0
    """Bytes of the body that it came in."""

    def __repr__(self) -> str:  # without what a peer wrote, as a Reply's
        return f"<ActionReply of {self.size} bytes>"


class Reply(NamedTuple):
    """What came back; header names are in lower case. ``read_reply`` makes it."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes
    action: ActionReply | None = None
    """What a successful reply says, if it can be read as far as that."""
    problem: str | None = None
    """Why a successful reply cannot be used, in our own words."""
    may_pass: bool = True
    """Whether asking again may help against the problem."""

    def __repr__(self) -> str:  # error reporters ship the repr of variables, and a peer may have echoed the token
        return f"<Reply {self.status_code} of {len(self.body)} bytes>"


class Progress:
    """How far a request came, for whoever was interrupted while it was under way."""

    sent: bool = False
    """Whether a byte of the request may have left; set when it has ended, in whatever way."""


class Failure(NamedTuple):
    """A request without a reply."""

    message: str
    sent: bool
    """Whether a byte of the request itself may have left."""
    retryable: bool
    """Whether the same request may fare better later."""
    cause: Exception | None = None


Answer = Union[Reply, Failure]


def start_request(
    action_name: str,
    params: Any,
    *,
    summary: str | None,
    retry_policy: RetryPolicy | None,
    start_to_close_timeout: timedelta | None,
    idempotency_key: str,
) -> Request:
    """Build the POST that starts an action; long params take long, so that is_small says where to do it."""
    check_type("action_name", action_name, str, "text")
    if not action_name.strip():
        raise ValueError("action_name must not be empty")
    body = {"action_name": _plain(action_name, "action_name"), "params": params, "is_external_action": True}
    if summary is not None:
        check_type("summary", summary, str, "text")
        body["summary"] = _plain(summary, "summary")
    if retry_policy is not None:
        check_type("action_retry_policy", retry_policy, RetryPolicy, "a RetryPolicy")
        body["retry_policy"] = _plain(retry_policy, "action_retry_policy")
    if start_to_close_timeout is not None:
        check_type("action_start_to_close_timeout", start_to_close_timeout, timedelta, "a timedelta")
        if start_to_close_timeout <= timedelta(0):
            raise ValueError(f"action_start_to_close_timeout must be over zero: {start_to_close_timeout}")
        body["start_to_close_timeout_seconds"] = start_to_close_timeout.total_seconds()
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
    return Request("POST", "/actions", headers, _encoded(body))


def is_small(params: Any) -> bool:
    """Whether params are encoded so quickly that no event loop minds; looks at no more of them than a small one has.

    Models and dataclasses are not small: what their fields and their ``model_dump`` cost cannot be seen from outside.
    """
    values, characters = 1, 0
    waiting = [params]
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if issubclass(kind, str):
            characters += len(value)
        elif kind is dict or kind is list or kind is tuple:
            values += len(value) * (2 if kind is dict else 1)
            if values > SMALL_VALUES:
                return False
            waiting.extend(value)
            if kind is dict:
                waiting.extend(value.values())
        elif kind not in _SCALARS and _has_parts(kind):
            return False
    return characters <= SMALL_TEXT


def _has_parts(kind: type) -> bool:
    return issubclass(kind, (Mapping, list, tuple)) or _dumper(kind) is not None or dataclasses.is_dataclass(kind)


def poll_request(action_id: str) -> Request:
    """Build the GET that asks for an action; the id, percent-encoded whole, can never become a path."""
    from urllib.parse import quote  # not needed to import zamp_sdk, and not cheap

    return Request("GET", f"/actions/{quote(action_id, safe='')}")


def check_action_id(action_id: str) -> None:
    """Refuse an id that no platform gives."""
    check_type("action_id", action_id, str, "text")
    if not is_action_id(action_id):
        raise ValueError(f"not an action id: {one_line(repr(action_id))}")


def is_action_id(value: Any) -> bool:
    """Whether an id, of a start's reply or of a caller, is one that can be printed, copied and asked for."""
    # "." and ".." are the two segments that percent-encoding leaves a path.
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and not any(char in "/\\?#%" or char.isspace() or not char.isprintable() for char in value)
    )


def _encoded(body: dict[str, Any]) -> bytes:
    """Write a start's body, its params still as the caller passed them."""
    params = body["params"]
    # What json refuses is named or converted below.
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        encoded = _encode(body)
        if _is_plain(params):
            return encoded
    body["params"] = _plain(params, "params")
    try:
        return _encode(body)
    except RecursionError:
        raise ValueError("params: nested too deeply to send as JSON") from None


def _encode(value: Any) -> bytes:
    import json  # not needed to import zamp_sdk, and not cheap

    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _is_plain(value: Any) -> bool:
    """Whether json has encoded a value as it was meant, down to the last key; only for what json did encode.

    It goes through the value level by level, all containers of a level at once, so that what is done for each item is
    done in C: in Python it would take several times as long as the encoding itself.
    """
    containers: list[Any] = [[value]]
    while containers:
        dicts = [container for container in containers if type(container) is dict]
        lists = [container for container in containers if type(container) is list]
        if set(map(type, chain.from_iterable(dicts))) - {str}:  # of keys
            return False
        items = list(chain(chain.from_iterable(map(dict.values, dicts)), chain.from_iterable(lists)))
        kinds = set(map(type, items))
        if kinds - _SCALARS - _CONTAINERS:
            return False
        containers = [item for item in items if type(item) is dict or type(item) is list] if kinds & _CONTAINERS else []
    return True


def _plain(value: Any, place: str) -> Any:
    try:
        return _to_json_value(value, (place,), set())
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply to send as JSON") from None


def _to_json_value(value: Any, place: _Place, parents: set[int]) -> Any:  # noqa: C901, PLR0911, PLR0912  # a case a kind
    """Convert what people pass to what json can write.

    What a value is, its type says and not its ``__class__``: a mock of a dict is no dict.
    """
    kind = type(value)
    if issubclass(kind, Enum):
        return _to_json_value(value.value, place, parents)
    if issubclass(kind, str):
        if not _is_unicode(value):
            raise ValueError(f"{_words(place)}: cannot send text with a lone surrogate as JSON")
        return value
    if value is None or issubclass(kind, int):
        if value is not None and value.bit_length() > _SHORT_INT:
            _check_digits(value, place)
        return value
    if issubclass(kind, float):
        if not math.isfinite(value):
            raise ValueError(f"{_words(place)}: cannot send {float(value)} as JSON")
        return value
    if issubclass(kind, (date, time)):  # a datetime is a date
        text = value.isoformat()
        if not isinstance(text, str) or not _ISO_8601.fullmatch(text):
            raise ValueError(f"{_words(place)}: cannot send {text!s:.100} as JSON: it is no date or time in ISO 8601")
        return text
    if issubclass(kind, timedelta):
        return iso8601_duration(_exact_timedelta(value, place))
    dump = _dumper(kind)
    is_object = dump is not None or dataclasses.is_dataclass(kind) or issubclass(kind, Mapping)
    if is_object or issubclass(kind, (list, tuple)):
        if id(value) in parents:
            raise ValueError(f"{_words(place)}: cannot send a value that contains itself as JSON")
        parents.add(id(value))
        try:
            if issubclass(kind, Mapping):
                return _to_json_object(value, place, parents)
            if not is_object:
                return [_to_json_value(item, (*place, index), parents) for index, item in enumerate(value)]
            if dump is not None:
                return _to_json_value(_model_dump(value, dump), place, parents)
            return _to_json_object(_fields(value, place), place, parents)
        finally:
            parents.discard(id(value))
    from decimal import Decimal  # rarely needed, and slow to import
    from uuid import UUID

    if issubclass(kind, Decimal):
        if not value.is_finite():
            raise ValueError(f"{_words(place)}: cannot send Decimal({Decimal.__str__(value)!r}) as JSON")
        return Decimal.__str__(value)
    if issubclass(kind, UUID):
        return UUID.__str__(value)  # whatever a subclass shows people
    raise TypeError(f"{_words(place)}: cannot send {_described(value)} as JSON{_advice(value)}")


def _to_json_object(mapping: Mapping[Any, Any], place: _Place, parents: set[int]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in mapping.items():
        name = key
        if type(key) is not str or not key.isascii():
            name = _key(key, place, parents)
        if name in plain:
            raise ValueError(f"{_words(place)}: two keys become {name!r} in JSON")
        plain[name] = _to_json_value(item, (*place, name), parents)
    return plain


def _key(key: Any, place: _Place, parents: set[int]) -> str:
    name = _to_json_value(key, (*place, None), parents)
    if name is None or isinstance(name, (int, float)):
        return _dump(name)  # as json itself writes such keys
    if not isinstance(name, str):
        raise TypeError(f"{_words(place)}: cannot send {_described(key)} as a key in JSON")
    return name


def _check_digits(value: int, place: _Place) -> None:
    """Refuse an int that Python itself refuses to write (sys.set_int_max_str_digits), naming its place."""
    try:
        int.__repr__(value)
    except ValueError as exc:
        raise ValueError(f"{_words(place)}: cannot send so long an int as JSON: {exc}") from None


def _exact_timedelta(value: timedelta, place: _Place) -> timedelta:
    """Return a subclass's duration as a plain timedelta; a ValueError if it is another (pandas has nanoseconds)."""
    if type(value) is timedelta:
        return value
    # Not the attributes, which a subclass may count in its own way, as pendulum does.
    days, seconds, microseconds = (vars(timedelta)[name].__get__(value) for name in ("days", "seconds", "microseconds"))
    exact = timedelta(days, seconds, microseconds)
    if exact != value:
        raise ValueError(f"{_words(place)}: cannot send {value!r} as JSON: it is no whole number of microseconds")
    return exact


def _fields(value: Any, place: _Place) -> dict[str, Any]:
    """Return a dataclass's fields; a ValueError if one was never set (``field(init=False)``, slots)."""
    fields = {}
    for field in dataclasses.fields(value):
        try:
            fields[field.name] = getattr(value, field.name)
        except AttributeError as exc:
            raise ValueError(f"{_words((*place, field.name))}: this field was never set") from exc
    return fields


def _dumper(kind: type) -> Callable[..., Any] | None:
    """Return the ``model_dump`` of a class; on a mock, every attribute of the instance would do."""
    dump = getattr(kind, "model_dump", None)
    return dump if callable(dump) else None


def _model_dump(model: Any, dump: Callable[..., Any]) -> Any:
    if _has_modes(dump):
        return model.model_dump(mode="json")  # which pydantic's custom serialisers need
    return model.model_dump()


@functools.lru_cache(maxsize=128)  # of classes: reading a signature takes longer than a small model's dump
def _has_modes(dump: Callable[..., Any]) -> bool:
    try:
        inspect.signature(dump).bind(None, mode="json")
    except (TypeError, ValueError):  # it has no modes, or does not tell
        return False
    return True


def _words(place: _Place) -> str:
    """Name a place: ``params.items[3].due``, ``params['invoice id']``."""
    words = str(place[0])
    for step in place[1:]:
        if step is None:
            words += " (a key)"
        else:
            words += f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r:.100}]"
    return words


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _described(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {_type_name(value)}"
    name = _type_name(type(value))
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _advice(value: Any) -> str:
    """Say what to send instead, where that is plain."""
    if isinstance(value, type):
        return ": send an instance of it"
    if isinstance(value, (AbstractSet, ValuesView, range, deque, Generator)):
        return ": make it a list"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ": make it text, with decode() or base64"
    if isinstance(value, Coroutine):
        return ": await it first"
    return ""


def _is_unicode(text: str) -> bool:
    return text.isascii() or text.encode(errors="ignore").decode() == text


def iso8601_duration(value: timedelta) -> str:
    """Write a duration in ISO 8601, exactly: ``PT30S``, ``P1DT1H1M2.5S``, ``-PT5S``, ``PT0S``."""
    sign, value = ("-", -value) if value < timedelta(0) else ("", value)
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06}".rstrip("0.")
    whole = f"{sign}P{value.days}DT{hours}H{minutes}M{seconds}{fraction}S"
    return re.sub(r"(?<=[PTDHM])0[DHMS]", "", whole).rstrip("T") if value else "PT0S"


def _dump(value: Any) -> str:
    import json  # not needed to import zamp_sdk, and not cheap

    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def read_reply(status_code: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """Make a reply of what came; what a successful one says is read here."""
    reply = Reply(status_code, headers, body)
    if not 200 <= status_code < 300:
        return reply
    try:
        return reply._replace(action=parse_action(body))
    except UnreadableError as exc:
        return reply._replace(action=exc.action, problem=f"the reply {exc}", may_pass=False)
    except ValueError as exc:
        return reply._replace(problem=f"the reply {exc}")


def may_pass(status_code: int) -> bool:
    """Whether an unsuccessful reply, a platform's or a proxy's, may be another one later."""
    return status_code >= 500 or status_code in (408, 425, 429)


class UnreadableError(ValueError):
    """Valid JSON that this Python cannot read, now or later; ``action`` is what can be read of it."""

    def __init__(self, problem: str, action: ActionReply | None = None) -> None:
        super().__init__(problem)
        self.action = action


def parse_action(body: bytes) -> ActionReply:
    """Read what a successful reply says about an action; a ValueError if it is not a JSON object."""
    try:
        return _action(_load(body), len(body))
    except _TooManyDigitsError:
        readable = _action(_load(body, parse_int=lambda _digits: None), len(body))
        raise UnreadableError(
            "has a number of more digits than this Python reads (sys.set_int_max_str_digits(0) lifts that limit)",
            readable,
        ) from None


def _load(body: bytes, **options: Any) -> Any:
    from json import JSONDecodeError, loads

    try:
        return loads(body, **options)
    except RecursionError:
        raise UnreadableError("is JSON that is nested too deeply to be read") from None
    except (JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is not JSON") from None
    except ValueError:  # the only other one is int's; what follows the number has not been read yet
        raise _TooManyDigitsError("has a number of too many digits") from None


class _TooManyDigitsError(ValueError):
    """A number has more digits than ``int`` converts; what follows it has not been read."""


def _action(value: Any, size: int) -> ActionReply:
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    error = value.get("error")
    if "data" in value and "id" not in value and "status" not in value:
        value = value["data"] if isinstance(value["data"], dict) else {}
    status = value.get("status")
    return ActionReply(
        id=value.get("id"),
        status=status if isinstance(status, str) and status else None,
        result=value.get("result"),
        error=value.get("error") or error,
        size=size,
    )


def reason(error: Any) -> str:
    """Say an ``error`` in words."""
    if isinstance(error, Mapping) and isinstance(error.get("message"), str):
        kind, error = error.get("type"), error["message"]
        if isinstance(kind, str) and kind:
            error = f"{kind}: {error}"
    if error is None or error == "":
        return "no reason given"
    if isinstance(error, str):
        return error
    try:
        return _dump(error)
    except RecursionError:
        return "a reason that is nested too deeply to be shown"


def refusal_reason(body: bytes) -> str:
    """Say why a request was refused, as its body has it: whole, and as the peer wrote it."""
    if len(body) <= LARGE_BODY:  # this is asked in the event loop
        with contextlib.suppress(ValueError, AttributeError):  # it may be anything
            fields = _load(body)
            for key in ("error", "detail", "message"):
                if fields.get(key):
                    return reason(fields[key])
    return body.decode(errors="replace")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3), if it does."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        from email.utils import parsedate_to_datetime

        return max(0.0, (parsedate_to_datetime(text) - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None


def excerpt(body: bytes) -> str:
    """Return how a text begins, on one line that is safe to print."""
    return one_line(body.decode(errors="replace")) or "(empty)"
