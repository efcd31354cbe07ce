"""The command line: arguments in, an exit code out.

- Results go to stdout, as JSON; everything else goes to stderr, in printable lines. All streams are UTF-8, whatever the
  locale.
- What a user typed in a wrong place may be a token, so no message repeats it.
- While a command owes its user a result, ``arguments.owed`` is the action's id. However the command then ends, the line
  that collects the result is printed; nothing is said of an action that nobody has seen.
- Messages speak of options and variables, not of Python's arguments.
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
import math
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
from typing import Any, Coroutine, NoReturn, Sequence

from . import ActionExecutor, ActionHandle, RetryPolicy, SdkConfig, __version__
from .action_executor.lifecycle import Sleep, Step
from .errors import ActionFailedError, ActionTimeoutError, HttpClientError, MissingConfigError, ZampError
from .local_platform import LocalPlatform

EXIT_CODES: dict[type, int] = {ActionFailedError: 1, HttpClientError: 3, ActionTimeoutError: 4}  # else 2
EXPECTED = (asyncio.CancelledError, ZampError, ValueError, OSError)  # ends that are no fault of ours
UNITS: dict[str, float] = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}  # s
NOBODY_READS = 141  # what a shell tells of a program that SIGPIPE has ended: 128 + 13

# Seconds in which a second signal is still the first one: `timeout 60 zamp-sdk ...` sends SIGTERM to the process, and
# then to the process group that it is in.
SAME_SIGNAL = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; in the main thread, for it handles signals."""
    _prepare_streams()
    logging.basicConfig(handlers=[_Log()], format="zamp-sdk: %(message)s")
    signals = _Signals()
    arguments = argparse.Namespace(run=None, owed=None)
    try:
        code = _run(argv, arguments, signals)
        sys.stdout.flush()
    except EXPECTED as exc:
        code = _tell_the_end(exc, arguments, signals)
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written is dropped: Python would try again at its exit, and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(argv: Sequence[str] | None, arguments: argparse.Namespace, signals: _Signals) -> int:
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
    command: Coroutine[Any, Any, None] = arguments.run(arguments)

    async def perform() -> int:
        signals.task = asyncio.current_task()
        awake = asyncio.ensure_future(_stay_awake())
        # All is told here, before asyncio.run waits for threads: one may hang in a name lookup.
        try:
            await command
        except EXPECTED as exc:
            return _tell_the_end(exc, arguments, signals)
        finally:
            if arguments.owed is not None:  # beside the traceback of a fault of ours, too
                collect = _command_that_collects(arguments)
                _tell(f"To collect the result of action {arguments.owed}: {collect}")
            signals.task = None
            awake.cancel()
        return 0

    return asyncio.run(perform(), debug=False)  # -X dev would report slow imports


def _tell_the_end(exc: BaseException, arguments: argparse.Namespace, signals: _Signals) -> int:
    """Say why a command has ended, and return its exit code."""
    if isinstance(exc, asyncio.CancelledError):
        if signals.received is None:
            raise exc
        code = 128 + signals.received
    elif isinstance(exc, BrokenPipeError):
        code = NOBODY_READS
        if arguments.run is not _start:  # who stops reading a result wants no more of it
            arguments.owed = None
    else:
        code = EXIT_CODES.get(type(exc), 2)
        message = str(exc)
        if isinstance(exc, ActionTimeoutError):  # whose own message goes on with a line of Python
            message = f"action {exc.action_id} had not ended after {exc.waited:.1f} s"
        _tell(f"zamp-sdk: {message}")
    return code


class _Signals:
    """What Ctrl-C, SIGTERM and SIGHUP do: they cancel the command, which then ends as at any error.

    A second one ends the program at once, as does any before there is something to cancel. What is ignored stays
    ignored: SIGHUP under nohup, Ctrl-C in the background of a script.
    """

    def __init__(self) -> None:
        self.task: asyncio.Task[int] | None = None
        self.received: int | None = None
        self._since = -math.inf
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        now = time.monotonic()
        if now - self._since < SAME_SIGNAL:
            return
        if self.task is None or self.received is not None:
            os._exit(128 + number)  # an exception could get lost here: in a callback of the garbage collector, say
        self.received, self._since = number, now
        self.task.get_loop().call_soon_threadsafe(self.task.cancel)


