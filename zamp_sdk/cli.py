"""The command line: arguments in, an exit code out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Sequence

from . import ActionExecutor, ActionHandle, RetryPolicy, __version__
from .action_executor.executor import INTERRUPTED
from .action_executor.lifecycle import Sleep, Step
from .errors import ActionFailedError, ActionTimeoutError, HttpClientError, ZampError
from .local_platform import LocalPlatform

EXIT_CODES: dict[type, int] = {ActionFailedError: 1, HttpClientError: 3, ActionTimeoutError: 4}  # else 2
UNITS: dict[str, float] = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # s


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name in ("stdin", "stdout", "stderr"):  # None if it is closed
        setattr(sys, name, getattr(sys, name) or io.StringIO())
    logging.basicConfig(format="zamp-sdk: %(message)s")
    try:
        arguments = _parser().parse_args(argv)
        asyncio.run(arguments.run(arguments), debug=False)  # -X dev would report slow imports
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ZampError, ValueError, TypeError, OSError, RuntimeError) as exc:
        _tell(f"zamp-sdk: {exc}")
        is_known = getattr(exc, "status_code", None) != 404
        if isinstance(exc, (HttpClientError, ActionTimeoutError)) and exc.action_id and is_known:
            _tell_how_to_collect(exc.action_id, arguments)
        return EXIT_CODES.get(type(exc), 2)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zamp-sdk",
        description="Run actions on the Zamp platform.",
        epilog="Exit codes: 0 done, 1 action failed, 2 usage or configuration, 3 HTTP, 4 the wait is over, 130 Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"zamp-sdk {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, about: str, example: str = "") -> Any:
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
    execute = command("execute", _print_result, "Run an action and print its result.", f"{invoice} --timeout 10m")
    start = command("start", _print_id, "Start an action and print its id.", invoice)
    status = command("status", _print_status, "Print the status of an action.", "act_123")
    result = command("result", _print_result, "Wait for an action and print its result.", "act_123 --timeout 1h")
    serve = command("serve", _serve, "Run the local platform until Ctrl-C.", "my_tests.actions:platform")
    command("demo", _demo, "See three actions run, without an account or a network.")

    duration: Any = {"metavar": "DURATION", "type": _duration}
    for add in (execute, start):
        add("action", metavar="ACTION", help="the action's name")
        add("params", metavar="PARAMS", nargs="?", default="{}", type=_params, help="JSON ({}), @FILE, or - for stdin")
        add("--summary", help="what the platform shows people about this run")
        add("--start-to-close", help="the limit of one attempt", **duration)
        add("--initial-interval", help="the wait before the second attempt (30s)", **duration)
        add("--maximum-attempts", metavar="N", type=int, help="attempts in all, 0 for no limit (11)")
        add("--maximum-interval", help="no wait is longer than this (15m)", **duration)
        add("--backoff-coefficient", metavar="X", type=float, help="each wait is X times the one before (1.5)")
    for add in (status, result):
        add("id", metavar="ID", help="the action's id")
    for add in (execute, result):
        add("--timeout", help="how long to wait: 30, 500ms, 10m, 1h", **duration)
    for add in (execute, start, status, result):
        add("--base-url", metavar="URL", help="the platform (default: ZAMP_BASE_URL)")
        add("--auth-token-file", metavar="FILE", help="where the token is (default: ZAMP_AUTH_TOKEN)")
    serve("platform", metavar="MODULE:NAME", nargs="?", default=f"{__name__}:demo", help="yours (default: the demo's)")
    return parser


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,8}|\d{0,8}\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r} (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    return timedelta(seconds=float(match[1]) * UNITS[match[2]])


def _params(text: str) -> Any:
    source = "PARAMS"
    try:
        if text == "-":
            source, text = "stdin", sys.stdin.read()
        elif text.startswith("@"):
            source, text = text[1:], Path(text[1:]).read_text(encoding="utf-8")
        return json.loads(text)
    except (ValueError, RecursionError) as exc:  # the first also for what is not UTF-8
        raise argparse.ArgumentTypeError(f"{source} is not JSON: {exc}") from None


def _token(file: str) -> str:
    token = Path(file).read_text(encoding="latin-1").strip()
    if not token:
        raise ValueError(f"{file} holds no token")
    return token


def _policy(arguments: argparse.Namespace) -> RetryPolicy | None:
    default = vars(RetryPolicy.default())
    given = {name: value for name, value in vars(arguments).items() if name in default and value is not None}
    return RetryPolicy(**{**default, **given}) if given else None


async def _handle(arguments: argparse.Namespace) -> ActionHandle[Any]:
    """Start the action, or take the one that has the id."""
    token = None if arguments.auth_token_file is None else _token(arguments.auth_token_file)
    target = {"base_url": arguments.base_url, "auth_token": token}
    if "id" in arguments:
        return ActionExecutor.get_handle(arguments.id, **target)
    return await ActionExecutor.start(
        arguments.action,
        arguments.params,
        summary=arguments.summary,
        action_retry_policy=_policy(arguments),
        action_start_to_close_timeout=arguments.start_to_close,
        **target,
    )


async def _print_id(arguments: argparse.Namespace) -> None:
    print((await _handle(arguments)).id)


async def _print_status(arguments: argparse.Namespace) -> None:
    print(await (await _handle(arguments)).status())


async def _print_result(arguments: argparse.Namespace) -> None:
    """Wait for the result, with a progress line on a terminal, and print it."""
    handle = await _handle(arguments)
    status = "RUNNING"
    next_poll = began = time.monotonic()

    def observe(step: Step) -> None:
        nonlocal status, next_poll
        if isinstance(step, Sleep):
            status = (step.failure or "RUNNING").replace(f"asking for action {handle.id}: ", "")
            next_poll = time.monotonic() + step.seconds

    async def show_progress() -> None:
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            times = f"  {now - began:.1f} s, next poll in {max(0, next_poll - now):.1f} s"
            _draw(status[: shutil.get_terminal_size().columns - len(times) - 1] + times)

    progress = asyncio.ensure_future(show_progress())
    try:
        result = await handle._wait(arguments.timeout, observe)
    except INTERRUPTED:
        _tell_how_to_collect(handle.id, arguments)
        raise
    finally:
        progress.cancel()
        _draw("")
    _print_json(result)


def _draw(line: str) -> None:
    """Replace the line on the terminal, if it is one."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    try:
        _draw("")
        print("".join(char if char.isprintable() else " " for char in text), file=sys.stderr, flush=True)
    except OSError:  # the exit code counts
        sys.stderr = io.StringIO()


