"""What is sent: a call's values become the bytes of a request. Pure.

``json`` does the work, in one pass. It asks ``_Replacements`` what to write for an object that JSON does not know: a
date, a UUID, a dataclass, a model. Only what ``json`` refuses, and dicts whose keys are not all text, are looked
through a second time, value by value and slowly: that names the place of what cannot be sent
(``params.items[3].due``), turns keys into text, and finds two keys that become the same one.

What is sent is what was meant: an infinite Decimal, a date that is none (pandas' NaT) and a field that was never set
are refused like a set or bytes. A user's ``model_dump`` is called once, and what it raises is raised as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import sys
from collections import deque
from datetime import date, time, timedelta
from enum import Enum
from itertools import chain
from typing import AbstractSet, Any, Callable, Coroutine, Generator, Iterable, Mapping, NamedTuple, Union, ValuesView

from .models import RetryPolicy, check_type

SMALL_PARAMS = 10_000
"""Characters up to which params are encoded in about a millisecond, each value and each key counted as ten: that is not
worth a thread, whose start and end cost the event loop a tenth of it."""

_SCALARS = frozenset((int, float, bool, type(None)))
_CONTAINERS = (dict, list, tuple)  # what json writes as objects and arrays, subclasses too

# What isoformat gives, where that is ISO 8601: an offset has no seconds there.
_ISO_8601 = re.compile(r"\d{4}-\d\d-\d\d|(\d{4}-\d\d-\d\dT)?\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?", re.ASCII)

_UNSET = object()
"""Stands for a field of a dataclass that was never set (``field(init=False)``, slots)."""

_Place = tuple[Union[str, int, None], ...]
"""Where a value is: the argument's name, then the keys and indexes that lead to it, None for a key itself."""


class Call(NamedTuple):
    """What to send; the executor adds the base URL, the token and the usual headers."""

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None


def start_call(
    action_name: str,
    params: Any,
    *,
    summary: str | None,
    retry_policy: RetryPolicy | None,
    start_to_close_timeout: timedelta | None,
    idempotency_key: str,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Call:
    """Build the POST that starts an action; a TypeError or a ValueError names what cannot be sent.

    Long params take long; ``is_small`` says which are not. ``is_wanted`` is asked on the way, in whatever thread this
    is; where it says no, a GivenUpError ends the work, for ``asyncio.run`` waits for its threads before it returns.
    """
    check_type("action_name", action_name, str, "text")
    if not action_name.strip():
        raise ValueError("action_name must not be empty")
    body = {"action_name": action_name, "params": params, "is_external_action": True}
    if summary is not None:
        check_type("summary", summary, str, "text")
        body["summary"] = summary
    if retry_policy is not None:
        check_type("action_retry_policy", retry_policy, RetryPolicy, "a RetryPolicy")
        body["retry_policy"] = retry_policy
    if start_to_close_timeout is not None:
        check_type("action_start_to_close_timeout", start_to_close_timeout, timedelta, "a timedelta")
        if start_to_close_timeout <= timedelta(0):
            raise ValueError(f"action_start_to_close_timeout must be over zero: {start_to_close_timeout}")
        body["start_to_close_timeout_seconds"] = start_to_close_timeout.total_seconds()
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
    return Call("POST", "/actions", headers, _encoded(body, is_wanted))


def poll_call(action_id: str) -> Call:
    """Build the GET that asks for an action; the id, percent-encoded whole, can never become a path."""
    from urllib.parse import quote  # not needed to import zamp_sdk, and not cheap

    return Call("GET", f"/actions/{quote(action_id, safe='')}")


def is_small(params: Any) -> bool:
    """Whether params are encoded so quickly that no event loop minds; looks at no more of them than a small one has.

    Models and dataclasses are not small: what their fields and their ``model_dump`` cost cannot be seen from outside.
    """
    room = SMALL_PARAMS
    waiting = [params]
    while waiting and room > 0:
        value = waiting.pop()
        kind: Any = type(value)
        if issubclass(kind, str):
            room -= len(value)
        elif kind in _CONTAINERS:
            room -= 10 * len(value) * (2 if kind is dict else 1)
            if room > 0:
                waiting.extend(chain(value, value.values()) if kind is dict else value)
        elif kind not in _SCALARS and (issubclass(kind, _CONTAINERS) or _writer(kind).is_composite):
            return False
    return room > 0


class GivenUpError(Exception):
    """Nobody waits for these params any more."""


def _encoded(body: dict[str, Any], is_wanted: Callable[[], bool]) -> bytes:
    """Write a start's body, its values still as the caller passed them."""
    replacements = _Replacements(is_wanted)
    try:
        encoded = _encode(body, replacements)
        if not _has_other_keys([body["params"], *replacements.composites()]):
            return encoded
    except (TypeError, ValueError, RecursionError) as exc:  # where, the second look says
        if exc is replacements.raised:
            raise
    try:
        places = {"retry_policy": "action_retry_policy"}  # where the call's argument has another name
        return _encode({name: _plain(value, (places.get(name, name),), replacements) for name, value in body.items()})
    except RecursionError as exc:
        if exc is replacements.raised:
            raise
        raise ValueError("params: nested too deeply to send as JSON") from None


def _encode(value: Any, replace: Callable[[Any], Any] | None = None) -> bytes:
    import json  # not needed to import zamp_sdk, and not cheap

    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=replace).encode()


