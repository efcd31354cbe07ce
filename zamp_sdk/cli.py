"""The command line: arguments in, an exit code out.

Results go to stdout, as JSON in UTF-8 whatever the locale; everything else goes to stderr, in printable lines.
What a user typed in a wrong place may be a token, so no message repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import importlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Sequence

from . import ActionExecutor, ActionHandle, RetryPolicy, __version__
from .action_executor.executor import INTERRUPTED
from .action_executor.lifecycle import Sleep, Step
from .errors import ActionFailedError, ActionTimeoutError, HttpClientError, ZampError
from .local_platform import LocalPlatform

EXIT_CODES: dict[type, int] = {ActionFailedError: 1, HttpClientError: 3, ActionTimeoutError: 4}  # else 2
UNITS: dict[str, float] = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # s
NOBODY_READS = 141  # what a shell tells of a program that SIGPIPE has ended: 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _prepare_streams()
    logging.basicConfig(handlers=[_Log()], format="zamp-sdk: %(message)s")
    arguments = argparse.Namespace()
    try:
        code = _run(argv, arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = NOBODY_READS
        if vars(arguments).get("run") is _print_id:  # and with it the id would be lost
            _tell_how_to_collect(arguments.handle.id, arguments)
    except (ZampError, ValueError, TypeError, OSError, RuntimeError) as exc:
        _tell(f"zamp-sdk: {exc}")
        is_known = getattr(exc, "status_code", None) != 404
        if isinstance(exc, (HttpClientError, ActionTimeoutError)) and exc.action_id and is_known:
            _tell_how_to_collect(exc.action_id, arguments)
        elif isinstance(exc, _OutputError) and "handle" in arguments:
            _tell(f"To collect the result: {_command_that_collects(arguments.handle.id, arguments)}")
        code = EXIT_CODES.get(type(exc), 2)
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written is dropped: Python would try again at its exit, and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(argv: Sequence[str] | None, arguments: argparse.Namespace) -> int:
    parser = _parser()
    try:
        parser.parse_args(argv, arguments)
    except SystemExit as exc:  # after --help, --version or what is wrong with the arguments
        return int(exc.code or 0)
    if arguments.version:
        _print(f"zamp-sdk {__version__}")
        return 0
    if "run" not in arguments:
        parser.print_help()
        return 2
    if arguments.verbose:
        logging.getLogger("zamp_sdk").setLevel(logging.DEBUG)
    asyncio.run(arguments.run(arguments), debug=False)  # -X dev would report slow imports
    return 0


class _Closed(io.StringIO):
    """Stands for a stream that was closed before the program began."""


class _OutputError(OSError):
    """A result or an id could not be printed."""


class _Log(logging.Handler):
    """Log records become lines on stderr, as everything else that is told there."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            _tell(line)


def _prepare_streams() -> None:
    for name, encoding in (("stdin", "utf-8-sig"), ("stdout", "utf-8"), ("stderr", None)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Closed())
        elif encoding and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors="strict")


class _Parser(argparse.ArgumentParser):
    """A parser that takes options by their whole names only, and repeats none of the values it does not know."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [match[0] for match in map(re.compile("(--[a-z][a-z-]*|-[A-Za-z])(?==|$)").match, unknown) if match]
            advice = ""
            if any(name.startswith("--auth") for name in names):
                advice = " (a token comes from ZAMP_AUTH_TOKEN or --auth-token-file: others can read a command line)"
            self.error(f"no such option: {', '.join(names)}{advice}" if names else "too many arguments")
        return arguments

    def print_help(self, file: Any = None) -> None:  # noqa: ARG002  # the base class gives it
        _print(self.format_help().rstrip("\n"))  # the base class takes no notice of an error

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice"):  # and then it is repeated
            message = f"no such command; {self.prog} --help lists them"
        super().error(message)


def _program() -> list[str]:
    """Return how this program was called, for commands that a user can copy."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return [getattr(sys, "orig_argv", ["python"])[0], "-m", str(__package__)]  # orig_argv: Python 3.10
    return [Path(called).name if shutil.which(Path(called).name) == called else called]


