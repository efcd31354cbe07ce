"""The wire format: Python values to a request's bytes, a reply's bytes to values. Pure.

- What cannot be sent is refused here, naming its place (``params.items[3].due``).
- A reply is an object, bare or inside ``{"data": {...}, "error": null}``.
- ``error`` beside a ``status`` belongs to the action; ``error`` without one belongs to the request.
- ``read_reply`` is called in a thread, so that no body, however long, is read in the event loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re
from datetime import date, time, timedelta
from enum import Enum
from typing import Any, Mapping, NamedTuple, Union

from .models import RetryPolicy, check_type
from .redaction import one_line

LARGE_BODY = 64 * 1024  # bytes from which JSON keeps an event loop busy for over a millisecond, and belongs in a thread


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
    """Build the POST that starts an action."""
    check_type("action_name", action_name, str, "text")
    if not action_name.strip():
        raise ValueError("action_name must not be empty")
    body = {
        "action_name": _plain(action_name, "action_name"),
        "params": _plain(params, "params"),
        "is_external_action": True,
    }
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
    return Request("POST", "/actions", headers, _dump(body).encode())


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


def _plain(value: Any, place: str) -> Any:
    try:
        return _to_json_value(value, place, frozenset())
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply to send as JSON") from None


def _to_json_value(value: Any, place: str, parents: frozenset[int]) -> Any:
    """Convert what people pass to what json can write."""
    if isinstance(value, Enum):
        return _to_json_value(value.value, place, parents)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        if not _is_unicode(value):
            raise ValueError(f"{place}: cannot send text with a lone surrogate as JSON")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}: cannot send {value} as JSON")
        return value
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return iso8601_duration(value)
    if id(value) in parents:
        raise ValueError(f"{place}: cannot send a value that contains itself as JSON")
    parents |= {id(value)}
    if isinstance(value, Mapping):
        return _to_json_object(value, place, parents)
    if isinstance(value, (list, tuple)):
        return [_to_json_value(item, f"{place}[{index}]", parents) for index, item in enumerate(value)]
    if not isinstance(value, type):
        if hasattr(value, "model_dump"):
            return _to_json_value(_model_dump(value), place, parents)
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return _to_json_object(fields, place, parents)
    from decimal import Decimal  # rarely needed, and slow to import
    from uuid import UUID

    if isinstance(value, (UUID, Decimal)):
        return str(value)
    raise TypeError(f"{place}: cannot send a {type(value).__name__} as JSON")


def _to_json_object(mapping: Mapping[Any, Any], place: str, parents: frozenset[int]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in mapping.items():
        name = _to_json_value(key, f"{place} (a key)", parents)
        if name is None or isinstance(name, (int, float)):
            name = _dump(name)  # as json itself writes such keys
        elif not isinstance(name, str):
            raise TypeError(f"{place}: cannot send a {type(key).__name__} as a key in JSON")
        if name in plain:
            raise ValueError(f"{place}: two keys become {name!r} in JSON")
        plain[name] = _to_json_value(item, f"{place}.{name}", parents)
    return plain


def _model_dump(model: Any) -> Any:
    try:
        inspect.signature(model.model_dump).bind(mode="json")
    except (TypeError, ValueError):  # it has no modes, or does not tell
        return model.model_dump()
    return model.model_dump(mode="json")  # which pydantic's custom serialisers need


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
