"""Every exception that zamp_sdk raises of its own; programs read the attributes, people read ``str()``.

Bad arguments are plain ``ValueError`` and ``TypeError``. None of these holds the token; all survive pickle and copy.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional


class ZampError(Exception):
    """The base of every exception defined here."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class HttpClientError(ZampError):
    """A request failed: a reply that is no success or cannot be used, a network failure, or no reply in time.

    Attributes:
        message: What happened and what to do about it.
        status_code: The reply's HTTP status; ``None`` without a reply, as
        response_body: its text.
        headers: The reply's headers, their names in lower case.
        action_id: The action; ``None`` while the platform has not given it an id.
        may_have_started: Whether the action may exist although its start failed. Where it is ``False`` and there is
            no ``action_id``, starting it again cannot run it twice.
    """

    def __init__(
        self,
        message: str,
        status_code: Optional[int] = None,
        response_body: Optional[str] = None,
        *,
        headers: Optional[Mapping[str, str]] = None,
        action_id: Optional[str] = None,
        may_have_started: bool = False,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.response_body = response_body
        self.headers: dict[str, str] = dict(headers or {})
        self.action_id = action_id
        self.may_have_started = may_have_started


class ActionFailedError(ZampError, RuntimeError):
    """The action ended without a result that can be returned.

    Attributes:
        action_id: The action that failed.
        status: ``FAILED``, ``CANCELED``, ``TERMINATED``, ``TIMED_OUT``, or one that this version
            does not know, if it came with an error or a result.
        error: The platform's ``error`` as it came: text, an object, or ``None``.
    """

    def __init__(self, message: str, *, action_id: str = "", status: str = "", error: Any = None) -> None:
        super().__init__(message)
        self.action_id = action_id
        self.status = status
        self.error = error


class ActionTimeoutError(ZampError, TimeoutError):
    """The wait is over while the action goes on; ``ActionExecutor.get_handle`` can go on waiting.

    Attributes:
        action_id: The action that is still running.
        status: The last status seen; empty if there was none.
        waited: Seconds spent waiting.
    """

    def __init__(self, message: str, *, action_id: str = "", status: str = "", waited: float = 0.0) -> None:
        super().__init__(message)
        self.action_id = action_id
        self.status = status
        self.waited = waited


class MissingConfigError(ZampError, KeyError):
    """The base URL or the token is neither an argument nor in the environment; ``str()`` says what to set."""
