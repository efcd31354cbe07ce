"""What the body of a start must say, field by field. Pure.

The wire format is spelled out here, and not taken from the client, which is checked by it.
"""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from typing import Any

from ..action_executor.models import RetryPolicy

# Days, hours, minutes and seconds (ISO 8601); longer units have no fixed length.
_DURATION = re.compile(
    r"P(?=.)(?:(\d{1,9})D)?(?:T(?=.)(?:(\d{1,9})H)?(?:(\d{1,9})M)?(?:(\d{1,9}(?:\.\d+)?)S)?)?", re.ASCII
)


def _duration(name: str, text: Any) -> timedelta:
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{name} must be an ISO 8601 duration, not {text!r}")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return timedelta(days, seconds, hours=hours, minutes=minutes)


# Types, least value, and both in words.
_RULES: dict[str, Any] = {
    "action_name": ((str,), None, "a text"),
    "params": ((dict, list, str, int, float, bool, type(None)), None, "any JSON value"),
    "is_external_action": ((bool,), True, "true"),
    "summary": ((str,), None, "a text"),
    "start_to_close_timeout_seconds": ((int, float), sys.float_info.min, "a number above 0"),
    "retry_policy": ((dict,), None, "an object"),
}
_ONE_ATTEMPT = {"initial_interval": "PT0S", "maximum_interval": "PT0S", "maximum_attempts": 1, "backoff_coefficient": 1}
_DEFAULTS = {"summary": "", "start_to_close_timeout_seconds": sys.float_info.max, "retry_policy": _ONE_ATTEMPT}


def checked_start(body: Any) -> dict[str, Any]:
    """Return all fields of a start; a ValueError says what is wrong with it."""
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    fields = {**_DEFAULTS, **body}
    for name in fields.keys() - _RULES.keys():
        raise ValueError(f"there is no field {name}")
    for name, (kinds, least, expected) in _RULES.items():
        value = fields.get(name, ...)
        if type(value) not in kinds or (least is not None and not least <= value <= sys.float_info.max):
            shown = "missing" if value is ... else repr(value)[:100]
            raise ValueError(f"{name} must be {expected}; it is {shown}")
    policy = fields["retry_policy"].items()
    try:
        policy = {name: _duration(name, value) if name.endswith("_interval") else value for name, value in policy}
        fields["retry_policy"] = RetryPolicy(**policy)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ValueError(f"retry_policy: {exc}") from None
    return fields
