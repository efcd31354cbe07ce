"""What people are told beside results and exceptions: warnings that are worth reading, and never a flood of them.

*An action that nobody waits for any more.* The exception gets a note (Python 3.11), and the log a warning, which
reaches stderr where nobody has set logging up. Many actions may be left at one moment, as where a TaskGroup or
``asyncio.run`` cancels all tasks. The first of them is told at once, the others together: one line, with each id, as
soon as the event loop comes to it.

*What a platform does to all who ask it.* One warning in a minute stands for all of them; the rest are for DEBUG.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import NamedTuple

logger: logging.Logger = logging.getLogger("zamp_sdk")


NOW_AND_THEN = 60.0
"""Seconds between two warnings of one subject: a person has read the last one, and wants to know that it goes on."""


class Notice(NamedTuple):
    """What has become of an action; ``{}`` in ``fate`` and in ``collect`` stands for it."""

    fate: str
    """A sentence that is as true of several actions."""
    action: str
    """The action, for people."""
    collect: str = ""
    """The code that collects its result, if there is any."""
    action_id: str = ""

    def __str__(self) -> str:
        how = f"; to collect its result: {self.collect.format(repr(self.action_id))}" if self.collect else ""
        return self.fate.format(self.action) + how


class _Moment(threading.local):
    """What this thread's event loop has still to tell, once it has told of the first."""

    loop: asyncio.AbstractEventLoop | None = None
    others: list[Notice]


_moment = _Moment()


def add_note(exc: BaseException, text: str) -> None:
    """Add a note to an exception, where this Python has notes."""
    if hasattr(exc, "add_note"):  # Python 3.11
        exc.add_note(text)


def warn(notice: Notice) -> None:
    """Log what has become of an action: at once, or together with others that are left at the same moment."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # it is a coroutine that was thrown away
        _log(str(notice))
        return
    if _moment.loop is loop:
        _moment.others.append(notice)
        return
    _warn_of_others()  # of a loop that was stopped before it came to it
    _moment.loop, _moment.others = loop, []
    loop.call_soon(_warn_of_others)
    _log(str(notice))


def _warn_of_others() -> None:
    """Log the others of one moment together: one line for each fate."""
    if _moment.loop is None:
        return
    _moment.loop, others = None, _moment.others
    kinds: dict[tuple[str, str], list[str]] = {}
    for notice in others:
        kinds.setdefault((notice.fate, notice.collect), []).append(notice.action)
    for (fate, collect), actions in kinds.items():
        how = f"; to collect a result: {collect.format('ID')}" if collect else ""
        _log(fate.format(f"{len(actions)} more: {', '.join(actions)}") + how)


def _log(text: str) -> None:
    # A handler that raises must not take the place of what is being raised, and is not this package's to mend.
    with contextlib.suppress(Exception):
        logger.warning("%s", text)


_warned_at: dict[str, float] = {}  # by subject: two for each platform


def warn_now_and_then(subject: str, text: str) -> None:
    """Log what many actions meet at the same time: as a warning if the last one of this subject is a minute old."""
    now = time.monotonic()
    is_due = now - _warned_at.get(subject, -NOW_AND_THEN) >= NOW_AND_THEN
    if is_due:
        _warned_at[subject] = now
    logger.log(logging.WARNING if is_due else logging.DEBUG, "%s", text)
