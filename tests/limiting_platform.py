"""A real platform on loopback that limits how fast it is asked, in any of the ways that are simulated."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from tests.pacing_simulation import Platform
from tests.servers import PATIENCE, http_reply


class LimitingPlatform:
    """A platform whose limit is one of the simulation's; it counts what it takes and what it refuses.

    It runs in a thread and an event loop of its own, so that it answers whatever the test does to its own loop.
    """

    def __init__(
        self,
        *phases: dict[str, Any],
        retry_after: float | str | None = None,
        refusal: int = 429,
        reply: tuple[float, float] = (0.0, 0.0),
        seconds: float = 0.2,
    ) -> None:
        self.limit = Platform(list(phases), retry_after, reply)
        self.refusal = refusal
        self.seconds = seconds  # that an action takes
        self.starts: Counter[Any] = Counter()  # by params
        self.taken = self.refused = 0
        self.url = ""
        self._ends_at: dict[str, float] = {}
        self._began = 0.0  # at the first request, for a phase begins with it
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="platform", daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> LimitingPlatform:  # noqa: PYI034  # typing.Self came with 3.11
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    async def _listen(self) -> asyncio.AbstractServer:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            while True:
                line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = line.split(" ")
                writer.write(await self._answer(method, target, body))
        writer.close()
        self._tasks.discard(task)

    async def _answer(self, method: str, target: str, body: bytes) -> bytes:
        self._began = self._began or time.monotonic()
        now = time.monotonic() - self._began
        if not self.limit.takes(now, is_start=method == "POST"):
            self.refused += 1
            seconds = self.limit.told_to_wait(now)
            return http_reply(self.refusal, headers={} if seconds is None else {"Retry-After": f"{seconds:g}"})
        self.taken += 1
        await asyncio.sleep(self.limit.reply[0])
        self.limit.in_flight -= 1
        if method == "POST":
            number = json.loads(body)["params"]
            self.starts[number] += 1
            self._ends_at[str(number)] = time.monotonic() + self.seconds
            return http_reply(200, {"id": str(number)})
        action_id = target.rpartition("/")[2]
        if time.monotonic() < self._ends_at.get(action_id, 0.0):
            return http_reply(200, {"id": action_id, "status": "RUNNING"})
        return http_reply(200, {"id": action_id, "status": "COMPLETED", "result": f"result of {action_id}"})
