"""Who has which connection: at most 64 in the process, whatever event loops and threads it has.

A request that may use a connection has *room*. There are 64 rooms and one line for them, first come, first served, over
all event loops. ``enter`` waits in that line; ``leave`` gives room back and hands it to the first in the line, who is
woken by its own loop (a ``concurrent.futures.Future``, awaited with ``asyncio.wrap_future``, sees to both).

With room a request takes an idle connection of its route, or dials a new one. A connection goes back with ``leave``,
and is kept only if nothing of its last reply is left over. Idle connections give way to new ones of other routes, and
all of them where descriptors run out. They are closed after ten seconds by the event loop that gave one back, or, where
that has ended, by the next request or at the process's exit.

The lock guards a few lines each time, and nobody waits for anything while holding it. It is reentrant because the
garbage collector may end a forgotten task, which gives its room back, in the middle of these lines. To read the trusted
authorities takes longer, and has a lock of its own, which only threads wait for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import ssl
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future

from .connections import Connection, Route

MAX_CONNECTIONS = 64
"""Connections in the process, idle ones included: a quarter of the 256 descriptors that macOS gives by default. (While
a host's addresses are tried side by side, one of them may have a few sockets.)"""

MAX_IDLE = 10.0
"""Seconds after which an idle connection is closed: longer than most pauses between polls, and well under the 60 and 75
that load balancers and nginx keep theirs by default."""

MAX_IDLE_FOR_START = 1.0
"""Seconds after which a start takes no idle connection. A start that meets a connection just closed by the server
cannot be sent again; and while a process (a Lambda) is frozen its peers may close, which it learns only later."""


class Pool:
    """The connections of the process, each idle or with a request."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._line: deque[tuple[Future[None], asyncio.AbstractEventLoop]] = deque()  # whose turn, and who wakes it
        self._rooms_taken = 0
        self._leased: set[Connection] = set()
        self._idle: list[Connection] = []  # the longest idle first
        self._sweeping_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        self._context: ssl.SSLContext | None = None
        self._context_lock = threading.Lock()

    @property
    def rooms_taken(self) -> int:
        """How many requests have room."""
        return self._rooms_taken

    @property
    def connections(self) -> int:
        """How many connections are open here, idle ones included."""
        return len(self._leased) + len(self._idle)

    async def enter(self) -> None:
        """Wait in the line for room; whoever gets it has to ``leave``."""
        with self._lock:
            if self._rooms_taken < MAX_CONNECTIONS:
                self._rooms_taken += 1
                return
        turn: Future[None] = Future()
        with self._lock:
            self._line.append((turn, asyncio.get_running_loop()))
            self._admit()  # room may have come free in between, when there was nobody to give it to
        try:
            await asyncio.wrap_future(turn)
        except BaseException:
            if not turn.cancel():  # room was given at the same moment
                self.leave()
            raise

    def leave(self, connection: Connection | None = None, *, may_keep: bool = False) -> None:
        """Give room back, and with it the connection, if there is one.

        Args:
            connection: The request's connection.
            may_keep: Whether the request has come to its end, so that the connection may serve another. Only where an
                event loop runs; without it this can be called in any thread.
        """
        try:
            if connection is not None:
                self._give_back(connection, may_keep=may_keep)
        finally:
            with self._lock:
                self._rooms_taken -= 1
                self._admit()

    def take(self, route: Route, *, for_start: bool) -> Connection | None:
        """Lease the idle connection of this route that was used last, if one is still good."""
        max_idle = MAX_IDLE_FOR_START if for_start else MAX_IDLE
        with self._lock:
            self._close_expired()
            for connection in self._idle[::-1]:
                if connection.route == route and time.monotonic() - connection.idle_since <= max_idle:
                    self._idle.remove(connection)
                    if connection.is_quiet():
                        self._leased.add(connection)
                        connection.is_reusable = False
                        return connection
                    connection.close()
            while self._idle and len(self._idle) + self._rooms_taken > MAX_CONNECTIONS:
                self._idle.pop(0).close()
        return None

    def add(self, connection: Connection) -> None:
        """Count a new connection as leased; it uses its request's room."""
        with self._lock:
            self._leased.add(connection)

    def discard(self, connection: Connection) -> None:
        """Close a leased connection that did not come to a request; the room stays the request's."""
        with self._lock:
            self._leased.discard(connection)
        connection.close()

    def close_idle(self) -> bool:
        """Close every idle connection; return whether there was one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        return bool(idle)

    def tls_context(self) -> ssl.SSLContext:
        """Return the one context for all connections; the first time this reads the authorities, for 20 to 40 ms."""
        with self._context_lock:
            context = self.tls_context_at_hand
            if context is None:
                context = ssl.create_default_context()
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.hostname_checks_common_name = False
                self._context = context
            return context

    @property
    def tls_context_at_hand(self) -> ssl.SSLContext | None:
        """What ``tls_context`` would return, if that is made already."""
        # A test tool may have put another class in its place, for a while.
        return self._context if type(self._context) is ssl.SSLContext else None

    def forget_tls_context(self) -> None:
        """Read the authorities anew next time: their file, or a descriptor for it, may have been missing."""
        self._context = None

    def close_inherited(self) -> None:
        """In a forked child: close its copies of its parent's sockets."""
        self._lock = threading.RLock()  # a thread that is not here may have held the other
        for connection in [*self._idle, *self._leased]:
            connection.close()

    def _admit(self) -> None:
        """Give what room there is to the first in the line, with the lock held; a closed loop's requests need none."""
        while self._line and self._rooms_taken < MAX_CONNECTIONS:
            self._rooms_taken += 1  # first of all: what comes next may have the garbage collector free more
            turn, loop = self._line.popleft()
            if not loop.is_closed() and turn.set_running_or_notify_cancel():
                turn.set_result(None)
            else:
                self._rooms_taken -= 1

    def _give_back(self, connection: Connection, *, may_keep: bool) -> None:
        is_kept = may_keep and connection.is_reusable and not connection.has_leftovers  # `take` looks at the socket
        with self._lock:
            self._leased.discard(connection)
            if is_kept:
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
                self._sweep_later()
        if not is_kept:
            connection.close()

    def _sweep_later(self) -> None:
        """Have an event loop close what is idle for too long, unless one will already; with the lock held."""
        sweeping = None if self._sweeping_loop is None else self._sweeping_loop()
        if self._idle and (sweeping is None or sweeping.is_closed()):
            loop = asyncio.get_running_loop()
            self._sweeping_loop = weakref.ref(loop)
            loop.call_later(max(0.0, self._idle[0].idle_since + MAX_IDLE - time.monotonic()), self._sweep)

    def _sweep(self) -> None:
        self._sweeping_loop = None
        with self._lock:
            self._close_expired()
            self._sweep_later()

    def _close_expired(self) -> None:
        while self._idle and time.monotonic() - self._idle[0].idle_since >= MAX_IDLE:
            self._idle.pop(0).close()


_pool = Pool()


def shared_pool() -> Pool:
    """Return the process's pool."""
    return _pool


def _start_afresh() -> None:
    """In a forked child: begin with an empty pool."""
    global _pool  # the one place where the process changes its pool
    inherited, _pool = _pool, Pool()
    inherited.close_inherited()


def _close_at_exit() -> None:
    _pool.close_idle()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