async def _stay_awake() -> None:
    """Have Python look for signals now and then: one that comes just before the loop waits does not end its waiting."""
    while True:  # noqa: ASYNC110  # it waits for nothing
        await asyncio.sleep(0.5)


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
        ("stdout", "utf-8", "strict"),
        ("stderr", "utf-8", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _Closed())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=errors)


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

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice"):  # and then it is repeated
            message = f"no such command; {self.prog} --help lists them"
        super().error(re.sub("(invalid [a-z]+ value|ignored explicit argument).*", r"\1", message, flags=re.DOTALL))


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
        add("action", metavar="ACTION", type=_name, help="the action's name")
        add("params", metavar="PARAMS", nargs="?", default="{}", type=_params, help="JSON ({}), @FILE, or - for stdin")
        add("--summary", type=_text, help="what the platform shows people about this run")
        limit = "the limit of one attempt (default: the platform's)"
        add("--start-to-close", metavar="DURATION", type=_limit, help=limit)
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
    serve.add_argument("--port", type=_port, help="where to listen (default: the platform's own; 0: a free port)")
    return parser


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("not a port (write 0 to 65535)")
    return int(text)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,8}|\d{0,8}\.\d+) *(ms|s|m|h|d|)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError("not a duration (write 30, 1.5s, 500ms, 10m, 1h or 2d)")
    return timedelta(seconds=float(match[1]) * UNITS[match[2]])


def _limit(text: str) -> timedelta:
    duration = _duration(text)
    if not duration:
        raise argparse.ArgumentTypeError("must be over zero")
    return duration


def _text(argument: str) -> str:
    """Read as UTF-8 what Python could not read in the locale's encoding (PEP 383), as with LC_ALL=C."""
    if not re.search("[\ud800-\udfff]", argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError("not in UTF-8 (write it in UTF-8, or set LC_ALL to its encoding)") from None


def _name(argument: str) -> str:
    name = _text(argument)
    if not name.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return name


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
    for option, variable in (("base_url", "ZAMP_BASE_URL"), ("auth_token_file", "ZAMP_AUTH_TOKEN")):
        if not vars(arguments)[option] and not os.environ.get(variable, "").strip():
            raise MissingConfigError(f"{variable} is not set: set it in the environment, or give {_option(option)}")
    target = {"base_url": arguments.base_url, "auth_token": _token(arguments.auth_token_file)}
    try:
        SdkConfig.resolve(**target)
    except ValueError as exc:  # it begins with the argument's name
        raise ValueError(re.sub("^base_url", "the base URL", re.sub("^auth_token", "the token", str(exc)))) from None
    return target


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
    try:
        return RetryPolicy(**{**default, **given}) if given else None
    except ValueError as exc:  # it names fields, and so do the options
        raise ValueError(re.sub("[a-z]+_[a-z]+", lambda field: _option(field[0]), str(exc))) from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        handle = await ActionExecutor.start(
            arguments.action,
            arguments.params,
            summary=arguments.summary,
            action_retry_policy=_policy(arguments),
            action_start_to_close_timeout=arguments.start_to_close,
            **_target(arguments),
        )
    except HttpClientError as exc:  # the platform may give an id and an error
        arguments.owed = exc.action_id
        raise
    arguments.owed = handle.id
    return handle


async def _print_result(handle: ActionHandle[Any], arguments: argparse.Namespace) -> None:
    try:
        result = await _wait(handle, arguments.timeout)
    except ActionFailedError:  # it has ended, and the error says all there is to say
        arguments.owed = None
        raise
    _print(_json(result))
    arguments.owed = None


async def _wait(handle: ActionHandle[Any], timeout: timedelta | None) -> Any:
    """Wait for a result, with a line on a terminal that shows what is being waited for."""
    doing = "RUNNING"
    until = began = time.monotonic()

    def observe(step: Step) -> None:
        nonlocal doing, until
        if isinstance(step, Sleep):
            doing = step.failure or "RUNNING"
            until = time.monotonic() + step.seconds

    async def show_progress() -> None:
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            times = f"  {now - began:.1f} s, next poll in {max(0, until - now):.1f} s"
            _draw(doing[: shutil.get_terminal_size().columns - len(times) - 1] + times)

    progress = asyncio.ensure_future(show_progress())
    try:
        return await handle._wait(timeout, observe)
    finally:
        progress.cancel()
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
    """Write a result as JSON, which has neither infinite numbers nor halves of characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    except ValueError:  # JSON's 1e999 is infinite in Python
        _tell("zamp-sdk: the result has numbers that are not finite here; they are printed as null")
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False, indent=2)
    # A lone surrogate cannot be written in UTF-8, but can be escaped.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


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
    target = {name: vars(arguments)[name] for name in ("base_url", "auth_token_file")}
    options = [f"{_option(name)}={value}" for name, value in target.items() if value]
    end_of_options = ["--"] if arguments.owed.startswith("-") else []
    return shlex.join([*_program(), "result", *options, *end_of_options, arguments.owed])


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
    except OSError as exc:
        raise OSError(f"cannot listen on port {platform._port}: {exc.strerror}") from None
    except RuntimeError as exc:  # the module has started it, or no thread can be had
        raise OSError(f"cannot start the platform: {exc}") from None
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
