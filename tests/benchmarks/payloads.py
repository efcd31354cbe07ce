"""Five megabytes of rows as params: what their encoding costs beside `json.dumps`, and how long it holds the loop."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import Awaitable
from datetime import date
from decimal import Decimal
from typing import Any, Callable

from zamp_sdk import ActionExecutor
from zamp_sdk.action_executor.params import start_call

ROWS = 40_000
TICK = 0.001  # s between two looks at the clock: as long as a hold has to be to matter


def plain_rows() -> list[dict[str, Any]]:
    """Rows of what JSON has, as a query or a CSV file gives them: about 5 MB as JSON."""
    return [
        {
            "id": number,
            "name": f"Invoice number {number}",
            "customer": "Müller & Söhne",
            "total": number * 1.25,
            "is_paid": number % 2 == 0,
            "note": None,
            "region": "EMEA",
            "currency": "EUR",
        }
        for number in range(ROWS)
    ]


def mixed_rows() -> list[dict[str, Any]]:
    """The same rows with a UUID, a date and a Decimal in each, which JSON does not know."""
    return [
        {**row, "id": uuid.UUID(int=number), "due": date(2026, 1, 2), "total": Decimal("1.25")}
        for number, row in enumerate(plain_rows())
    ]


@dataclasses.dataclass
class Row:
    """What a row is in a program of some size."""

    id: int
    name: str
    customer: str
    total: float
    is_paid: bool
    note: str | None
    region: str
    currency: str


def dataclass_rows() -> list[Row]:
    """The same rows as objects."""
    return [Row(**row) for row in plain_rows()]


def dumps(rows: Any) -> str:
    """Write rows with the least that json.dumps has to be told for them."""
    return json.dumps(rows, default=_known)


def _known(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)


def body(params: Any) -> bytes:
    """The body of a start with these params, as the SDK writes it."""
    request = start_call(
        "benchmark",
        params,
        summary=None,
        retry_policy=None,
        start_to_close_timeout=None,
        idempotency_key="benchmark",
    )
    assert request.body is not None
    return request.body


def seconds(encode: Callable[[Any], object], params: Any) -> float:
    """How long it takes to encode these params."""
    started = time.perf_counter()
    encode(params)
    return time.perf_counter() - started


async def longest_hold(working: Awaitable[object]) -> float:
    """The longest time that the event loop could do nothing else while this was awaited."""
    longest = 0.0

    async def look_at_the_clock() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK)
            longest = max(longest, time.perf_counter() - before - TICK)

    looking = asyncio.ensure_future(look_at_the_clock())
    await asyncio.sleep(10 * TICK)
    await working
    await asyncio.sleep(10 * TICK)
    looking.cancel()
    return longest


async def dumps_in_the_loop(params: Any) -> None:
    """Do what the SDK must not do, for comparison."""
    dumps(params)


async def hold_of_a_start(url: str, params: Any) -> float:
    """How long a start of an action with these params holds the event loop, once connections are open."""

    async def start(params: Any) -> None:
        await ActionExecutor.start("benchmark", params, base_url=url, auth_token="benchmark-token")

    await start({"seconds": 0})
    return await longest_hold(start({"seconds": 0, "rows": params}))
