"""Beside real pydantic 2: models as parameters and results, and durations as the platform reads them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, Generic, Optional, TypeVar
from uuid import UUID

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError, field_serializer

from tests.servers import ACTION_ID, TOKEN, Server, reply
from zamp_sdk import ActionExecutor, RetryPolicy
from zamp_sdk.action_executor.params import iso8601_duration

T = TypeVar("T")
DURATION = TypeAdapter(timedelta)
ROWS = 20_000


class Colour(Enum):
    RED = "red"


class Line(BaseModel):
    price: Decimal
    count: int = 1
    waits: timedelta = timedelta(seconds=90)


class Invoice(BaseModel):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    invoice_id: UUID = Field(alias="invoiceId")
    due: datetime
    day: date
    at: time
    colour: Colour
    lines: list[Line]
    note: str = ""
    secret: bytes = b"\xff\x00"

    @field_serializer("secret", when_used="json")
    def hide_secret(self, secret: bytes) -> str:
        return secret.hex()


INVOICE = Invoice(
    invoiceId=UUID(int=7),
    due=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc),
    day=date(2026, 1, 2),
    at=time(3, 4, 5),
    colour=Colour.RED,
    lines=[
        Line(price=Decimal("12.30")),
        Line(price=Decimal("1E+3"), count=2, waits=timedelta(days=400, microseconds=1)),
    ],
)


class Policy(BaseModel):
    """A retry policy as the platform reads it, strictly."""

    model_config = ConfigDict(extra="forbid")

    initial_interval: timedelta
    maximum_interval: timedelta
    maximum_attempts: int
    backoff_coefficient: float


class Start(BaseModel):
    """A start as the platform reads it."""

    model_config = ConfigDict(extra="forbid")

    action_name: str
    params: Any
    is_external_action: bool
    summary: str = ""
    retry_policy: Optional[Policy] = None  # pydantic evaluates it, and Python 3.9 has no other
    start_to_close_timeout_seconds: float = 0


@pytest.fixture
def platform() -> Iterator[Server]:
    """A platform that follows a script."""
    with Server() as server:
        yield server


async def execute(platform: Server, params: Any = None, *, result: Any = None, **options: Any) -> Any:
    """Execute an action that has this result."""
    platform.on("GET", reply(200, {"status": "COMPLETED", "result": result}))
    return await ActionExecutor.execute("an_action", params, base_url=platform.url, auth_token=TOKEN, **options)


def sent(platform: Server) -> Start:
    """Return the start that has arrived."""
    return Start.model_validate_json(platform.requests[0].body)


# --- parameters -------------------------------------------------------------------------------------------------------


async def test_a_model_is_sent_as_pydantic_writes_it(platform: Server) -> None:
    """A model goes out as its own JSON mode has it, custom serialisers included."""
    await execute(platform, INVOICE)
    assert sent(platform).params == INVOICE.model_dump(mode="json")


async def test_models_are_found_wherever_they_stand(platform: Server) -> None:
    """Models inside lists, tuples and dicts go out like models at the top."""
    await execute(platform, {"invoices": [INVOICE], "more": {"pair": (INVOICE, 1)}})
    plain = INVOICE.model_dump(mode="json")
    assert sent(platform).params == {"invoices": [plain], "more": {"pair": [plain, 1]}}


async def test_a_root_model_is_sent_as_what_it_holds(platform: Server) -> None:
    """A RootModel of a list is a list."""
    await execute(platform, RootModel[list[int]]([1, 2]))
    assert sent(platform).params == [1, 2]


async def test_a_pydantic_dataclass_is_sent_as_an_object(platform: Server) -> None:
    """A dataclass of pydantic's, which has no model_dump, is sent like any other dataclass."""

    @pydantic.dataclasses.dataclass
    class Point:
        x: int
        when: date

    await execute(platform, Point(x=1, when=date(2026, 1, 2)))
    assert sent(platform).params == {"x": 1, "when": "2026-01-02"}


async def test_plain_values_are_read_back_as_they_were(platform: Server) -> None:
    """What is sent without a model, dates and decimals and all, a model on the platform reads as the same values."""
    await execute(platform, {**dict(INVOICE), "secret": "ff00"})  # bytes alone cannot be sent
    body = sent(platform).params
    assert Invoice.model_validate({**body, "secret": b"\xff\x00"}) == INVOICE


# --- results ----------------------------------------------------------------------------------------------------------


