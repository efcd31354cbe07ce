"""The command line: arguments in, an exit code out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import io
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

from . import (
    ActionExecutor,
    ActionFailedError,
    ActionHandle,
    ActionTimeoutError,
    HttpClientError,
    RetryPolicy,
    ZampError,
    __version__,
)
from .action_executor.executor import INTERRUPTED
from .action_executor.lifecycle import Send, Sleep

if TYPE_CHECKING:
    from .local_platform import LocalPlatform

UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # s
WIPE = "\r\x1b[K"  # what takes the progress line off a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the process began
            setattr(sys, name, io.StringIO())
    logging.basicConfig(format="zamp-sdk: %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ZampError, ValueError, TypeError, OSError, RuntimeError) as exc:
        _tell(f"zamp-sdk: {exc}")
        if isinstance(exc, ActionFailedError):
            return 1
        if isinstance(exc, (HttpClientError, ActionTimeoutError)):
            if exc.action_id:
                _tell_how_to_collect(exc.action_id)
            return 3 if isinstance(exc, HttpClientError) else 4
        return 2
    return 0


def _tell(text: str) -> None:
    print(f"{WIPE if sys.stderr.isatty() else ''}{text}", file=sys.stderr)


def _tell_how_to_collect(action_id: str) -> None:
    _tell(f"Action {action_id} goes on. To collect its result: python -m {__package__} result {action_id}")


def _print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zamp-sdk",
        description="Run actions on the Zamp platform.",
        epilog="Exit codes: 0 done, 1 action failed, 2 usage or configuration, 3 HTTP, 4 the wait is over, 130 Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"zamp-sdk {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, example: str = "") -> Callable[..., argparse.Action]:
        added = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n  python -m {__package__} {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added.add_argument

    invoice = """send_invoice '{"invoice_id": "inv_123"}'"""
    execute = command("execute", _execute, "Run an action and print its result.", f"{invoice} --timeout 10m")
    start = command("start", _start, "Start an action and print its id.", invoice)
    status = command("status", _status, "Print the status of an action.", "act_123")
    result = command("result", _result, "Wait for an action and print its result.", "act_123 --timeout 1h")
    serve = command("serve", _serve, "Run the local platform until Ctrl-C.", "my_tests.actions:platform")
    command("demo", _demo, "See three actions run, without an account or a network.")

    for add in (execute, start):
        add("action", metavar="ACTION", help="the action's name")
        add("params", metavar="PARAMS", nargs="?", default="{}", help="JSON, @FILE, or - for stdin (default: {})")
        add("--summary", help="what the platform shows people about this run")
        add("--start-to-close", metavar="DURATION", type=_duration, help="the limit of one attempt")
        add("--initial-interval", metavar="DURATION", type=_duration, help="the wait before the second attempt (30s)")
        add("--maximum-attempts", metavar="N", type=int, help="attempts in all, 0 for no limit (11)")
        add("--maximum-interval", metavar="DURATION", type=_duration, help="no wait is longer than this (15m)")
        add("--backoff-coefficient", metavar="X", type=float, help="each wait is X times the one before (1.5)")
    for add in (status, result):
        add("id", metavar="ID", help="the action's id")
    for add in (execute, result):
        add("--timeout", metavar="DURATION", type=_duration, help="how long to wait: 30, 500ms, 10m, 1h")
    for add in (execute, start, status, result):
        add("--base-url", metavar="URL", help="the platform (default: ZAMP_BASE_URL)")
        add("--auth-token-file", metavar="FILE", help="where the token is (default: ZAMP_AUTH_TOKEN)")
    serve("platform", metavar="MODULE:NAME", nargs="?", help="your LocalPlatform (default: the demo's)")
    return parser


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r} (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    try:
        return timedelta(seconds=float(match[1]) * UNITS[match[2]])
    except OverflowError:
        raise argparse.ArgumentTypeError(f"too long a duration: {text!r}") from None


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None


def _params(text: str) -> Any:
    if text == "-":
        source, text = "stdin", sys.stdin.read()
    elif text.startswith("@"):
        source, text = text[1:], _read(text[1:])
    else:
        source = "PARAMS"
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{source} is not JSON: {exc}") from None


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    file = arguments.auth_token_file
    token = None if file is None else _read(file).strip()
    if token == "":
        raise ValueError(f"{file} holds no token")
    return {"base_url": arguments.base_url, "auth_token": token}


def _policy(arguments: argparse.Namespace) -> RetryPolicy | None:
    fields = (field.name for field in dataclasses.fields(RetryPolicy))
    given = {name: getattr(arguments, name) for name in fields if getattr(arguments, name) is not None}
    return dataclasses.replace(RetryPolicy.default(), **given) if given else None


async def _started(arguments: argparse.Namespace) -> ActionHandle[Any]:
    try:
        return await ActionExecutor.start(
            arguments.action,
            _params(arguments.params),
            summary=arguments.summary,
            action_retry_policy=_policy(arguments),
            action_start_to_close_timeout=arguments.start_to_close,
            **_target(arguments),
        )
    except INTERRUPTED:
        _tell("Interrupted while starting the action: it may have started all the same.")
        raise


async def _awaited(handle: ActionHandle[Any], timeout: timedelta | None) -> Any:
    """Wait for the result, with a progress line if somebody watches."""
    status, began = "RUNNING", time.monotonic()
    next_poll = began

    def observe(step: Send | Sleep) -> None:
        nonlocal status, next_poll
        if isinstance(step, Sleep):
            status, next_poll = step.failure or "RUNNING", time.monotonic() + step.seconds

    async def draw() -> None:
        try:
            while True:
                await asyncio.sleep(0.1)
                now = time.monotonic()
                text = f"{status[:60]}  {now - began:.1f} s, next poll in {max(0, next_poll - now):.1f} s"
                print(f"{WIPE}{text}", end="", file=sys.stderr, flush=True)
        finally:
            print(WIPE, end="", file=sys.stderr, flush=True)

    progress = asyncio.ensure_future(draw()) if sys.stderr.isatty() else None
    try:
        return await handle._wait(timeout, observe)
    except INTERRUPTED:
        _tell_how_to_collect(handle.id)
        raise
    finally:
        if progress:
            progress.cancel()


def _execute(arguments: argparse.Namespace) -> None:
    async def run() -> Any:
        return await _awaited(await _started(arguments), arguments.timeout)

    _print_json(asyncio.run(run()))


def _start(arguments: argparse.Namespace) -> None:
    print(asyncio.run(_started(arguments)).id)


def _status(arguments: argparse.Namespace) -> None:
    print(asyncio.run(ActionExecutor.get_handle(arguments.id, **_target(arguments)).status()))


def _result(arguments: argparse.Namespace) -> None:
    handle = ActionExecutor.get_handle(arguments.id, **_target(arguments))
    _print_json(asyncio.run(_awaited(handle, arguments.timeout)))


def _serve(arguments: argparse.Namespace) -> None:
    platform = _load(arguments.platform) if arguments.platform else _demo_platform()
    with platform:
        _tell(f"Serving {', '.join(platform.action_names)}; Ctrl-C ends it.")
        print(f"export ZAMP_BASE_URL={platform.base_url} ZAMP_AUTH_TOKEN={platform.auth_token}", flush=True)
        threading.Event().wait()


def _load(place: str) -> LocalPlatform:
    from .local_platform import LocalPlatform

    module, _, name = place.partition(":")
    sys.path.insert(0, "")
    try:
        platform = getattr(importlib.import_module(module), name)
    except Exception as exc:  # noqa: BLE001  # whatever the user's module raises
        raise ValueError(f"cannot load {place!r} (write MODULE:NAME): {type(exc).__name__}: {exc}") from None
    if not isinstance(platform, LocalPlatform):
        raise TypeError(f"{place} must be a LocalPlatform, not {type(platform).__name__}")
    return platform


def _demo_platform() -> LocalPlatform:
    from .local_platform import LocalPlatform

    platform = LocalPlatform(time_scale=0.01)
    attempts = itertools.count(1)

    @platform.action
    async def send_invoice(params: Any) -> Any:
        await asyncio.sleep(0.3)
        return {"sent": True, **params}

    @platform.action
    def fetch_report(_: Any) -> Any:
        if next(attempts) % 3:
            raise ConnectionError("the archive is busy")
        return {"pages": 12, "attempts": 3}

    @platform.action
    def charge_card(_: Any) -> Any:
        raise ValueError("the card has expired")

    return platform


def _demo(_: argparse.Namespace) -> None:
    with _demo_platform() as platform:
        print(f"The local platform listens on {platform.base_url}; nothing leaves this machine.")
        asyncio.run(_demonstrate(platform))


async def _demonstrate(platform: LocalPlatform) -> None:
    calls: tuple[tuple[str, Any, RetryPolicy | None], ...] = (
        ("send_invoice", {"invoice_id": "inv_123"}, None),
        ("fetch_report", {"month": "2026-10"}, RetryPolicy.default()),
        ("charge_card", {"card": "4111"}, None),
    )
    for name, params, policy in calls:
        more = ", action_retry_policy=RetryPolicy.default()" if policy else ""
        print(f'\n>>> await ActionExecutor.execute("{name}", {json.dumps(params)}{more})')
        began = time.monotonic()

        def observe(step: Send | Sleep, began: float = began) -> None:
            if isinstance(step, Sleep):
                print(f"    {time.monotonic() - began:.1f} s  RUNNING")

        handle = await ActionExecutor.start(
            name, params, action_retry_policy=policy, base_url=platform.base_url, auth_token=platform.auth_token
        )
        try:
            status, result = "COMPLETED", json.dumps(await handle._wait(None, observe))
        except ActionFailedError as exc:
            status, result = exc.status, f"{type(exc).__name__}: {exc}"
        print(f"    {time.monotonic() - began:.1f} s  {status}\n{result}")
