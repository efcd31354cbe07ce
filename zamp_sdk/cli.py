"""The command line: arguments in, an exit code out.

- Results go to stdout, as JSON; everything else goes to stderr, in printable lines. All streams are UTF-8, whatever the
  locale.
- What a user typed in a wrong place may be a token, so no message repeats it.
- While a command owes its user a result, ``arguments.owed`` is the action's id. However the command then ends, the line
  that collects the result is printed; nothing is said of an action that nobody has seen.
- Messages speak of options and variables, not of Python's arguments.
- Ctrl-C, SIGTERM and SIGHUP cancel the command that runs, which then ends as at any error. Before it, and when all
  has been told, they end the program at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Coroutine, NoReturn, Optional, Sequence

from . import ActionExecutor, ActionHandle, RetryPolicy, __version__
from .action_executor import executor
from .action_executor.lifecycle import Sleep, Step, Turn
from .errors import ActionFailedError, ActionTimeoutError, HttpClientError, MissingConfigError, ZampError
from .local_platform import LocalPlatform

EXIT_CODES: dict[type, int] = {ActionFailedError: 1, HttpClientError: 3, ActionTimeoutError: 4}  # else 2
EXPECTED = (asyncio.CancelledError, ZampError, ValueError, OSError)  # ends that are no fault of ours
UNITS: dict[str, float] = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # s
NOBODY_READS = 141  # what a shell tells of a program that SIGPIPE has ended: 128 + 13

# What the library's messages call otherwise.
WORDS: dict[str, str] = {
    "pass base_url=... in the call": "give --base-url",
    "pass auth_token=... in the call": "give --auth-token-file",
    "base_url": "the base URL",
    "auth_token": "the token",
    "action_name": "ACTION",
    "action_start_to_close_timeout": "--start-to-close",
    **{name: f"--{name.replace('_', '-')}" for name in vars(RetryPolicy.default())},
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command and return its exit code; in the main thread, for it handles signals."""
    _prepare_streams()
    logging.basicConfig(handlers=[_Log()], format="zamp-sdk: %(message)s")
    for number in _signals():
        signal.signal(number, _end_at_once)
    arguments = argparse.Namespace(run=None, owed=None, received=None)
    try:
        code = _run(argv, arguments)
        if code == 0:  # or else it is told already what went wrong, with the output, too
            sys.stdout.flush()
    except EXPECTED as exc:
        code = _tell_the_end(exc, arguments)
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
    if arguments.run is None:
        parser.print_help()
        return 2
    if arguments.verbose:
        logging.getLogger("zamp_sdk").setLevel(logging.DEBUG)
    # -X dev would report slow imports.
    return asyncio.run(_perform(arguments.run(arguments), arguments), debug=False)


async def _perform(command: Coroutine[Any, Any, None], arguments: argparse.Namespace) -> int:
    """Run a command until it ends or a signal cancels it, and tell how it ended.

    That is told here, before asyncio.run waits for threads: one may hang in a name lookup.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(number: int) -> None:
        if arguments.received is None:  # timeout(1) sends its signal to the process, and again to its group
            arguments.received = number
            task.cancel()

    signals = _signals()
    for number in signals:
        try:
            loop.add_signal_handler(number, cancel, number)
        except NotImplementedError:  # on Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(cancel, number))
    try:
        await command
    except EXPECTED as exc:
        return _tell_the_end(exc, arguments)
    finally:
        if arguments.owed is not None:  # beside the traceback of a fault of ours, too
            _tell(f"To collect the result of action {arguments.owed}: {_command_that_collects(arguments)}")
        for number in signals:
            signal.signal(number, _end_at_once)
        signal.set_wakeup_fd(-1)  # it is the event loop's, which closes it before it forgets its signals
    return 0


def _tell_the_end(exc: BaseException, arguments: argparse.Namespace) -> int:
    """Say why a command has ended, and return its exit code."""
    if isinstance(exc, asyncio.CancelledError):
        if arguments.received is None:
            raise exc
        return 128 + int(arguments.received)
    if isinstance(exc, BrokenPipeError):
        if arguments.run is not _start:  # who stops reading a result wants no more of it
            arguments.owed = None
        return NOBODY_READS
    message = str(exc)
    if isinstance(exc, ActionTimeoutError):  # whose own message goes on with a line of Python
        message = f"action {exc.action_id} had not ended after {exc.waited:.1f} s"
    elif isinstance(exc, (ValueError, MissingConfigError)):
        names = "|".join(map(re.escape, WORDS))
        message = re.sub(rf"(?<![\w.])({names})\b", lambda name: WORDS[name[0]], message)
    _tell(f"zamp-sdk: {message}")
    return EXIT_CODES.get(type(exc), 2)


def _signals() -> list[int]:
    """Return which signals end a command. What is ignored stays so, as SIGHUP is under nohup."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _end_at_once(number: int, _: object) -> None:
    os._exit(128 + number)  # an exception could get lost here: in a callback of the garbage collector, say