class Page(BaseModel, Generic[T]):
    items: list[T]


OPEN_INVOICE = INVOICE.model_copy(update={"secret": b"s"})


@pytest.mark.parametrize(
    ("return_type", "result", "expected"),
    [
        (Line, {"price": "1.50"}, Line(price=Decimal("1.50"))),
        (Invoice, {**INVOICE.model_dump(mode="json", by_alias=True), "secret": "s"}, OPEN_INVOICE),
        (Page[Line], {"items": [{"price": "2"}]}, Page[Line](items=[Line(price=Decimal(2))])),
        (RootModel[list[int]], [1, "2"], RootModel[list[int]]([1, 2])),
    ],
    ids=["model", "alias", "generic", "root"],
)
async def test_a_result_becomes_what_return_type_says(
    platform: Server, return_type: type, result: Any, expected: Any
) -> None:
    """A model as return_type makes the result one of its instances, and a type checker knows."""
    validated = await execute(platform, result=result, return_type=return_type)
    assert type(validated) is return_type
    assert validated == expected


async def test_a_result_of_another_shape_is_pydantics_own_error(platform: Server) -> None:
    """What a model refuses raises pydantic's ValidationError, with a note that the action did complete."""
    with pytest.raises(ValidationError) as caught:
        await execute(platform, result={"price": "none"}, return_type=Line)
    assert caught.value.errors()[0]["loc"] == ("price",)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert ACTION_ID in note
        assert "did complete" in note


# --- durations --------------------------------------------------------------------------------------------------------


def random_duration(rng: random.Random) -> timedelta:
    """A duration of any magnitude, from a microsecond to 2,700 years, often with round parts."""
    microseconds = rng.randrange(10 ** rng.randint(1, 17))
    for unit in (1_000, 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000):
        if rng.random() < 0.2:
            microseconds -= microseconds % unit
    return timedelta(microseconds=microseconds)


def test_pydantic_reads_back_every_duration() -> None:
    """20,000 random durations, positive and negative, survive the way through ISO 8601 to the microsecond."""
    rng = random.Random(20260102)
    for _ in range(ROWS):
        duration = random_duration(rng)
        for value in (duration, -duration):
            text = iso8601_duration(value)
            assert DURATION.validate_python(text) == value, text
            assert DURATION.validate_json(json.dumps(text)) == value, text


def test_pydantic_writes_durations_under_a_year_the_same() -> None:
    """Where pydantic needs no years, which have no fixed length, both write the same text."""
    rng = random.Random(20260103)
    for _ in range(ROWS):
        duration = random_duration(rng) % timedelta(days=365)
        assert iso8601_duration(duration) == DURATION.dump_python(duration, mode="json")


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy.default(),
        RetryPolicy(
            initial_interval=timedelta(0),
            maximum_attempts=0,
            maximum_interval=timedelta(0),
            backoff_coefficient=1,
        ),
        RetryPolicy(
            initial_interval=timedelta(days=1, hours=1, minutes=1, seconds=2.5),
            maximum_attempts=2**31,
            maximum_interval=timedelta(days=4_000, microseconds=1),
            backoff_coefficient=1.1,
        ),
    ],
    ids=["default", "smallest", "large"],
)
async def test_the_platform_reads_the_retry_policy_that_was_meant(platform: Server, policy: RetryPolicy) -> None:
    """Each field of a policy arrives as a value that equals the one that was given."""
    await execute(platform, action_retry_policy=policy)
    received = sent(platform).retry_policy
    assert received is not None
    assert received.model_dump() == vars(policy)


async def test_random_retry_policies_are_read_as_they_were_meant(platform: Server) -> None:
    """So do 200 random ones, over the wire."""
    rng = random.Random(20260104)
    for _ in range(200):
        shorter, longer = sorted((random_duration(rng), random_duration(rng)))
        policy = RetryPolicy(
            initial_interval=shorter,
            maximum_attempts=rng.randrange(1000),
            maximum_interval=longer,
            backoff_coefficient=1 + rng.random() * 10,
        )
        platform.requests.clear()
        await execute(platform, action_retry_policy=policy, action_start_to_close_timeout=longer + timedelta(seconds=1))
        start = sent(platform)
        assert start.retry_policy is not None
        assert start.retry_policy.model_dump() == vars(policy)
        assert start.start_to_close_timeout_seconds == (longer + timedelta(seconds=1)).total_seconds()
