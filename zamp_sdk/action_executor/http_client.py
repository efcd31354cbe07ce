"""Sending one request from an event loop: ``urllib.request`` inside ``asyncio.to_thread``, without retrying.

*send* in a thread, *wait* in the event loop, so that no thread waits for the network, and *receive* in a thread. What
the threads do lives in ``exchange``, which the first request imports.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING

from .redaction import Redactor
from .wire import Answer, Failure, Reply, Request

if TYPE_CHECKING:
    from .exchange import Exchange
    from .models import SdkConfig

__version__ = "1.1.0"  # of the package; the User-Agent tells it

SLOTS = 64  # requests in flight per event loop
UNWIND = 1.0  # s for a thread to notice that it was cut off
SLOW_THREAD = 1.0  # s of waiting for a thread that a failure mentions
USER_AGENT = f"zamp-sdk/{__version__} Python/{sys.version_info[0]}.{sys.version_info[1]} {sys.platform}"

logger: logging.Logger = logging.getLogger("zamp_sdk")


class Progress:
    """How far a request has come, for whoever is interrupted while it is under way."""

    sent: bool = False
    """Whether a byte of the request may have left."""


async def send(config: SdkConfig, request: Request, timeout: float, progress: Progress | None = None) -> Answer:
    """Send a request; ``timeout`` is in seconds, and waiting for a slot does not count."""
    of_loop = vars(asyncio.get_running_loop())  # a mapping of ours would keep the loop: a semaphore knows it
    slots = of_loop.get(__name__)
    if slots is None:
        slots = of_loop[__name__] = asyncio.Semaphore(SLOTS)
    async with slots:
        call = _Call(config, request, timeout)
        began = time.monotonic()
        try:
            answer = await call.perform()
        finally:
            if progress is not None:
                progress.sent = call.lifeline.is_sent
    if isinstance(answer, Failure):
        redactor = Redactor(config.auth_token)
        echoes = redactor.text(str(answer.cause)) != str(answer.cause)
        cause = None if echoes else answer.cause
        answer = answer._replace(message=redactor.text(answer.message), cause=cause)
    if logger.isEnabledFor(logging.DEBUG):
        outcome = answer.status_code if isinstance(answer, Reply) else answer.message
        logger.debug("%s %s: %s, %.0f ms", request.method, call.url, outcome, (time.monotonic() - began) * 1000)
    return answer


class _Call:
    """One request on its way through the three phases."""

    def __init__(self, config: SdkConfig, request: Request, timeout: float) -> None:
        from .connections import Lifeline

        self.url = config.base_url + request.path
        self.request = request
        self.headers = {
            **request.headers,
            "Authorization": f"Bearer {config.auth_token}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": USER_AGENT,
        }
        self.timeout = timeout
        self.lifeline = Lifeline(time.monotonic() + timeout)
        self.exchange: Exchange | None = None
        self.queued_since: float | None = None
        self.queued = 0.0
        self.loop = asyncio.get_running_loop()
        self.awake: asyncio.Future[None] | None = None
        self.is_over = False

    async def perform(self) -> Answer:
        timer = self.loop.call_later(self.timeout, self._end)
        try:
            answer = await self._in_thread()
            while answer is None:
                answer = await self._in_thread() if await self._is_ready() else self._timed_out()
        except BaseException:  # cancelled: nobody will read an answer any more
            self._abandon()
            raise
        finally:
            timer.cancel()
        queued = self.queued if self.queued_since is None else time.monotonic() - self.queued_since
        if isinstance(answer, Failure) and queued > SLOW_THREAD:
            advice = "give the loop more with loop.set_default_executor(ThreadPoolExecutor(64))"
            answer = answer._replace(message=f"{answer.message}; it waited {queued:.1f} s for a thread: {advice}")
        return answer

    async def _in_thread(self) -> Answer | None:
        """Run a phase in a thread; at the deadline its socket is shut down under it."""
        self.queued_since = time.monotonic()
        thread = self.loop.create_task(asyncio.to_thread(self._advance))
        thread.add_done_callback(self._wake)
        try:
            await self._event()
            if not thread.done():  # the deadline
                self._abandon()
                if self.queued_since is None:
                    await asyncio.wait({thread}, timeout=UNWIND)
            return thread.result() if thread.done() else self._timed_out()
        except Exception as exc:  # "can't start new thread"
            self._abandon()  # for it may be queued all the same
            return Failure(f"no thread to send it from: {exc}", self.lifeline.is_sent, retryable=False, cause=exc)
        finally:
            thread.cancel()  # a phase that no thread has begun never begins

    def _advance(self) -> Answer | None:
        assert self.queued_since is not None
        self.queued += time.monotonic() - self.queued_since
        self.queued_since = None
        if self.exchange is None:
            early = None
            if f"{__package__}.exchange" not in sys.modules:  # dial meanwhile
                from .connections import head_start

                early = head_start(self.url, self.lifeline)
            from .exchange import Exchange

            self.exchange = Exchange(self.lifeline, self.url, self.request, self.headers, early)
        return self.exchange.proceed()

    async def _is_ready(self) -> bool:
        """Wait for what the exchange waits for; False at the deadline."""
        assert self.exchange is not None
        if self.is_over:  # the socket may be closed
            return False
        fileno, for_writing, until = self.exchange.waits_for
        loop = self.loop
        add, remove = (loop.add_writer, loop.remove_writer) if for_writing else (loop.add_reader, loop.remove_reader)
        try:
            if fileno is not None:
                add(fileno, self._wake)
        except NotImplementedError:  # Windows' proactor loop: the thread has to wait itself
            self.lifeline.patience = self.timeout
            return True
        timer = None if until is None else loop.call_later(until - time.monotonic(), self._wake)
        try:
            await self._event()
        finally:
            if fileno is not None:
                remove(fileno)
            if timer:
                timer.cancel()
        return not self.is_over

    async def _event(self) -> None:
        """Wait for what this phase waits for, or for the deadline."""
        if not self.is_over:
            self.awake = self.loop.create_future()
            await self.awake

    def _wake(self, _: object = None) -> None:
        if self.awake and not self.awake.done():  # a reader or writer is called again until it is removed
            self.awake.set_result(None)

    def _end(self) -> None:
        self.is_over = True
        self._wake()

    def _timed_out(self) -> Failure:
        self._abandon()
        message = f"timed out after {self.timeout:g} s"
        if self.exchange is not None and self.exchange.waits_for.fileno is None:
            message += ", while all connections were in use"
        return Failure(message, self.lifeline.is_sent, retryable=True)

    def _abandon(self) -> None:
        if self.lifeline.cut() and self.exchange is not None:
            self.exchange.discard()