def _tell_how_to_collect(action_id: str, arguments: argparse.Namespace) -> None:
    command = ["python", "-m", __package__, "result", action_id]
    for option in ("base_url", "auth_token_file"):
        if vars(arguments)[option]:
            command += [f"--{option.replace('_', '-')}", vars(arguments)[option]]
    _tell(f"Action {action_id} goes on. To collect its result: {shlex.join(command)}")


def _print_json(value: Any) -> None:
    try:
        print(json.dumps(value, ensure_ascii=False, indent=2))
    except UnicodeEncodeError:  # which comes before anything is written
        print(json.dumps(value, indent=2))


async def _serve(arguments: argparse.Namespace) -> None:
    place = arguments.platform
    sys.path.insert(0, "")
    try:
        module, _, name = place.partition(":")
        platform = getattr(importlib.import_module(module), name)
    except Exception as exc:
        raise ValueError(f"cannot load {place!r} (write MODULE:NAME): {type(exc).__name__}: {exc}") from None
    if not isinstance(platform, LocalPlatform):
        raise TypeError(f"{place} must be a LocalPlatform, not {type(platform).__name__}")
    with platform:
        _tell(f"Serving {', '.join(platform.action_names)}; Ctrl-C ends it.")
        print(f"export ZAMP_BASE_URL={platform.base_url} ZAMP_AUTH_TOKEN={platform.auth_token}", flush=True)
        await asyncio.Event().wait()


demo: LocalPlatform = LocalPlatform(time_scale=0.01)
_attempts = itertools.count(1)


@demo.action
async def send_invoice(params: Any) -> Any:
    await asyncio.sleep(0.3)
    return {"sent": True, **params}


@demo.action
def fetch_report(_: Any) -> Any:
    if next(_attempts) % 3:
        raise ConnectionError("the archive is busy")
    return {"pages": 12, "attempts": 3}


@demo.action
def charge_card(_: Any) -> Any:
    raise ValueError("the card has expired")


async def _demo(_: argparse.Namespace) -> None:
    def observe(step: Step) -> None:
        if isinstance(step, Sleep):
            print(f"    {time.monotonic() - began:.1f} s  RUNNING, next poll in {step.seconds:.1f} s")

    with demo:
        print(f"The local platform listens on {demo.base_url}; nothing leaves this machine.")
        for name, params, policy in (
            ("send_invoice", {"invoice_id": "inv_123"}, None),
            ("fetch_report", {"month": "2026-10"}, RetryPolicy.default()),
            ("charge_card", {"card": "4111"}, None),
        ):
            more = ", action_retry_policy=RetryPolicy.default()" if policy else ""
            print(f'\n>>> await ActionExecutor.execute("{name}", {json.dumps(params)}{more})')
            began = time.monotonic()
            try:
                handle = await ActionExecutor.start(
                    name, params, action_retry_policy=policy, base_url=demo.base_url, auth_token=demo.auth_token
                )
                print(json.dumps(await handle._wait(None, observe)))
            except ActionFailedError as exc:
                print(f"{type(exc).__name__}: {exc}")