def _has_other_keys(values: Iterable[Any]) -> bool:
    """Whether a dict anywhere in values that json has encoded has keys that are not text.

    It goes through them level by level, all containers of a level at once, so that what is done for each item is done
    in C: in Python it would take several times as long as the encoding itself.
    """
    containers = list(values)
    while containers:
        dicts = [container for container in containers if isinstance(container, dict)]
        lists = [container for container in containers if isinstance(container, (list, tuple))]
        if not all(issubclass(kind, str) for kind in set(map(type, chain.from_iterable(dicts)))):
            return True
        groups = [*map(dict.values, dicts), *lists]
        kinds = set(map(type, chain.from_iterable(groups)))
        has_containers = any(issubclass(kind, _CONTAINERS) for kind in kinds)
        items = chain.from_iterable(groups) if has_containers else ()
        containers = [item for item in items if isinstance(item, _CONTAINERS)]
    return False


class _Replacements:
    """What to write for the objects of one start that JSON does not know."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self.raised: BaseException | None = None
        """What a user's code has raised."""
        self._is_wanted = is_wanted
        self._made: dict[int, tuple[Any, Any]] = {}
        """By the id of a model, say, it (so that the id stays its own) and what its own code made of it, once."""

    def __call__(self, value: Any) -> Any:
        """Return what json can write, or can ask for again; a TypeError or a ValueError without a place."""
        if not self._is_wanted():
            raise GivenUpError
        kind: Any = type(value)
        write, is_composite = _writer(kind)
        if not is_composite:
            return write(value)
        known = self._made.get(id(value))
        if known is not None:
            return known[1]
        try:
            made = write(value)
        except Exception as exc:
            self.raised = exc
            raise
        self._made[id(value)] = value, made
        return made

    def composites(self) -> Iterable[Any]:
        """Return what was made of models, dataclasses and mappings."""
        return [made for _, made in self._made.values()]


class _Writer(NamedTuple):
    """How objects of one class are written."""

    write: Callable[[Any], Any]
    """Makes something that json can write, or can ask for again; raises what says why not, without a place."""
    is_composite: bool = False
    """Whether that has parts, and is a user's code."""


@functools.lru_cache(maxsize=128)
def _writer(kind: Any) -> _Writer:  # noqa: PLR0911  # a return for each kind
    if issubclass(kind, Enum):
        return _Writer(lambda member: member.value)
    if issubclass(kind, (date, time)):  # a datetime is a date
        return _Writer(_iso8601)
    if issubclass(kind, timedelta):
        return _Writer(iso8601_duration)
    if callable(getattr(kind, "model_dump", None)):  # of the class: on a mock, every attribute of the instance would do
        return _Writer(_model_dumper(kind), is_composite=True)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        return _Writer(lambda value: {name: getattr(value, name, _UNSET) for name in names}, is_composite=True)
    if issubclass(kind, Mapping):
        return _Writer(dict, is_composite=True)
    # Whoever has one of these has imported its module, which is slow to import.
    decimal, uuid = sys.modules.get("decimal"), sys.modules.get("uuid")
    if decimal is not None and issubclass(kind, decimal.Decimal):
        return _Writer(_decimal)
    if uuid is not None and issubclass(kind, uuid.UUID):
        return _Writer(uuid.UUID.__str__)  # whatever a subclass shows people
    return _Writer(_refuse)


