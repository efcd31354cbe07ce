"""The two ways in which a request waits: for a thread to do something, and for a socket to be ready.

A *hop* is a function that is run in a thread of the event loop's default executor, with ``asyncio.to_thread``. It works
and never waits for a peer (2 ms for a quick reply aside), so it is done within milliseconds, and a request has one at a
time. What has to be waited for is waited for in the loop, which costs no thread; only on loops that watch no sockets
(Windows' proactor) do threads wait, a tenth of a second at a time.

*Hops cross together.* Only one thread at a time runs Python, and where several have work they hand the right to do so
(the GIL) to each other at every system call, which costs more than the work itself. So the hops that are wanted at the
same moment go into one thread, which does one after the other: the loop's *ferry* takes them there. While several are
on their way, whoever comes waits until they are back, but for 20 ms at most; then those that are done land, and those
that have not begun cross in another thread. A hop that is wanted alone crosses at once, and holds nobody up.

*Each hop is claimed once*: by a thread that begins it; by the loop, which does it itself where no thread has for a
second, or where the executor takes no more work; or by its request, which gives it up. So one that is given up before
it begins never begins. One that has begun comes to its end, and its request waits for that before the cancellation goes
on: it lasts milliseconds, what it works on must not be closed under it, and the reply it has read is not lost. Should
the request be gone before (a second cancellation, Ctrl-C, a loop that is torn down), ``when_at_rest`` closes after it.

Each request has one deadline, and every wait for a peer takes what remains of it. None of them gives up without a last
look: a loop that was blocked, or a process that was stopped, still finds the reply that came meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import math
import select
import socket
import threading
import time
import weakref
from concurrent.futures import Future
from typing import Any, Callable, Generic, Iterable, TypeVar

T = TypeVar("T")

READ, WRITE = 1, 2
"""What a socket is waited for; they can be added up."""

PATIENCE = 0.002
"""Seconds that a hop which crosses alone may wait for a peer: platforms nearby have answered by then, which saves
another hop. (Several in one thread would wait for each other.)"""

LATE = 0.02
"""Seconds for which hops on their way hold up others: several times what 64 of them usually take together."""

WITHOUT_THREAD = 1.0
"""Seconds after which the loop does what no thread has begun: every thread may be waiting for this very action."""

SLICE = 0.1
"""Seconds that a thread waits for a socket at a time, on loops that cannot; a cancelled request frees it so soon."""


class Hops:
    """The hops and the waits of one request, within ``timeout`` seconds from now."""

    def __init__(self, timeout: float) -> None:
        self.deadline: float = time.monotonic() + timeout
        self._hop: _Hop[Any] | None = None

    @property
    def patience(self) -> float:
        """Seconds that the hop under way may wait for a peer."""
        return PATIENCE if self._hop is not None and self._hop.is_alone else 0.0

    def remaining(self) -> float:
        """Return the seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.monotonic())

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function that works on what has to be closed, and return what it returns or raise what it raises."""
        self._hop = hop = _Hop(function)
        _ferry().board(hop)
        try:
            await hop.landed
        except asyncio.CancelledError:
            if not hop.give_up():
                await hop.until_ended()
            raise
        self._hop = None  # it refers to its function, and that, perhaps, to this
        return hop.outcome.result()

    async def look_up(self, function: Callable[[], T]) -> T:
        """Run a function that may never end, but works on nothing that has to be closed: a name lookup.

        Raises:
            TimeoutError: It has not ended at the deadline, and is left to itself.
        """
        return await _alone(_Hop(function), self.remaining())

    @property
    def is_at_rest(self) -> bool:
        """Whether no hop is at work, or will be."""
        return self._hop is None or self._hop.outcome.done()

    def when_at_rest(self, callback: Callable[[], object]) -> None:
        """Give up the hop that has not begun; call back when none is at work: now, or at its end, in its thread."""
        if self._hop is None:
            callback()
        else:
            self._hop.give_up()
            self._hop.outcome.add_done_callback(lambda _: callback())

    async def until_ready(self, *sockets: socket.socket, events: int, seconds: float = math.inf) -> bool:
        """Wait in the loop until one of the sockets is ready for one of the events; False if none is in time.

        Args:
            sockets: What to watch.
            events: READ, WRITE, or their sum.
            seconds: How long to wait at most; the deadline holds in any case.
        """
        if is_ready(sockets, events):
            return True  # as after a crossing with others; to have the loop watch costs several times as much
        loop = asyncio.get_running_loop()
        filenos = [sock.fileno() for sock in sockets]
        ready: asyncio.Future[bool] = loop.create_future()

        def wake(is_in_time: bool) -> None:  # noqa: FBT001  # event loops pass arguments by position
            if not ready.done():  # a watcher calls again and again, until it is removed
                ready.set_result(is_in_time)

        timer = loop.call_later(min(seconds, self.remaining()), wake, False)
        unwatch: list[Callable[[], object]] = [timer.cancel]
        try:
            for fileno in filenos:
                if events & READ:
                    loop.add_reader(fileno, wake, True)
                    unwatch.append(functools.partial(loop.remove_reader, fileno))
                if events & WRITE:
                    loop.add_writer(fileno, wake, True)
                    unwatch.append(functools.partial(loop.remove_writer, fileno))
            is_in_time = await ready
        except NotImplementedError:  # Windows' proactor loop watches no sockets
            return await self._until_ready_in_threads(sockets, events, seconds)
        finally:
            for undo in unwatch:
                undo()
        return is_in_time or is_ready(sockets, events)

    async def _until_ready_in_threads(self, sockets: Iterable[socket.socket], events: int, seconds: float) -> bool:
        """Wait in threads, a slice of time in each: the one place where a thread waits for a peer."""
        give_up_at = min(time.monotonic() + seconds, self.deadline)
        while time.monotonic() < give_up_at:
            wait = min(SLICE, max(0.0, give_up_at - time.monotonic()))
            self._hop = hop = _Hop(functools.partial(is_ready, sockets, events, wait))
            if await _alone(hop):
                return True
        return is_ready(sockets, events)


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread that it has to itself; one that has begun goes on where its caller is cancelled."""
    return await _alone(_Hop(function))


