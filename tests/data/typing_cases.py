"""What a type checker infers for the public calls; never imported, only checked (tests/test_typing.py).

``assert_type`` fails where another type is inferred. A ``type: ignore`` with its code says that the line must be
refused: strict mode reports those that are not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, RootModel, TypeAdapter

from zamp_sdk import (
    ActionExecutor,
    ActionFailedError,
    ActionHandle,
    ActionStatus,
    ActionTimeoutError,
    HttpClientError,
    RetryPolicy,
    SdkConfig,
    ZampError,
)
from zamp_sdk.action_executor.utils import HttpClientError as DocumentedHttpClientError
from zamp_sdk.local_platform import LocalPlatform

if TYPE_CHECKING:
    from typing_extensions import assert_type  # comes with the checker; in typing from Python 3.11 on


class Invoice(BaseModel):
    total: int


class Receipt(Invoice):
    pass


class Untyped:
    """An own class with the method, without annotations as in many programs."""

    @classmethod
    def model_validate(cls, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN206  # that is the case
        return cls()


class Own:
    total = 1

    @classmethod
    def model_validate(cls, obj: Any, *, strict: bool = False) -> Own:
        return cls()


class Other:
    """Its method makes something else."""

    @classmethod
    def model_validate(cls, obj: Any) -> int:
        return 1


@dataclass
class Plain:
    total: int


async def execute(return_type: type[Invoice] | None) -> None:
    """`execute` gives what return_type says where that has a model_validate, and else Any."""
    assert_type(await ActionExecutor.execute("a", {}), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=None), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=Invoice), Invoice)
    assert_type(await ActionExecutor.execute("a", {}, return_type=Untyped), Untyped)
    assert_type(await ActionExecutor.execute("a", {}, return_type=Own), Own)
    assert_type(await ActionExecutor.execute("a", {}, return_type=RootModel[list[Invoice]]), RootModel[list[Invoice]])
    assert_type(await ActionExecutor.execute("a", {}, return_type=Other), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=Plain), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=int), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=dict[str, int]), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=list[Invoice]), Any)
    assert_type(await ActionExecutor.execute("a", {}, return_type=TypeAdapter(list[Invoice])), Any)
    assert_type(
        await ActionExecutor.execute(
            "a",
            Plain(1),
            base_url="https://example.com",
            auth_token="t",
            summary="s",
            return_type=Invoice,
            action_retry_policy=RetryPolicy.default(),
            action_start_to_close_timeout=timedelta(minutes=1),
        ),
        Invoice,
    )
    ActionExecutor.execute("a", {})  # type: ignore[unused-coroutine]  # not awaited
    await ActionExecutor.execute("a")  # type: ignore[call-overload]  # no params
    await ActionExecutor.execute("a", {}, "https://example.com")  # type: ignore[call-overload]  # not by keyword
    await ActionExecutor.execute("a", {}, timeout=timedelta(1))  # type: ignore[call-overload]  # that is result's
    await ActionExecutor.execute("a", {}, action_start_to_close_timeout=60)  # type: ignore[call-overload]  # no unit
    await ActionExecutor.execute("a", {}, return_type=return_type)


async def start() -> None:
    """`start` gives a handle of what return_type says, or of Any."""
    assert_type(await ActionExecutor.start("a", {}), ActionHandle[Any])
    assert_type(await ActionExecutor.start("a", {}, return_type=None), ActionHandle[Any])
    assert_type(await ActionExecutor.start("a", {}, return_type=Plain), ActionHandle[Any])
    handle = await ActionExecutor.start("a", {}, return_type=Invoice, action_retry_policy=RetryPolicy.default())
    assert_type(handle, ActionHandle[Invoice])
    assert_type(handle.id, str)
    assert_type(await handle.status(), ActionStatus)
    assert_type(await handle.result(), Invoice)
    assert_type(await handle.result(timedelta(seconds=1)), Invoice)
    assert_type(await handle.result(timeout=None), Invoice)
    assert_type((await handle.result()).total, int)
    await handle.result(timeout=5)  # type: ignore[arg-type]  # no unit
    handle.id = "b"  # type: ignore[misc]  # read-only


async def get_handle() -> None:
    """`get_handle` is a plain call, typed like `start`."""
    assert_type(ActionExecutor.get_handle("id"), ActionHandle[Any])
    assert_type(ActionExecutor.get_handle("id", return_type=None), ActionHandle[Any])
    assert_type(ActionExecutor.get_handle("id", return_type=Invoice), ActionHandle[Invoice])
    assert_type(ActionExecutor.get_handle("id", return_type=list[Invoice]), ActionHandle[Any])
    assert_type(await ActionExecutor.get_handle("id").result(), Any)
    assert_type(
        await ActionExecutor.get_handle("id", base_url="b", auth_token="t", return_type=Invoice).result(), Invoice
    )
    await ActionExecutor.get_handle("id")  # type: ignore[misc]  # sends nothing, so there is nothing to await


def covariance(receipt: ActionHandle[Receipt], invoice: ActionHandle[Invoice]) -> ActionHandle[Invoice]:
    """The handle of a more special model is one of the more general model, and not the other way round."""
    models: list[ActionHandle[BaseModel]] = [receipt, invoice]
    back: ActionHandle[Receipt] = invoice  # type: ignore[assignment]  # an invoice need not be a receipt
    del models, back
    return receipt


def values(policy: RetryPolicy, config: SdkConfig) -> None:
    """Durations are timedeltas, and the values are frozen."""
    assert_type(RetryPolicy.default(), RetryPolicy)
    assert_type(policy.initial_interval, timedelta)
    assert_type(policy.maximum_attempts, int)
    assert_type(policy.maximum_interval, timedelta)
    assert_type(policy.backoff_coefficient, float)
    assert_type(config.base_url, str)
    policy.maximum_attempts = 3  # type: ignore[misc]  # frozen
    RetryPolicy(30, 11, 900, 1.5)  # type: ignore[arg-type]  # durations are timedeltas


def errors(http: HttpClientError, failed: ActionFailedError, late: ActionTimeoutError) -> None:
    """Errors have typed attributes, and each is also of the built-in kind that it stands for."""
    assert_type(http.message, str)
    assert_type(http.status_code, "int | None")
    assert_type(http.response_body, "str | None")
    assert_type(http.headers, dict[str, str])
    assert_type(http.action_id, "str | None")
    assert_type(http.may_have_started, bool)
    assert_type((failed.action_id, failed.status, failed.error), tuple[str, str, Any])
    assert_type((late.action_id, late.status, late.waited), tuple[str, str, float])
    documented: type[HttpClientError] = DocumentedHttpClientError
    every: tuple[ZampError, ...] = (http, failed, late, documented("m"))
    runtime: RuntimeError = failed
    timeout: TimeoutError = late
    del every, runtime, timeout


async def local_platform() -> None:
    """The decorators leave a function's type as it is."""
    platform = LocalPlatform()

    @platform.action
    def double(params: int) -> int:
        return params * 2

    @platform.action("named")
    async def triple(params: int) -> int:
        return params * 3

    with platform as running:
        assert_type(running, LocalPlatform)
        assert_type(double(1), int)
        assert_type(await triple(1), int)
