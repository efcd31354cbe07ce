"""The values a caller hands in or gets back: RetryPolicy, SdkConfig, ActionStatus.

Everything is validated on construction, so that whatever holds one of these may trust it.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any

from ..errors import MissingConfigError


class ActionStatus(str, Enum):
    """Where an action stands; all but ``RUNNING`` are final."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    TERMINATED = "TERMINATED"
    TIMED_OUT = "TIMED_OUT"

    __str__ = str.__str__


@dataclass(frozen=True)
class RetryPolicy:
    """How the platform retries the attempts of one action, by the rules of Temporal's RetryPolicy.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of its range.
    """

    initial_interval: timedelta
    """The wait before the second attempt; not negative."""
    maximum_attempts: int
    """Attempts in all, the first one included; 0 means no limit."""
    maximum_interval: timedelta
    """No wait is longer than this; not under ``initial_interval``."""
    backoff_coefficient: float
    """Each wait is this many times the one before; at least 1."""

    def __post_init__(self) -> None:
        kinds: dict[str, tuple[type | tuple[type, ...], str, Any]] = {
            "initial_interval": (timedelta, "a timedelta", timedelta(0)),
            "maximum_attempts": (int, "an int", 0),
            "maximum_interval": (timedelta, "a timedelta", timedelta(0)),
            "backoff_coefficient": ((int, float), "a number", 0),
        }
        for name, (kind, expected, zero) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")
            if value < zero:
                raise ValueError(f"{name} must not be negative: {value}")
        if not 1 <= self.backoff_coefficient <= sys.float_info.max:
            raise ValueError(f"backoff_coefficient must be a finite number of at least 1: {self.backoff_coefficient}")
        if self.maximum_interval < self.initial_interval:
            raise ValueError(f"maximum_interval must not be under initial_interval: {self.maximum_interval}")

    @classmethod
    def default(cls) -> RetryPolicy:
        """The platform's usual policy: 30 s, 11 attempts, at most 15 min, times 1.5."""
        return cls(
            initial_interval=timedelta(seconds=30),
            maximum_attempts=11,
            maximum_interval=timedelta(minutes=15),
            backoff_coefficient=1.5,
        )


@dataclass(frozen=True)
class SdkConfig:
    """Which platform to talk to, and as whom; its repr does not show the token.

    Raises:
        TypeError: A field is not text.
        ValueError: A field cannot be used; the token is not quoted.
    """

    base_url: str
    """An http or https URL, with a path if it has one; kept without a trailing slash."""
    auth_token: str = field(repr=False)
    """The bearer token: printable ASCII without white space (RFC 6750); stripped."""

    def __post_init__(self) -> None:
        for name in ("base_url", "auth_token"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, not {type(getattr(self, name)).__name__}")
        object.__setattr__(self, "base_url", _normalize_base_url(self.base_url.strip()))
        object.__setattr__(self, "auth_token", self.auth_token.strip())
        if not self.auth_token:
            raise ValueError("auth_token must not be empty")
        if not all("!" <= char <= "~" for char in self.auth_token):
            raise ValueError("auth_token must be printable ASCII without white space inside (RFC 6750)")

    @classmethod
    def resolve(cls, base_url: str | None, auth_token: str | None) -> SdkConfig:
        """Take each value from its argument, or else the environment."""
        return cls(_given("base_url", base_url, "ZAMP_BASE_URL"), _given("auth_token", auth_token, "ZAMP_AUTH_TOKEN"))


def _given(argument: str, value: str | None, variable: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        value = os.environ.get(variable, "")
        if not value.strip():
            raise MissingConfigError(
                f"{variable} is not set: set it in the environment, or pass {argument}=... in the call"
            )
    return value


@functools.lru_cache(maxsize=8)
def _normalize_base_url(url: str) -> str:
    """Refuse what could send the token astray."""
    # Imported here because `import zamp_sdk` alone has no use for it.
    from urllib.parse import quote, urlsplit

    if any(char <= " " or char == "\x7f" for char in url):
        raise ValueError("base_url must not contain white space or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("base_url is not a valid URL; check its host and port") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("base_url must begin with https:// (or http://)")
    if "@" in parts.netloc or "\\" in url:
        raise ValueError("base_url must not contain a user name, a password or a backslash; the token is auth_token")
    if "?" in url or "#" in url:
        raise ValueError("base_url must not have a query or a fragment")
    # Some Pythons take more than digits for a port, and anything in brackets.
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+(%[\w.-]+)?\]|[^][:]+)(:[0-9]+)?", parts.netloc) or port == 0:
        raise ValueError("base_url must name a host, and a port from 1 to 65535 if any")
    host = parts.hostname or ""
    try:
        host = host if ":" in host else host.encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"base_url has a host name that cannot be looked up: {host!r}") from None
    if ":" in host:
        host = f"[{host}]"
    elif not all(char.isalnum() or char in ".-_" for char in host):
        raise ValueError(f"base_url has a host name that cannot be looked up: {host!r}")
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"