class _Closed(io.StringIO):
    """Stands for a stream that was closed before the program began."""


class _Log(logging.Handler):
    """Log records become lines on stderr, as everything else that is told there."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            _tell(line)


def _prepare_streams() -> None:
    for name, encoding, errors in (
        ("stdin", "utf-8-sig", "strict"),
        ("stdout", "utf-8", "backslashreplace"),  # for halves of characters, which JSON can escape
        ("stderr", "utf-8", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Closed())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)


class _Parser(argparse.ArgumentParser):
    """A parser that takes options by their whole names only, and repeats no value that is in the wrong place."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        places = "unrecognized arguments|invalid choice|invalid [a-z]+ value|ignored explicit argument"
        match = re.match(f"(.*?(?:{places}))(.*)", message, re.DOTALL)
        if match is not None:  # the names of options may be told
            message = " ".join([match[1], *re.findall("(?<= )--[a-z-]+(?=[ =]|$)", match[2])])
        super().error(message)


def _program() -> list[str]:
    """Return how to call this program, for commands that a user can copy."""
    called = sys.argv[0]
    return [sys.executable, "-m", str(__package__)] if Path(called).name == "__main__.py" else [called]


def _parser() -> argparse.ArgumentParser:
    first, *others = _program()
    program = shlex.join([Path(first).name, *others])  # in the help the folder would only be in the way
    parser = _Parser(
        prog=program,
        description="Run actions on the Zamp platform.",
        epilog="Exit codes: 0 done, 1 the action failed, 2 usage, configuration or output that cannot be written,\n"
        f"3 HTTP, 4 the wait is over, 129 SIGHUP, 130 Ctrl-C, {NOBODY_READS} nobody reads the output, 143 SIGTERM.",
    )
    parser.add_argument("--version", action="version", version=f"zamp-sdk {__version__}", help="print the version")
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
    execute = command("execute", _execute, "Run an action and print its result.", f"{invoice} --timeout 10m")
    start = command("start", _start, "Start an action and print its id.", invoice)
    status = command("status", _status, "Print the status of an action.", "act_123")
    result = command("result", _result, "Wait for an action and print its result.", "act_123 --timeout 1h")
    served = "my_tests.actions:platform --port 8765"
    serve = command("serve", _serve, "Run the local platform until Ctrl-C or SIGTERM.", served)
    command("demo", _demo, "See three actions run, without an account or a network.")

    duration: Any = {"metavar": "DURATION", "type": _duration}
    for each in (execute, start):
        add = each.add_argument
        add("action", metavar="ACTION", type=_text, help="the action's name")
        add("params", metavar="PARAMS", nargs="?", default="{}", type=_params, help="JSON ({}), @FILE, or - for stdin")
        add("--summary", type=_text, help="what the platform shows people about this run")
        limit = "the limit of one attempt (default: the platform's)"
        add("--start-to-close", help=limit, **duration)
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
        each.add_argument("id", metavar="ID", type=_text, help="the action's id; -- before it if it begins with -")
    how_long = "how long to wait: 30, 500ms, 10m, 1h (default: "
    execute.add_argument("--timeout", help=f"{how_long}until the attempts must be over, at least 1h)", **duration)
    result.add_argument("--timeout", help=f"{how_long}as long as it takes)", **duration)
    for each in (execute, start, status, result):
        each.add_argument("--base-url", metavar="URL", type=_text, help="the platform (default: ZAMP_BASE_URL)")
        each.add_argument("--auth-token-file", metavar="FILE", help="where the token is (default: ZAMP_AUTH_TOKEN)")
    yours = "your LocalPlatform (default: the demo's)"
    serve.add_argument("platform", metavar="MODULE:NAME", nargs="?", default=f"{__name__}:demo", help=yours)
    port = "where to listen, up to 65535 (default: the platform's own; 0: a free port)"
    serve.add_argument("--port", metavar="PORT", type=int, choices=range(2**16), help=port)
    return parser


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,8}|\d{0,8}\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError("not a duration (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    return timedelta(seconds=float(match[1]) * UNITS[match[2]])


def _text(argument: str) -> str:
    """Read as UTF-8 what Python could not read in the locale's encoding (PEP 383), as with LC_ALL=C."""
    if not re.search("[\ud800-\udfff]", argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError("not in UTF-8 (write it in UTF-8, or set LC_ALL to its encoding)") from None


def _params(argument: str) -> Any:
    source = "PARAMS"
    try:
        if argument == "-":
            source = "stdin"
            return json.loads(sys.stdin.read())
        if argument.startswith("@"):
            source = argument[1:]
            return json.loads(Path(source).read_text(encoding="utf-8-sig"))
        return json.loads(_text(argument))
    except (ValueError, RecursionError) as exc:  # the first also for what is not UTF-8
        raise argparse.ArgumentTypeError(f"{source} is not JSON: {exc}") from None


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say which platform to ask, and as whom."""
    return {"base_url": arguments.base_url, "auth_token": _token(arguments.auth_token_file)}


def _token(file: str | None) -> str | None:
    if not file:
        return None
    try:
        token = Path(file).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not in UTF-8: write the token into it as plain text") from None
    if not token:
        raise ValueError(f"{file} holds no token")
    return token


def _policy(arguments: argparse.Namespace) -> RetryPolicy | None:
    default = vars(RetryPolicy.default())
    given = {name: value for name, value in vars(arguments).items() if name in default and value is not None}
    return RetryPolicy(**{**default, **given}) if given else None


async def _execute(arguments: argparse.Namespace) -> None:
    await _print_result(await _started(arguments), arguments)


async def _start(arguments: argparse.Namespace) -> None:
    _print((await _started(arguments)).id)
    arguments.owed = None


async def _status(arguments: argparse.Namespace) -> None:
    _print(await ActionExecutor.get_handle(arguments.id, **_target(arguments)).status())


async def _result(arguments: argparse.Namespace) -> None:
    handle = ActionExecutor.get_handle(arguments.id, **_target(arguments))
    arguments.owed = handle.id
    try:
        await _print_result(handle, arguments)
    except HttpClientError:  # it may be about an action that does not exist, and whoever waits for it has the id
        arguments.owed = None
        raise


async def _started(arguments: argparse.Namespace) -> ActionHandle[Any]:
    try:
        async with _progress("starting") as observe:
            handle = await executor._start(
                executor._resolve(**_target(arguments)),
                arguments.action,
                arguments.params,
                summary=arguments.summary,
                return_type=None,
                retry_policy=_policy(arguments),
                start_to_close_timeout=arguments.start_to_close,
                observe=observe,
            )
    except HttpClientError as exc:  # the platform may give an id and an error
        arguments.owed = exc.action_id
        raise
    arguments.owed = handle.id
    return handle


async def _print_result(handle: ActionHandle[Any], arguments: argparse.Namespace) -> None:
    try:
        async with _progress("RUNNING") as observe:
            result = await handle._wait(arguments.timeout, observe)
    except ActionFailedError:  # it has ended, and the error says all there is to say
        arguments.owed = None
        raise
    _print(_json(result))
    arguments.owed = None


@contextlib.asynccontextmanager
async def _progress(usual: str) -> AsyncIterator[Callable[[Step], None]]:
    """Show what is waited for, in a line on a terminal; what is yielded is to be called with each step."""
    doing = usual
    until = began = time.monotonic()

    def observe(step: Step) -> None:
        nonlocal doing, until
        if isinstance(step, Sleep):
            doing = step.failure or usual
        elif isinstance(step, Turn):
            doing = f"{usual}, waiting for its turn in a line of {step.waiting}"
        else:
            return
        until = time.monotonic() + step.seconds

    async def show() -> None:
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            times = f"  {now - began:.1f} s, next request in {max(0, until - now):.1f} s"
            _draw(doing[: shutil.get_terminal_size().columns - len(times) - 1] + times)

    showing = asyncio.ensure_future(show())
    try:
        yield observe
    finally:
        showing.cancel()
        _draw("")


def _print(text: str) -> None:
    """Print a result or an id, which must not get lost unnoticed."""
    try:
        if isinstance(sys.stdout, _Closed):
            raise OSError(errno.EBADF, "it is closed")
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OSError(f"cannot write to stdout: {exc.strerror}") from exc


def _json(value: Any) -> str:
    """Write a result as JSON, which has no infinite numbers."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError:  # JSON's 1e999 is infinite in Python
        _tell("zamp-sdk: the result has numbers that are not finite here; they are printed as null")
        return _json(json.loads(json.dumps(value), parse_constant=lambda _: None))


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


def _command_that_collects(arguments: argparse.Namespace) -> str:
    words = [*_program(), "result"]
    for option, value in (("--base-url", arguments.base_url), ("--auth-token-file", arguments.auth_token_file)):
        words += [f"{option}={value}"] if value else []
    words += ["--"] if arguments.owed.startswith("-") else []  # the end of the options
    return shlex.join([*words, arguments.owed])


def _serve(arguments: argparse.Namespace) -> Coroutine[Any, Any, None]:
    """Load the user's module, which may run event loops of its own, and return what serves its platform."""
    place = arguments.platform
    sys.path.insert(0, "")
    module, _, name = place.partition(":")
    try:
        platform = getattr(importlib.import_module(module), name)
    except BaseException as exc:  # whatever the user's own code raises, sys.exit and pytest.skip among it
        logging.getLogger("zamp_sdk").debug("loading %r has failed", place, exc_info=True)
        reason = "".join(traceback.format_exception_only(type(exc), exc))  # not every exception can be printed
        raise ValueError(f"cannot load {place!r} (write MODULE:NAME): {' '.join(reason.split())}") from None
    if not isinstance(platform, LocalPlatform):
        raise ValueError(f"{place} must be a LocalPlatform, not {type(platform).__name__}")
    if arguments.port is not None:
        platform._port = arguments.port
    logging.getLogger("zamp_sdk").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)  # for tracebacks
    return _serving(platform)


async def _serving(platform: LocalPlatform) -> None:
    try:
        platform.start()
    except (OSError, RuntimeError) as exc:  # a port that is taken; the module has started it; no thread can be had
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise OSError(f"cannot start the platform on port {platform._port}: {reason}") from None
    try:
        _tell(f"Serving {', '.join(platform.action_names)}; Ctrl-C ends it.")
        _print(f"export ZAMP_BASE_URL={platform.base_url} ZAMP_AUTH_TOKEN={shlex.quote(platform.auth_token)}")
        with contextlib.suppress(asyncio.CancelledError):  # a signal is how it is meant to end
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
