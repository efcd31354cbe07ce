"""What a reply says: JSON becomes an id, a status, a result, or the reason why there is none. Pure.

- A reply is an object, bare or inside ``{"data": {...}, "error": null}``.
- ``error`` beside a ``status`` belongs to the action; ``error`` without one belongs to the request.
- ``read_start`` and ``read_poll`` are called in a thread, where everything is done that a long body makes long.
- Here, and nowhere else, what a peer wrote is made fit to be shown: in an ``ActionReply`` each text is without secrets,
  and ``problem`` and ``reason`` are one printable line. Ids, known statuses and results are as the platform gave them.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any, Mapping, NamedTuple

from .. import transport
from .models import ActionStatus, check_type
from .redaction import Redactor, one_line

REASON_SHOWN = 500
"""Characters of the reason for a failure that a message shows: a long sentence or two."""


class ActionReply(NamedTuple):
    """What came back, read. It can be used if it has no ``problem``."""

    status_code: int
    action_id: str | None = None
    """The id in it, if it is one."""
    status: str | None = None
    result: Any = None
    error: Any = None
    """Why the action has no result, as the platform wrote it: text, an object, or None."""
    reason: str = ""
    """The same in words."""
    size: int = 0
    """Bytes of the body."""
    retry_after: float | None = None
    """Seconds that the platform asks to wait."""
    is_paced: bool = False
    """Whether all who ask the platform wait so long, so that who was refused only needs a place in their line."""
    problem: str | None = None
    """Why it cannot be used."""
    may_retry: bool = True
    """Whether asking again may help against the problem; for a start, ``lifecycle`` has stricter rules."""
    headers: Mapping[str, str] = {}
    """Of a reply that cannot be used; their names are in lower case."""
    body: str = ""
    """Likewise."""

    def __repr__(self) -> str:  # error reporters ship the repr of variables, and a result is nobody else's business
        return f"<ActionReply {self.status_code} of {self.size} bytes>"


def read_start(raw: transport.Reply, redact: Redactor, now: float) -> ActionReply:
    """Read the reply to a start, which has to name the action; ``now`` is in seconds since 1970."""
    reply, fields = _read(raw, redact, now)
    if reply.problem is not None:
        return reply
    if fields["error"] and not reply.status:
        return _unusable(reply, raw, redact, _words(redact, fields["error"]))
    if reply.action_id is None:
        instead = "" if fields["id"] in (None, "") else f", but {_words(redact, fields['id'])}"
        return _unusable(reply, raw, redact, f"the reply has no usable id{instead}")
    return reply


def read_poll(action_id: str, raw: transport.Reply, redact: Redactor, now: float) -> ActionReply:
    """Read the reply to a question about an action, which has to tell its status."""
    reply, fields = _read(raw, redact, now)
    if reply.problem is not None:
        return reply
    if fields["id"] not in (None, action_id):
        return _unusable(reply, raw, redact, "the reply is about another action")
    if reply.status:
        return reply
    if fields["error"]:
        return _unusable(reply, raw, redact, _words(redact, fields["error"]), may_retry=False)
    return _unusable(reply, raw, redact, "the reply has no status")


def is_action_id(value: Any) -> bool:
    """Whether an id, of a start's reply or of a caller, is one that can be printed, copied and asked for."""
    # "." and ".." are the two segments that percent-encoding leaves a path.
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and value.isprintable()
        and not any(char in value for char in " /\\?#%")
    )


def check_action_id(action_id: str) -> None:
    """Refuse an id that no platform gives."""
    check_type("action_id", action_id, str, "text")
    if not is_action_id(action_id):
        raise ValueError(f"not an action id: {one_line(repr(action_id))}")


