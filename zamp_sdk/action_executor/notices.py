"""What people are told beside results and exceptions: warnings that are worth reading, and never a flood of them.

*An action that nobody waits for any more.* The exception gets a note (Python 3.11), and the log a warning, which
reaches stderr where nobody has set logging up. Many actions may be left at one moment, as where a TaskGroup or
``asyncio.run`` cancels all tasks, and some of them have a request to end first. The first is told at once, the others
of the next tenth of a second together: one line, with each id.

*What a platform does to all who ask it.* One warning in a minute stands for all of them; the rest are for DEBUG.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import weakref
from typing import NamedTuple

logger: logging.Logger = logging.getLogger("zamp_sdk")


NOW_AND_THEN = 60.0
"""Seconds between two warnings of one subject: a person has read the last one, and wants to know that it goes on."""

MOMENT = 0.1
"""Seconds in which actions count as left together: a person takes it for one event."""


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


_others: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[Notice]] = weakref.WeakKeyDictionary()
"""What each loop's moment has still to tell, now that the first was told."""


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
    if loop in _others:
        _others[loop].append(notice)
        return

    def end() -> None:
        del _others[loop]
        tell()

    # A loop may be closed before the moment ends, as asyncio.run does, or never run again. Its timer alone keeps `end`,
    # so what is still to be told is told when that is thrown away, and at the latest when the process ends.
    tell = weakref.finalize(end, _warn_of, _others.setdefault(loop, []))
    loop.call_later(MOMENT, end)
    _log(str(notice))


def _warn_of(notices: list[Notice]) -> None:
    """Log what has become of several actions together: one line for each fate."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for notice in notices:
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
