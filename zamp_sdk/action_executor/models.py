"""The values a caller hands in or gets back; all are validated on construction."""

from __future__ import annotations

import functools
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any, Optional

from ..errors import MissingConfigError


def check_type(name: str, value: object, kind: Any, expected: str) -> None:
    """Say in a TypeError what a value must be; a bool is no number."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


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

    A field of the wrong type is a TypeError, one out of its range a ValueError.
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
        rules: Any = (
            ("initial_interval", timedelta, "a timedelta", timedelta(0)),
            ("maximum_attempts", int, "an int", 0),
            ("maximum_interval", timedelta, "a timedelta", timedelta(0)),
            ("backoff_coefficient", (int, float), "a number", 0),
        )
        for name, kind, expected, zero in rules:
            value = getattr(self, name)
            check_type(name, value, kind, expected)
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

    A field that is no text is a TypeError, one that cannot be used a ValueError; the token is not quoted.
    """

    base_url: str
    """An http or https URL, with a path if it has one; kept without a trailing slash."""
    auth_token: str = field(repr=False)
    """The bearer token: printable ASCII without white space (RFC 6750); stripped."""

    def __post_init__(self) -> None:
        for name in ("base_url", "auth_token"):
            check_type(name, getattr(self, name), str, "text")
        object.__setattr__(self, "base_url", _normalize_base_url(self.base_url.strip()))
        object.__setattr__(self, "auth_token", self.auth_token.strip())
        if not re.fullmatch("[!-~]+", self.auth_token):
            raise ValueError("auth_token must be printable ASCII without white space, and not empty (RFC 6750)")

    @classmethod
    def resolve(cls, base_url: Optional[str], auth_token: Optional[str]) -> SdkConfig:
        """Take each value from its argument, or else the environment."""
        return cls(_given("base_url", base_url, "ZAMP_BASE_URL"), _given("auth_token", auth_token, "ZAMP_AUTH_TOKEN"))


def _given(argument: str, value: Optional[str], variable: str) -> str:
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
    from urllib.parse import quote  # not needed to import zamp_sdk, and not cheap

    host = r"\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|[^][:/?#@\\\s]+"
    parts = re.fullmatch(rf"([Hh][Tt][Tt][Pp][Ss]?)://({host})(?::0*([0-9]{{1,5}}))?(/[^?#\\\x00-\x20\x7f]*)?", url)
    if "://" not in url:  # not quoted: it may be a secret in the wrong place
        raise ValueError("base_url has no scheme; did you mean https:// in front of it? It must be like https://host")
    if not parts or not 0 < int(parts[3] or 443) < 2**16:
        raise ValueError(
            "base_url must be like https://host, https://host:8443 or https://host/path, without a user name, "
            "a password, a query, a fragment, white space or a backslash"
        )
    host = parts[2].lower()
    try:
        host = host if host[0] == "[" else _ascii_host(host)
    except UnicodeError:
        host = ""
    if not re.fullmatch(r"\[.+\]|[\w.-]+", host, re.ASCII):
        raise ValueError(f"base_url has a host name that cannot be looked up: {parts[2]!r}")
    port = f":{int(parts[3])}" if parts[3] else ""
    path = quote((parts[4] or "").rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return f"{parts[1].lower()}://{host}{port}{path}"


def _ascii_host(host: str) -> str:
    """Return a host name in ASCII; a UnicodeError if it has none, a ValueError if it has more than one.

    The standard library has IDNA 2003 (RFC 3490), which reads some characters as others (ß as ss) where IDNA 2008 (RFC
    5891), the browsers' and the registries', has names of their own: there the token would go to somebody else's host.
    So what does not come back from ASCII as it was is refused; capitals aside, on which the two agree.
    """
    in_ascii = host.encode("idna").decode("ascii")
    if not host.isascii():
        from unicodedata import normalize

        labels = re.split("[.\u3002\uff0e\uff61]", normalize("NFC", host))  # the full stops of RFC 3490, 3.1
        for label, label_in_ascii in zip(labels, in_ascii.split(".")):
            if not label.isascii() and label_in_ascii.encode().decode("idna") != label:
                raise ValueError(
                    f"base_url has a host name that standards read in different ways: {host!r}; "
                    "write it as its owner does in ASCII, with xn--"
                )
    return in_ascii