async def _alone(hop: _Hop[T], timeout: float | None = None) -> T:
    _cross([hop])
    try:
        await asyncio.wait({hop.landed}, timeout=timeout)
        if not hop.outcome.done():
            raise TimeoutError("timed out")
        return hop.outcome.result()
    finally:
        hop.give_up()


class _Hop(Generic[T]):
    """A function on its way into a thread and back, in the context (``contextvars``) of its own request."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the loop knows that it has ended; a cancelled request cancels it."""
        self.outcome: Future[T] = Future()
        """What became of it: a result, an exception, or cancelled if it was given up."""
        self.is_alone = True
        """Whether it crosses without others, which would wait for its thread."""
        self._function = function
        self._context = contextvars.copy_context()
        self._claim = threading.Lock()  # taken once, and never given back

    @property
    def is_claimed(self) -> bool:
        """Whether it has begun, or never will."""
        return self._claim.locked()

    def work(self) -> None:
        """Do it, unless it was given up, or somebody else was first."""
        if self._claim.acquire(blocking=False):
            self.outcome.set_running_or_notify_cancel()
            try:
                result = self._context.run(self._function)
            except BaseException as exc:
                self.outcome.set_exception(exc)
            else:
                self.outcome.set_result(result)

    def give_up(self) -> bool:
        """See to it that it never begins; False if it is at work."""
        if self._claim.acquire(blocking=False):
            self.outcome.cancel()
        return self.outcome.done()

    def land(self) -> None:
        """Wake who waits for it."""
        _wake(self.landed)

    def land_when_ended(self) -> None:
        """Wake who waits for it as soon as it has ended, though its thread goes on."""
        loop = asyncio.get_running_loop()
        landed = self.landed  # the hop itself has the outcome, which keeps its callbacks: that would be a cycle

        def tell(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, landed)

        self.outcome.add_done_callback(tell)

    async def until_ended(self) -> None:
        """Wait for its end after a cancellation."""
        self.landed = asyncio.get_running_loop().create_future()
        self.land_when_ended()
        await self.landed


def _wake(landed: asyncio.Future[None]) -> None:
    if not landed.done():
        landed.set_result(None)


class _Ferry:
    """Takes the hops of one event loop into threads: all that are wanted at the same moment cross together."""

    def __init__(self) -> None:
        self._aboard: list[_Hop[Any]] = []
        self._will_depart = False  # when the loop comes to it, or several that are on their way are back or late

    def board(self, hop: _Hop[Any]) -> None:
        self._aboard.append(hop)
        if not self._will_depart:
            self._will_depart = True
            asyncio.get_running_loop().call_soon(self._depart)  # when all who come at this moment are aboard

    def _depart(self) -> None:
        hops, self._aboard = self._aboard, []
        self._will_depart = len(hops) > 1
        if self._will_depart:
            back_or_late = asyncio.wait({_cross(hops)}, timeout=LATE)
            asyncio.ensure_future(back_or_late).add_done_callback(functools.partial(self._return, hops))
        elif hops:
            _cross(hops)

    def _return(self, hops: list[_Hop[Any]], _: object) -> None:
        """Land those that are done; if one takes long, have those behind it cross again, in another thread."""
        for hop in hops:
            if hop.outcome.done():
                hop.land()
        if any(hop.is_claimed for hop in hops):  # or else they wait for a thread, as another crossing would
            self._aboard += [hop for hop in hops if not hop.is_claimed]
        self._depart()


_ferries: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Ferry]] = weakref.WeakKeyDictionary()
"""Weak on both sides: a loop has its ferry among its callbacks while there are hops aboard, and hops hold their loop. A
ferry kept here would keep a loop that was thrown away, and with it its requests, their rooms and their connections."""


def _ferry() -> _Ferry:
    """Return the running loop's ferry."""
    loop = asyncio.get_running_loop()
    known = _ferries.get(loop)
    ferry = None if known is None else known()
    if ferry is None:
        ferry = _Ferry()
        _ferries[loop] = weakref.ref(ferry)
    return ferry


def _cross(hops: list[_Hop[Any]]) -> asyncio.Task[None]:
    """Have a thread do these hops, one after the other; what it does not begin in time, the loop does."""

    def trip() -> None:
        for hop in hops:
            hop.work()

    def finish() -> None:
        trip()  # what no thread has begun
        for hop in hops:
            if hop.outcome.done():
                hop.land()
            else:
                hop.land_when_ended()

    def back(crossing: asyncio.Task[None]) -> None:
        timer.cancel()
        if not crossing.cancelled():
            crossing.exception()  # the executor takes no more work, say; asyncio logs what nobody asks for
        finish()

    for hop in hops:
        hop.is_alone = len(hops) == 1
    timer = asyncio.get_running_loop().call_later(WITHOUT_THREAD, finish)
    crossing = asyncio.ensure_future(asyncio.to_thread(trip))
    crossing.add_done_callback(back)
    return crossing


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
