"""The two ways in which a request waits: for a thread to do something, and for a socket to be ready.

The event loop directs a request from beginning to end, and lends it only to *hops*: a hop is a function that
``asyncio.to_thread`` runs in a thread of the loop's default executor, one at a time for each request. A hop works and
never waits for a peer (2 ms for a quick reply aside), so it is done within milliseconds (a reply of many megabytes
takes some hundred), and nobody ever has to wake one. What has to be waited for is waited for in the loop, which costs
no thread; only on loops that watch no sockets (Windows' proactor) do threads wait, a tenth of a second at a time.

Each request has one deadline, and every wait here takes what remains of it. None of them gives up without a last look:
a loop that was blocked, or a process that was stopped, still finds the reply that came meanwhile.

A hop that has begun cannot be stopped: where its task is cancelled, or its loop ends, it goes on to its end, and what
it works on must not be closed under it. So each hop has a *ticket*, a ``concurrent.futures.Future``. A ticket that is
cancelled before its hop begins makes sure that it never does; one whose hop has begun tells, alone, what became of it,
whatever is done to the task and the executor meanwhile; and ``when_at_rest`` calls back when it has ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import math
import select
import socket
import time
from typing import Any, Callable, Iterable, TypeVar

T = TypeVar("T")

READ, WRITE = 1, 2
"""What a socket is waited for; they can be added up."""

SLICE = 0.1
"""Seconds that a thread waits for a socket at a time, on loops that cannot; a cancelled request frees it so soon."""


class NoThreadError(OSError):
    """No thread took the function, so it was not run, and never will be."""


class Hops:
    """The hops and the waits of one request, within ``timeout`` seconds from now."""

    def __init__(self, timeout: float) -> None:
        self.deadline: float = time.monotonic() + timeout
        self.queued: float = 0.0
        """Seconds spent waiting for a thread, in sum."""
        self._ticket: concurrent.futures.Future[Any] | None = None

    def remaining(self) -> float:
        """Return the seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    async def run(self, function: Callable[[], T], *, may_hang: bool = False) -> T:
        """Run a function in a thread, and return what it returns or raise what it raises.

        Args:
            function: The work.
            may_hang: It may never end, but works on nothing that has to be closed (a name lookup), so it is left to
                itself at the deadline. Any other function that has begun is waited for.

        Raises:
            NoThreadError: No thread took it before the deadline, the executor takes no more work, or it threw this
                away.
            TimeoutError: It hangs.
        """
        ticket: concurrent.futures.Future[T] = concurrent.futures.Future()
        if not may_hang:
            self._ticket = ticket
        queued_at = time.monotonic()

        def hop() -> None:
            if not ticket.set_running_or_notify_cancel():
                return  # given up before it began
            self.queued += time.monotonic() - queued_at
            try:
                result = function()
            except BaseException as exc:
                ticket.set_exception(exc)
            else:
                ticket.set_result(result)

        task = asyncio.ensure_future(asyncio.to_thread(hop))
        try:
            # Not `await task`: asyncio.wait raises only if the caller is cancelled, not if the executor drops the task.
            await asyncio.wait({task}, timeout=self.remaining())
            why_not = _why_not_run(task)
            if ticket.cancel():
                self.queued += time.monotonic() - queued_at
                raise NoThreadError(why_not)
            if not ticket.done():
                await _until_done(ticket, self.remaining() if may_hang else None)
                if not ticket.done():
                    raise TimeoutError("timed out")
            return ticket.result()
        finally:
            ticket.cancel()
            task.cancel()

    def when_at_rest(self, callback: Callable[[], object]) -> bool:
        """Call back when no hop works any more, not counting one that may hang.

        Returns:
            True if that was at once; False if a hop still works, at whose end its thread calls back.
        """
        ticket = self._ticket
        is_at_rest = ticket is None or ticket.done()
        if ticket is None:
            callback()
        else:
            ticket.add_done_callback(lambda _: callback())
        return is_at_rest

    async def until_ready(self, *sockets: socket.socket, events: int, seconds: float = math.inf) -> bool:
        """Wait in the loop until one of the sockets is ready for one of the events; False if none is in time.

        Args:
            sockets: What to watch.
            events: READ, WRITE, or their sum.
            seconds: How long to wait at most; the deadline holds in any case.
        """
        loop = asyncio.get_running_loop()
        filenos = [sock.fileno() for sock in sockets]
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():  # a watcher calls again and again, until it is removed
                ready.set_result(None)

        timer = loop.call_later(min(seconds, self.remaining()), wake)
        unwatch: list[Callable[[], object]] = [timer.cancel]
        try:
            for fileno in filenos:
                if events & READ:
                    loop.add_reader(fileno, wake)
                    unwatch.append(functools.partial(loop.remove_reader, fileno))
                if events & WRITE:
                    loop.add_writer(fileno, wake)
                    unwatch.append(functools.partial(loop.remove_writer, fileno))
            await ready
        except NotImplementedError:  # Windows' proactor loop watches no sockets
            return await self._until_ready_in_threads(sockets, events, seconds)
        finally:
            for undo in unwatch:
                undo()
        return is_ready(sockets, events)

    async def _until_ready_in_threads(self, sockets: Iterable[socket.socket], events: int, seconds: float) -> bool:
        """Wait in threads, a slice of time in each: the one place where a thread waits for a peer."""
        give_up_at = min(time.monotonic() + seconds, self.deadline)
        while time.monotonic() < give_up_at:
            wait = min(SLICE, max(0.0, give_up_at - time.monotonic()))
            try:
                if await self.run(functools.partial(is_ready, sockets, events, wait)):
                    return True
            except NoThreadError:
                if self.remaining():  # it was not for want of time
                    raise
        return is_ready(sockets, events)


async def _until_done(ticket: concurrent.futures.Future[Any], timeout: float | None) -> None:
    outcome = asyncio.wrap_future(ticket)
    try:
        await asyncio.wait({outcome}, timeout=timeout)
    finally:
        if not outcome.cancel():  # which a ticket whose hop has begun does not notice
            outcome.exception()  # or else asyncio logs that nobody has asked for it


def _why_not_run(task: asyncio.Task[None]) -> str:
    """Say why the executor has not run what this task gave it, if it has not; asyncio logs what nobody asks for."""
    if not task.done():
        return "timed out"
    reason = "the event loop's executor was shut down" if task.cancelled() else task.exception()
    return f"no thread to send it from: {reason}"


def is_ready(sockets: Iterable[socket.socket], events: int, seconds: float = 0.0) -> bool:
    """Wait so many seconds, in whatever thread this is, and say whether one of the sockets is ready."""
    if hasattr(select, "poll"):  # select() dies of file descriptors over 1,023
        poll = select.poll()
        mask = (select.POLLIN if events & READ else 0) | (select.POLLOUT if events & WRITE else 0)
        for sock in sockets:
            poll.register(sock, mask)
        return bool(poll.poll(seconds * 1000))
    watched = list(sockets)
    reading, writing = (watched if events & READ else []), (watched if events & WRITE else [])
    return any(select.select(reading, writing, writing, seconds))  # Windows tells a failed connect as exceptional