def _parser() -> argparse.ArgumentParser:
    first, *others = _program()
    program = shlex.join([Path(first).name, *others])  # in the help the folder would only be in the way
    parser = _Parser(
        prog=program,
        description="Run actions on the Zamp platform.",
        epilog="Exit codes: 0 done, 1 the action failed, 2 usage, configuration or output that cannot be written,\n"
        f"3 HTTP, 4 the wait is over, 130 Ctrl-C, {NOBODY_READS} nobody reads the output.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbose: Any = {"action": "store_true", "help": "show the requests on stderr"}
    parser.add_argument("-v", "--verbose", **verbose)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, run: Any, about: str, example: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=about, description=about, epilog=f"example:\n  {program} {name} {example}"
        )
        added.set_defaults(run=run)
        # Without a default, which would win over a -v before the command.
        added.add_argument("-v", "--verbose", default=argparse.SUPPRESS, **verbose)
        return added

    invoice = """send_invoice '{"invoice_id": "inv_123"}'"""
    execute = command("execute", _print_result, "Run an action and print its result.", f"{invoice} --timeout 10m")
    start = command("start", _print_id, "Start an action and print its id.", invoice)
    status = command("status", _print_status, "Print the status of an action.", "act_123")
    result = command("result", _print_result, "Wait for an action and print its result.", "act_123 --timeout 1h")
    serve = command("serve", _serve, "Run the local platform until Ctrl-C.", "my_tests.actions:platform --port 8765")
    command("demo", _demo, "See three actions run, without an account or a network.")

    duration: Any = {"metavar": "DURATION", "type": _duration}
    for each in (execute, start):
        add = each.add_argument
        add("action", metavar="ACTION", help="the action's name")
        add("params", metavar="PARAMS", nargs="?", default="{}", type=_params, help="JSON ({}), @FILE, or - for stdin")
        add("--summary", help="what the platform shows people about this run")
        add("--start-to-close", help="the limit of one attempt (default: the platform's)", **duration)
        policy = each.add_argument_group(
            "retry policy",
            "Without any of these none is sent, and the platform's own holds. With one of them, the others\n"
            "are sent as 30s, 11, 15m and 1.5.",
        )
        policy.add_argument("--initial-interval", help="the wait before the second attempt", **duration)
        policy.add_argument("--maximum-attempts", metavar="N", type=int, help="attempts in all, 0 for no limit")
        policy.add_argument("--maximum-interval", help="no wait is longer than this", **duration)
        policy.add_argument("--backoff-coefficient", metavar="X", type=float, help="how each wait grows to the next")
    for each in (status, result):
        each.add_argument("id", metavar="ID", help="the action's id")
    how_long = "how long to wait: 30, 500ms, 10m, 1h (default: "
    execute.add_argument("--timeout", help=f"{how_long}until the attempts must be over, at least 1h)", **duration)
    result.add_argument("--timeout", help=f"{how_long}as long as it takes)", **duration)
    for each in (execute, start, status, result):
        each.add_argument("--base-url", metavar="URL", help="the platform (default: ZAMP_BASE_URL)")
        each.add_argument("--auth-token-file", metavar="FILE", help="where the token is (default: ZAMP_AUTH_TOKEN)")
    yours = "your LocalPlatform (default: the demo's)"
    serve.add_argument("platform", metavar="MODULE:NAME", nargs="?", default=f"{__name__}:demo", help=yours)
    serve.add_argument("--port", type=_port, help="where to listen (default: the platform's own; 0: a free port)")
    return parser


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text!r} (write 0 to 65535)")
    return int(text)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,8}|\d{0,8}\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r} (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    return timedelta(seconds=float(match[1]) * UNITS[match[2]])


def _params(text: str) -> Any:
    source = "PARAMS"
    try:
        if text == "-":
            source = "stdin"
            text = sys.stdin.read()
        elif text.startswith("@"):
            source = text[1:]
            text = Path(source).read_text(encoding="utf-8-sig")
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
    arguments.handle = await ActionExecutor.start(
        arguments.action,
        arguments.params,
        summary=arguments.summary,
        action_retry_policy=_policy(arguments),
        action_start_to_close_timeout=arguments.start_to_close,
        **target,
    )
    return arguments.handle  # type: ignore[no-any-return]  # a namespace has no types


async def _print_id(arguments: argparse.Namespace) -> None:
    _print((await _handle(arguments)).id)


async def _print_status(arguments: argparse.Namespace) -> None:
    _print(await (await _handle(arguments)).status())


async def _print_result(arguments: argparse.Namespace) -> None:
    """Wait for the result, with a progress line on a terminal, and print it."""
    handle = arguments.handle = await _handle(arguments)
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
    _print(_json(result))


def _print(text: str) -> None:
    """Print a result or an id, which must not get lost unnoticed."""
    try:
        if isinstance(sys.stdout, _Closed):
            raise OSError(errno.EBADF, "it is closed")
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise _OutputError(f"cannot write to stdout: {exc.strerror}") from exc


def _json(value: Any) -> str:
    """Write a result as JSON, which has neither infinite numbers nor halves of characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError:  # JSON's 1e999 is infinite in Python
        _tell("zamp-sdk: the result has numbers that are not finite here; they are printed as null")
        text = json.dumps(_finite(value), ensure_ascii=False, indent=2)
    # A lone surrogate cannot be written in UTF-8, but can be escaped.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    _tell(f"Action {action_id} goes on. To collect its result: {_command_that_collects(action_id, arguments)}")


def _command_that_collects(action_id: str, arguments: argparse.Namespace) -> str:
    words = [*_program(), "result", action_id]
    for option in ("base_url", "auth_token_file"):
        if vars(arguments)[option]:
            words += [f"--{option.replace('_', '-')}", vars(arguments)[option]]
    return shlex.join(words)


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
    if arguments.port is not None:
        platform._port = arguments.port
    logging.getLogger("zamp_sdk").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)  # for tracebacks
    try:
        platform.start()
    except OSError as exc:
        raise OSError(f"cannot listen on port {platform._port}: {exc.strerror}") from None
    try:
        _tell(f"Serving {', '.join(platform.action_names)}; Ctrl-C ends it.")
        print(f"export ZAMP_BASE_URL={platform.base_url} ZAMP_AUTH_TOKEN={platform.auth_token}", flush=True)
        await asyncio.Event().wait()
    finally:
        platform.stop()


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

    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*"  # whatever proxy is set, it is not for this machine's own
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
