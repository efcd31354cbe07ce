"""The command line: arguments in, an exit code out. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 the action failed, 2 usage or configuration, 3 HTTP, 4 the wait was over, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
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
from typing import TYPE_CHECKING, Any, Sequence

from . import (
    ActionExecutor,
    ActionFailedError,
    ActionHandle,
    ActionTimeoutError,
    HttpClientError,
    RetryPolicy,
    __version__,
)
from .action_executor.lifecycle import Send, Sleep

if TYPE_CHECKING:
    from .local_platform import LocalPlatform

UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}  # s


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(format="zamp-sdk: %(message)s")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read stdout has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ActionFailedError as exc:
        return _fail(1, exc)
    except HttpClientError as exc:
        return _fail(3, exc)
    except ActionTimeoutError as exc:
        return _fail(4, exc)
    except (KeyError, ValueError, TypeError, OSError) as exc:
        return _fail(2, exc)
    return 0


def _fail(code: int, exc: BaseException) -> int:
    _tell(f"zamp-sdk: {exc}")
    action_id = getattr(exc, "action_id", None)
    if action_id and code != 1:
        _tell_how_to_collect(action_id)
    return code


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _tell_how_to_collect(action_id: str) -> None:
    _tell(f"Action {action_id} goes on. To collect its result: python -m {__package__} result {action_id}")


def _print_json(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="zamp-sdk",
        description="Run actions on the Zamp platform.",
        epilog="Exit codes: 0 done, 1 the action failed, 2 usage, 3 HTTP, 4 the wait was over, 130 Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"zamp-sdk {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    platform = argparse.ArgumentParser(add_help=False)
    platform.add_argument("--base-url", metavar="URL", help="the platform (default: ZAMP_BASE_URL)")
    platform.add_argument("--auth-token-file", metavar="FILE", help="where the token is (default: ZAMP_AUTH_TOKEN)")
    start = argparse.ArgumentParser(add_help=False)
    start.add_argument("action", metavar="ACTION", help="the action's name")
    start.add_argument(
        "params", metavar="PARAMS", nargs="?", default="{}", help="JSON, @FILE, or - for stdin (default: {})"
    )
    start.add_argument("--summary", help="what the platform shows people about this run")
    start.add_argument("--start-to-close", metavar="DURATION", type=_duration, help="the limit of one attempt")
    policy = start.add_argument_group("retry policy (what is not given is as in the default policy)")
    policy.add_argument("--initial-interval", metavar="DURATION", type=_duration)
    policy.add_argument("--maximum-attempts", metavar="N", type=int, help="0: no limit")
    policy.add_argument("--maximum-interval", metavar="DURATION", type=_duration)
    policy.add_argument("--backoff-coefficient", metavar="X", type=float)
    wait = argparse.ArgumentParser(add_help=False)
    wait.add_argument("--timeout", metavar="DURATION", type=_duration, help="how long to wait: 30, 500ms, 10m, 1h")
    by_id = argparse.ArgumentParser(add_help=False)
    by_id.add_argument("id", metavar="ID", help="the action's id")

    def add(
        name: str, run: Any, about: str, example: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n  python -m {__package__} {example}",
            formatter_class=raw,
            parents=parents,
        )
        command.set_defaults(run=run)
        return command

    invoice = """send_invoice '{"invoice_id": "inv_123"}'"""
    add(
        "execute",
        _execute,
        "Run an action and print its result.",
        f"execute {invoice} --timeout 10m",
        start,
        wait,
        platform,
    )
    add("start", _start, "Start an action and print its id.", f"start {invoice}", start, platform)
    add("status", _status, "Print the status of an action.", "status act_123", by_id, platform)
    add(
        "result",
        _result,
        "Wait for an action and print its result.",
        "result act_123 --timeout 1h",
        by_id,
        wait,
        platform,
    )
    serve = add("serve", _serve, "Run the local platform until Ctrl-C.", "serve my_tests.actions:platform")
    serve.add_argument("platform", metavar="MODULE:NAME", nargs="?", help="your LocalPlatform (default: the demo's)")
    add("demo", _demo, "See three actions run, without an account or a network.", "demo")
    return parser


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r} (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    try:
        return timedelta(seconds=float(match[1]) * UNITS[match[2]])
    except OverflowError:
        raise argparse.ArgumentTypeError(f"too long a duration: {text!r}") from None


def _params(text: str) -> Any:
    if text == "-":
        source, text = "stdin", sys.stdin.read()
    elif text.startswith("@"):
        source, text = text[1:], Path(text[1:]).read_text(encoding="utf-8")
    else:
        source = "PARAMS"
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{source} is not JSON: {exc}") from None


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    file = arguments.auth_token_file
    token = None if file is None else Path(file).read_text(encoding="utf-8").strip()
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
    except asyncio.CancelledError:
        _tell("Interrupted while starting the action: it may have started all the same.")
        raise


async def _awaited(handle: ActionHandle[Any], timeout: timedelta | None) -> Any:
    """Wait for the result, with a progress line if somebody watches."""
    progress = _Progress() if sys.stderr.isatty() else None
    try:
        with progress or contextlib.nullcontext():
            return await handle._wait(timeout, progress.observe if progress else None)
    except asyncio.CancelledError:
        _tell_how_to_collect(handle.id)
        raise


class _Progress:
    """A line on the terminal, which a thread keeps fresh."""

    def __init__(self) -> None:
        self._began = self._next_poll = time.monotonic()
        self._status = "RUNNING"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def observe(self, step: Send | Sleep) -> None:
        if isinstance(step, Sleep):
            self._next_poll = time.monotonic() + step.seconds
            self._status = step.failure or "RUNNING"

    def _draw(self) -> None:
        while not self._ended.wait(0.1):
            now = time.monotonic()
            text = f"{self._status[:60]}  {now - self._began:.1f} s, next poll in {max(0, self._next_poll - now):.1f} s"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


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
    except (ImportError, AttributeError, ValueError) as exc:
        raise ValueError(f"cannot load {place!r} (write MODULE:NAME): {exc}") from None
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
        handle = await ActionExecutor.start(
            name, params, action_retry_policy=policy, base_url=platform.base_url, auth_token=platform.auth_token
        )
        began = time.monotonic()

        def observe(step: Send | Sleep, began: float = began) -> None:
            if isinstance(step, Sleep):
                print(f"    {time.monotonic() - began:.1f} s  RUNNING")

        try:
            result = await handle._wait(None, observe)
            print(f"    {time.monotonic() - began:.1f} s  COMPLETED\n{json.dumps(result)}")
        except ActionFailedError as exc:
            print(f"    {time.monotonic() - began:.1f} s  {exc.status}\n{type(exc).__name__}: {exc}")
