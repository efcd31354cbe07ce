"""How many connections there may be, and which are idle, whatever event loops and threads the process has.

A request that may use a connection has *room*. How much room there is depends on how long replies take: 64 connections
carry 64 requests in one reply's time, which is plenty where that is 5 ms and far too few where it is 100. Requests wait
for room in one line, first come, first served, over all event loops. ``enter`` waits in that line; ``leave`` gives room
back and hands it to the first in the line, who is called by its own loop.

With room a request takes an idle connection of its route, or dials a new one. A connection goes back with ``leave``,
and is kept only if nothing of its last reply is left over. Idle connections give way to new ones of other routes, and
all of them where descriptors run out. They are closed after ten seconds by the event loop that gave one back, or, where
that has ended, by the next request or at the process's exit.

The lock guards a few lines each time, and nobody waits for anything while holding it. It is reentrant because the
garbage collector may end a forgotten task, which gives its room back, in the middle of these lines.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Callable

from .connections import Connection

if TYPE_CHECKING:
    from .connections import Route

FEWEST_ROOMS = 64
"""Connections, idle ones included, that there may always be: a quarter of the 256 descriptors that macOS gives by
default. (While a host's addresses are tried side by side, one of them may have a few sockets.)"""

MOST_ROOMS = 256
"""Connections that there may be where replies take long, if that is no more than a quarter of the descriptors that the
process may open."""

QUICK, SLOW = 0.05, 0.1
"""Seconds that a reply takes where the fewest connections are enough (they carry 1,280 requests a second, about what an
event loop does), and where there may be the most; in between there are more in proportion."""

LAST_REPLIES = 64
"""Replies that are looked back upon. What counts is the quickest of them: the average rises with our own load."""

FIRST_REPLIES = 16
"""Replies that have to be known before there are more connections: the first one of a process, or of a platform that
has slept, may take long by itself."""

MAX_IDLE = 10.0
"""Seconds after which an idle connection is closed: longer than most pauses between polls, and well under the 60 and 75
that load balancers and nginx keep theirs by default."""

MAX_IDLE_FOR_START = 1.0
"""Seconds after which a start takes no idle connection. A start that meets a connection just closed by the server
cannot be sent again; and while a process (a Lambda) is frozen its peers may close, which it learns only later."""


class Pool:
    """The room that there is for connections, the line of who waits for it, and the idle connections."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._line: deque[_Waiter] = deque()
        self._rooms = FEWEST_ROOMS
        self._rooms_taken = 0
        self._most_rooms = _most_rooms()
        self._reply_times: deque[float] = deque(maxlen=LAST_REPLIES)
        self._idle: list[Connection] = []  # the longest idle first
        self._sweeping_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None

    def __repr__(self) -> str:
        return (
            f"<Pool: {self._rooms_taken} of {self._rooms} rooms taken, {len(self._line)} requests in the line, "
            f"{len(self._idle)} connections idle>"
        )

    async def enter(self) -> None:
        """Wait in the line for room; whoever gets it has to ``leave``."""
        with self._lock:
            if self._rooms_taken < self._rooms:
                self._rooms_taken += 1
                return
        waiter = _Waiter(asyncio.get_running_loop())
        with self._lock:
            self._line.append(waiter)
            self._admit()  # room may have come free in between, when there was nobody to give it to
        try:
            await waiter.called
        except BaseException:
            with self._lock:
                if waiter.has_room:  # it was given at the same moment
                    self.leave()
                elif waiter in self._line:
                    self._line.remove(waiter)
            raise

    def leave(self, connection: Connection | None = None, *, may_keep: bool = False) -> None:
        """Give room back, and with it the connection, if there is one.

        Args:
            connection: The request's connection.
            may_keep: Whether the connection may serve another request; what comes on it until then, ``take`` will see.
        """
        try:
            if connection is not None:
                self._give_back(connection, may_keep=may_keep)
        finally:
            with self._lock:
                self._rooms_taken -= 1
                self._admit()

    def take(self, route: Route, *, for_start: bool) -> Connection | None:
        """Return the idle connection of this route that was used last, if one is still good; it is the caller's now."""
        max_idle = MAX_IDLE_FOR_START if for_start else MAX_IDLE
        with self._lock:
            self._close_expired()
            for connection in self._idle[::-1]:
                if connection.route == route and _seconds_idle(connection) <= max_idle:
                    self._idle.remove(connection)
                    if connection.is_quiet():
                        return connection
                    connection.close()
            while self._idle and len(self._idle) + self._rooms_taken > self._rooms:
                self._idle.pop(0).close()
        return None

    def learn(self, seconds: float) -> None:
        """Take notice of how long a reply took, and make as much room as that asks for."""
        with self._lock:
            self._reply_times.append(seconds)
            quickest = min(self._reply_times) if len(self._reply_times) >= FIRST_REPLIES else 0.0
            share = min(1.0, max(0.0, (quickest - QUICK) / (SLOW - QUICK)))
            self._rooms = FEWEST_ROOMS + round(share * (self._most_rooms - FEWEST_ROOMS))
            self._admit()

    def close_idle(self) -> bool:
        """Close every idle connection; return whether there was one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        return bool(idle)

    def _admit(self) -> None:
        """Give what room there is to the first in the line, with the lock held; a closed loop's requests need none."""
        while self._line and self._rooms_taken < self._rooms:
            self._rooms_taken += 1  # first of all: what comes next may have the garbage collector free more
            waiter = self._line.popleft()
            waiter.has_room = not waiter.loop.is_closed()
            if waiter.has_room:
                with contextlib.suppress(RuntimeError):  # closed just now: its tasks are collected, and give it back
                    _call_in(waiter.loop, waiter.call)
            else:
                self._rooms_taken -= 1

    def _give_back(self, connection: Connection, *, may_keep: bool) -> None:
        if not may_keep:
            connection.close()
            return
        with self._lock:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
            self._sweep_later()

    def _sweep_later(self) -> None:
        """Have an event loop close what is idle for too long, unless one will already; with the lock held."""
        sweeping = None if self._sweeping_loop is None else self._sweeping_loop()
        if self._idle and (sweeping is None or sweeping.is_closed()):
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # a request's loop is gone, and a thread or the garbage collector gives back
                return
            self._sweeping_loop = weakref.ref(loop)
            loop.call_later(max(0.0, MAX_IDLE - _seconds_idle(self._idle[0])), self._sweep)

    def _sweep(self) -> None:
        self._sweeping_loop = None
        with self._lock:
            self._close_expired()
            self._sweep_later()

    def _close_expired(self) -> None:
        while self._idle and _seconds_idle(self._idle[0]) >= MAX_IDLE:
            self._idle.pop(0).close()


class _Waiter:
    """A request in the line."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.called: asyncio.Future[None] = loop.create_future()
        self.has_room: bool = False
        """Whether it has been given room, which it then has to pass on if it does not want it any more."""

    def call(self) -> None:
        """In its own loop: wake its request."""
        if not self.called.done():  # it may have been cancelled
            self.called.set_result(None)


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have an event loop call back; raises RuntimeError if it is closed."""
    try:
        is_here = asyncio.get_running_loop() is loop
    except RuntimeError:  # it is a thread without one
        is_here = False
    if is_here:
        loop.call_soon(callback)  # to wake it would cost two system calls
    else:
        loop.call_soon_threadsafe(callback)


def _seconds_idle(connection: Connection) -> float:
    return time.monotonic() - connection.idle_since


def _most_rooms() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return FEWEST_ROOMS
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MOST_ROOMS
    return max(FEWEST_ROOMS, min(MOST_ROOMS, descriptors // 4))


_pool = Pool()


def shared_pool() -> Pool:
    """Return the process's pool."""
    return _pool


def _start_afresh() -> None:
    """In a forked child: begin with an empty pool. The sockets of its parent's are closed by ``dialing``."""
    global _pool  # noqa: PLW0603  # the one place where the process changes its pool
    _pool = Pool()


def _close_at_exit() -> None:
    _pool.close_idle()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