def _model_dumper(kind: Any) -> Callable[[Any], Any]:
    try:
        inspect.signature(kind.model_dump).bind(None, mode="json")
    except (TypeError, ValueError):  # it has no modes, or does not tell
        return lambda model: model.model_dump()
    return lambda model: model.model_dump(mode="json")  # which pydantic's custom serialisers need


def _iso8601(value: Any) -> str:
    text = value.isoformat()
    if not isinstance(text, str) or not _ISO_8601.fullmatch(text):
        raise ValueError(f"cannot send {text!s:.100} as JSON: it is no date or time in ISO 8601")
    return text


def iso8601_duration(value: timedelta) -> str:
    """Write a duration in ISO 8601, exactly: ``PT30S``, ``P1DT1H1M2.5S``, ``-PT5S``, ``PT0S``."""
    exact = timedelta.__pos__(value)  # a plain one, for a subclass may count its attributes in its own way (pendulum)
    if exact != value:  # pandas has nanoseconds
        raise ValueError(f"cannot send {value!r} as JSON: it is no whole number of microseconds")
    sign, value = ("-", -exact) if exact < timedelta(0) else ("", exact)
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06}".rstrip("0.")
    whole = f"{sign}P{value.days}DT{hours}H{minutes}M{seconds}{fraction}S"
    return re.sub(r"(?<=[PTDHM])0[DHMS]", "", whole).rstrip("T") if value else "PT0S"


def _decimal(value: Any) -> str:
    from decimal import Decimal

    text = Decimal.__str__(value)
    if not value.is_finite():
        raise ValueError(f"cannot send Decimal({text!r}) as JSON")
    return text


def _refuse(value: Any) -> Any:
    if value is _UNSET:
        raise ValueError("this field was never set")
    raise TypeError(f"cannot send {_described(value)} as JSON{_advice(value)}")


# --- the second look --------------------------------------------------------------------------------------------------


def _plain(value: Any, place: _Place, replace: _Replacements, parents: frozenset[int] = frozenset()) -> Any:
    """Return a value as json writes it, its keys as text; or name the place of what cannot be sent.

    What a value is, its type says and not its ``__class__``: a mock of a dict is no dict.
    """
    kind = type(value)
    if value is None or issubclass(kind, (str, int, float)):
        _check_scalar(value, place)
        return value
    if id(value) in parents:
        raise ValueError(f"{_words(place)}: cannot send a value that contains itself as JSON")
    parents |= {id(value)}
    if issubclass(kind, (list, tuple)):
        return [_plain(item, (*place, index), replace, parents) for index, item in enumerate(value)]
    if issubclass(kind, dict):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            name = _key(key, place, replace)
            if name in plain:
                raise ValueError(f"{_words(place)}: two keys become {name!r} in JSON")
            plain[name] = _plain(item, (*place, name), replace, parents)
        return plain
    try:
        made = replace(value)
    except (TypeError, ValueError) as exc:
        if exc is replace.raised:
            raise
        kind = TypeError if isinstance(exc, TypeError) else ValueError
        raise kind(f"{_words(place)}: {exc}") from None
    return _plain(made, place, replace, parents)


def _check_scalar(value: Any, place: _Place) -> None:
    """Refuse the text and the numbers that JSON, or Python, does not write."""
    if isinstance(value, str):
        if not _is_unicode(value):
            raise ValueError(f"{_words(place)}: cannot send text with a lone surrogate as JSON")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{_words(place)}: cannot send {float(value)} as JSON")
    elif value is not None:
        try:
            int.__repr__(value)
        except ValueError as exc:  # sys.set_int_max_str_digits
            raise ValueError(f"{_words(place)}: cannot send so long an int as JSON: {exc}") from None


def _key(key: Any, place: _Place, replace: _Replacements) -> str:
    """Return the text that stands for a key in JSON."""
    plain = _plain(key, (*place, None), replace)
    if isinstance(plain, str):
        return str.__str__(plain)
    if isinstance(plain, (list, dict)):
        raise TypeError(f"{_words(place)}: cannot send {_described(key)} as a key in JSON")
    return _encode(plain).decode()  # as json itself writes such keys


def _is_unicode(text: str) -> bool:
    return text.isascii() or text.encode(errors="ignore").decode() == text


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