def in_words(error: Any) -> str:
    """Say an ``error`` in words: whole, and as the peer wrote it."""
    if isinstance(error, Mapping) and isinstance(error.get("message"), str):
        kind, error = error.get("type"), error["message"]
        if isinstance(kind, str) and kind:
            error = f"{kind}: {error}"
    if error is None or error == "":
        return "no reason given"
    if isinstance(error, str):
        return error
    from json import dumps

    try:
        return dumps(error, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        return "a reason that is nested too deeply to be shown"


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that ``Retry-After`` asks for (RFC 9110, 10.2.3), with decimals too; None if it does not.

    A date is compared with the reply's own, or where that is missing with ``now``.
    """
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if re.fullmatch(r"\d+\.?\d*|\.\d+", text, re.ASCII):
        return float(text)
    then = _seconds_since_1970(text)
    if then is None:
        return None
    answered = _seconds_since_1970(headers.get("date", ""))
    return max(0.0, then - (now if answered is None else answered))


def _seconds_since_1970(date: str) -> float | None:
    """Read a date in one of HTTP's three formats (RFC 9110, 5.6.7); only asctime's has no time zone, which is GMT."""
    from email.utils import parsedate_tz

    try:
        parts = parsedate_tz(date)
        if parts is None:
            return None
        return datetime(*parts[:6], tzinfo=timezone.utc).timestamp() - (parts[9] or 0)
    except (TypeError, ValueError, IndexError, OverflowError):  # it may be anything
        return None


# --- what all replies have in common ----------------------------------------------------------------------------------


class _UnreadableError(ValueError):
    """Valid JSON that this Python cannot read, now or later."""


def _read(raw: transport.Reply, redact: Redactor, now: float) -> tuple[ActionReply, dict[str, Any]]:
    """Return what any reply says, and the fields that it says it in: id, status, result and error."""
    code = raw.status_code
    reply = ActionReply(code, size=len(raw.body), retry_after=retry_after(raw.headers, now))
    if not 200 <= code < 300:
        may_retry = code < 200 or code >= 500 or code in (408, 425, 429)
        return _unusable(reply, raw, redact, _why_unsuccessful(raw, redact), may_retry=may_retry), {}
    try:
        fields = _fields(_load(raw))
    except ValueError as exc:
        excerpt = one_line(redact.text(_text(raw))) or "(empty)"
        may_retry = not isinstance(exc, _UnreadableError)
        return _unusable(reply, raw, redact, f"the reply {exc}: {excerpt}", may_retry=may_retry), {}
    reply = reply._replace(
        action_id=fields["id"] if is_action_id(fields["id"]) else None,
        status=fields["status"] if isinstance(fields["status"], str) else None,
        result=fields["result"],
    )
    if reply.status and reply.status not in (ActionStatus.RUNNING, ActionStatus.COMPLETED):
        error = redact.json(fields["error"])
        status = reply.status if reply.status in ActionStatus.__members__ else redact.text(reply.status)
        reply = reply._replace(status=status, error=error, reason=one_line(in_words(error), REASON_SHOWN))
    return reply, fields


def _unusable(
    reply: ActionReply, raw: transport.Reply, redact: Redactor, problem: str, *, may_retry: bool = True
) -> ActionReply:
    """Add why a reply cannot be used, and what an error shows of it."""
    headers = {redact.text(name): redact.text(value) for name, value in raw.headers.items()}
    return reply._replace(problem=problem, may_retry=may_retry, headers=headers, body=redact.text(_text(raw)))


def _fields(value: Any) -> dict[str, Any]:
    """Return an action's fields, all of them there, bare or taken out of an envelope."""
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")  # as what is no JSON at all
    error = value.get("error")
    if "data" in value and "id" not in value and "status" not in value:
        value = value["data"] if isinstance(value["data"], dict) else {}
    fields = {name: value.get(name) for name in ("id", "status", "result")}
    return {**fields, "error": value.get("error") or error}


def _why_unsuccessful(raw: transport.Reply, redact: Redactor) -> str:
    """Say why a request was refused: by the field that tells, or else as it came."""
    try:
        fields = _load(raw)
    except ValueError:
        fields = None
    told = (
        [fields[key] for key in ("error", "detail", "message") if fields.get(key)] if isinstance(fields, dict) else []
    )
    return _words(redact, told[0]) if told else one_line(redact.text(_text(raw)), REASON_SHOWN) or "(empty)"


def _words(redact: Redactor, error: Any) -> str:
    return one_line(redact.text(in_words(error)), REASON_SHOWN)


def _load(raw: transport.Reply) -> Any:
    """Read a body as JSON; a ValueError says why it cannot be read."""
    from json import JSONDecodeError, loads

    try:
        try:
            return loads(raw.body)  # in UTF-8, as RFC 8259 has it, or UTF-16 or 32
        except UnicodeDecodeError:
            return loads(_text(raw, errors="strict"))
    except RecursionError:
        raise _UnreadableError("is JSON that is nested too deeply to be read") from None
    except (JSONDecodeError, UnicodeDecodeError):
        raise ValueError("is not JSON") from None
    except ValueError:  # the only other one is int's
        problem = "has a number of more digits than this Python reads (sys.set_int_max_str_digits(0) lifts that limit)"
        raise _UnreadableError(problem) from None


def _text(raw: transport.Reply, errors: str = "replace") -> str:
    """Return a body as text: in UTF-8, or else in the charset that it declares."""
    declared = re.search(r"charset\s*=\s*\"?([\w.:-]+)", raw.headers.get("content-type", ""), re.ASCII | re.IGNORECASE)
    try:
        return raw.body.decode()
    except UnicodeDecodeError:
        try:
            return raw.body.decode(declared[1] if declared else "utf-8", errors=errors)
        except (LookupError, UnicodeError):  # no charset that is known here, or not what it is in
            return raw.body.decode(errors=errors)
