"""The command line: what it prints where, and with which exit code it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.servers import TOKEN, Server, closed_port, eventually, reply, running, silent
from zamp_sdk import __version__, cli
from zamp_sdk.action_executor import lifecycle
from zamp_sdk.local_platform import LocalPlatform

ROOT = Path(__file__).parent.parent
ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}  # exit codes


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalPlatform]:
    """A running platform, to which the environment points."""
    platform = LocalPlatform(time_scale=0.001)
    platform.action("echo")(lambda params: params)
    platform.action("wait")(time.sleep)
    platform.action("doze")(asyncio.sleep)  # which the end of the platform ends

    @platform.action
    def fail(params: Any) -> Any:
        raise ValueError("boom")

    with platform:
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        yield platform


Run = Any


@pytest.fixture(autouse=True)
def called_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what runs in this process believe that it was called as ``python -m zamp_sdk``."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "zamp_sdk" / "__main__.py")])


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """Give the test run the signal handlers back that a command in this process has replaced."""
    before = {number: signal.getsignal(number) for number in ENDS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command; its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        try:
            code: Any = cli.main(arguments)
        except SystemExit as exc:  # argparse
            code = exc.code
        return (code, *capsys.readouterr())

    return run


def test_execute_prints_the_result_as_json(platform: LocalPlatform, run: Run) -> None:
    """The result is JSON on stdout, and stderr stays empty where nobody watches."""
    assert run("execute", "echo", '{"a": "é"}') == (0, '{\n  "a": "é"\n}\n', "")


def test_every_option_arrives(platform: LocalPlatform, run: Run) -> None:
    """Every option reaches the platform; what a policy is not given is as in the default one."""
    code, _, _ = run(
        *("execute", "echo", "1", "--summary", "s", "--start-to-close", "10m", "--timeout", "1h"),
        *("--initial-interval", "500ms", "--maximum-attempts", "2", "--backoff-coefficient", "2"),
    )
    assert code == 0
    body = platform.requests[0].body
    assert (body["summary"], body["start_to_close_timeout_seconds"]) == ("s", 600.0)
    assert body["retry_policy"] == {
        "initial_interval": "PT0.5S",
        "maximum_attempts": 2,
        "maximum_interval": "PT15M",
        "backoff_coefficient": 2.0,
    }


def test_params_come_from_a_file_or_stdin(
    platform: LocalPlatform, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Params come from a file, from stdin, or are an empty object."""
    (tmp_path / "params.json").write_text("[1]", encoding="utf-8")
    assert run("execute", "echo", f"@{tmp_path}/params.json")[1] == "[\n  1\n]\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("2"))
    assert run("execute", "echo", "-")[1] == "2\n"
    assert run("execute", "echo")[1] == "{}\n"


def test_one_command_starts_and_others_collect(platform: LocalPlatform, run: Run) -> None:
    """An action started by one command is looked at and collected by others."""
    code, action_id, _ = run("start", "echo", "[]")
    assert code == 0
    assert run("result", action_id.strip()) == (0, "[]\n", "")
    assert run("status", action_id.strip()) == (0, "COMPLETED\n", "")


def test_a_failed_action_is_exit_code_1(platform: LocalPlatform, run: Run) -> None:
    """A failed action is exit code 1 and the platform's reason."""
    code, out, err = run("execute", "fail")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"zamp-sdk: action act\S+ \(fail\) ended as FAILED: ValueError: boom\n", err)


def test_a_wait_that_is_over_is_exit_code_4(platform: LocalPlatform, run: Run) -> None:
    """A wait that is over is exit code 4, and the command that collects the result."""
    code, out, err = run("execute", "wait", "0.5", "--timeout", "100ms")
    assert (code, out) == (4, "")
    assert re.fullmatch(
        r"zamp-sdk: action (act\S+) had not ended after \d+\.\d s\n"
        rf"To collect the result of action \1: {CALLED} result \1\n",
        err,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("execute", "echo", "1", "too many"),
        ("execute", "echo", "1", "--base", "http://x"),
        ("execute", "echo", "1", "--timeo", "1"),
        ("serve", "--port", "65536"),
        ("serve", "--port", "http"),
        ("execute",),
        ("execute", "echo", "{"),
        ("execute", "echo", "@/does/not/exist"),
        ("execute", "echo", "1", "--timeout", "soon"),
        ("execute", "echo", "1", "--timeout", "9" * 30),
        ("execute", "echo", "1", "--maximum-attempts", "-1"),
        ("execute", "echo", "1", "--initial-interval", "1h"),
        ("execute", "echo", "1", "--base-url", "ftp://x"),
        ("execute", "echo", "1", "--auth-token-file", "/does/not/exist"),
        ("execute", "echo", "1", "--auth-token-file", os.devnull),
        ("execute", "echo", "1", "--auth-token", "secret"),
        ("execute", "echo", "NaN"),
        ("result", "../admin"),
        ("serve", "no_such_module:platform"),
        ("serve", "json:dumps"),
        ("serve", "json"),
        ("serve", "..:platform"),
        ("execute", "echo", f"@{sys.executable}"),
        ("execute", "echo", "1", "--auth-token-file", sys.executable),
    ],
)
def test_what_a_user_gets_wrong_is_exit_code_2_and_sends_nothing(
    platform: LocalPlatform, run: Run, arguments: tuple[str, ...]
) -> None:
    """What a user can get wrong is exit code 2 and a message, before anything is sent."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err
    assert platform.requests == []


def test_missing_configuration_is_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing configuration is exit code 2 and a sentence."""
    monkeypatch.delenv("ZAMP_BASE_URL", raising=False)
    code, _, err = run("status", "act-1")
    assert code == 2
    assert err.startswith("zamp-sdk: ZAMP_BASE_URL is not set: ")


def test_the_token_comes_from_a_file_and_is_not_shown(
    platform: LocalPlatform, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token may come from a file; a wrong one is exit code 3 and is not shown."""
    monkeypatch.delenv("ZAMP_AUTH_TOKEN")
    token = tmp_path / "token"
    token.write_text(platform.auth_token + "\n", encoding="utf-8")
    assert run("execute", "echo", "1", "--auth-token-file", str(token))[0] == 0
    token.write_text("s3cret", encoding="utf-8")
    code, _, err = run("execute", "echo", "1", "--auth-token-file", str(token))
    assert code == 3
    assert "HTTP 401" in err
    assert "s3cret" not in err


def test_an_unknown_id_is_exit_code_3(platform: LocalPlatform, run: Run) -> None:
    """An id that the platform does not know is exit code 3."""
    code, _, err = run("result", "act-unknown")
    assert code == 3
    assert "HTTP 404" in err
    assert "goes on" not in err


@pytest.mark.parametrize("command", ["execute", "start", "status", "result", "serve", "demo"])
def test_the_help_of_a_command_has_an_example(run: Run, command: str) -> None:
    """Every command's help has an example."""
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"example:\n  {Path(sys.executable).name} -m zamp_sdk {command}" in out


def test_the_version_is_told(run: Run) -> None:
    """The version is told."""
    assert run("--version") == (0, f"zamp-sdk {__version__}\n", "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("1.5s", 1.5), ("500ms", 0.5), ("10m", 600), ("1h", 3600), ("2d", 172800), (".5", 0.5)],
)
def test_a_duration_is_a_number_with_or_without_a_unit(text: str, seconds: float) -> None:
    """A duration is a number, in seconds or with its unit."""
    assert cli._duration(text).total_seconds() == seconds


PROGRAM = (sys.executable, "-X", "dev", "-W", "error", "-m", "zamp_sdk")
CALLED = re.escape(shlex.join([sys.executable, "-m", "zamp_sdk"]))
COLLECT = rf"To collect the result of action (act\w+): {CALLED} result \1\n"


@contextlib.contextmanager
def command(
    *arguments: str, variables: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a process of its own, with warnings as errors; it does not outlive the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(variables or {})}
    with subprocess.Popen(
        [*PROGRAM, *arguments],
        text=True,
        env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_demo_shows_a_result_a_retry_and_an_error(run: Run) -> None:
    """The demo shows a result, a result on the third attempt and an error, and ends well."""
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert '{"sent": true, "invoice_id": "inv_123"}' in out
    assert '{"pages": 12, "attempts": 3}' in out
    assert "ActionFailedError: action act" in out
    assert out.count(">>> await ActionExecutor.execute(") == 3
    assert out.count("RUNNING") >= 2


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("name", ["execute", "result"])
def test_a_signal_ends_the_wait_and_says_how_to_collect(
    platform: LocalPlatform, run: Run, name: str, number: signal.Signals
) -> None:
    """Ctrl-C, SIGTERM and SIGHUP end a wait; the command that collects the result is printed."""
    arguments = ["execute", "doze", "60"]
    if name == "result":
        arguments = ["result", run("start", "doze", "60")[1].strip()]
    asked = len(platform.requests)
    with command(*arguments) as process:
        while len(platform.requests) < asked + 3:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (ENDS[number], "")
    assert re.fullmatch(COLLECT, err)


@pytest.mark.parametrize("number", ENDS)
async def test_a_signal_while_starting_tells_the_doubt(number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and SIGHUP end a start; the action may have started all the same, which is said."""
    with Server() as server:
        server.always("POST", silent)
        with command("execute", "x", variables={"ZAMP_BASE_URL": server.url, "ZAMP_AUTH_TOKEN": "t"}) as process:
            await eventually(lambda: server.count("POST") == 1)
            process.send_signal(number)
            out, err = await asyncio.to_thread(process.communicate, timeout=20)
    said = "zamp-sdk: cancelled while starting action 'x': it may have started all the same\n"
    assert (process.returncode, out, err) == (ENDS[number], "", said)


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout, of GNU coreutils or BusyBox")
def test_timeout_ends_a_wait_as_ctrl_c_does(platform: LocalPlatform) -> None:
    """What timeout(1) ends, by a SIGTERM for the process and another one for its group, says how to collect."""
    words = ["timeout", "60", sys.executable, "-m", "zamp_sdk", "execute", "doze", "60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(platform.requests) < 3:
            time.sleep(0.01)
        process.terminate()  # which it passes on as it does its own
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "")
    assert re.fullmatch(COLLECT, err)


def test_two_signals_at_once_are_one(platform: LocalPlatform) -> None:
    """A second signal that follows the first at once does not keep the command from telling what it leaves behind."""
    with command("execute", "doze", "60") as process:
        while len(platform.requests) < 3:
            time.sleep(0.01)
        for _ in range(50):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        _, err = process.communicate(timeout=20)
    assert process.returncode in (143, -signal.SIGTERM)  # a shell's number for both; one may have come at the very end
    assert re.fullmatch(COLLECT, err)


def test_a_second_signal_ends_a_command_whose_threads_do_not_end(tmp_path: Path) -> None:
    """What a thread keeps from ending after a first signal, as a name lookup may, is ended by a second one."""
    (tmp_path / "stubborn.py").write_text(
        "import asyncio, time\n"
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "class Stubborn(LocalPlatform):\n"
        "    def start(self):\n"
        "        super().start()\n"
        "        asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)\n"
        "platform = Stubborn()\n",
        encoding="utf-8",
    )
    with command("serve", "stubborn:platform", cwd=tmp_path) as server:
        assert server.stdout.readline().startswith("export ")  # type: ignore[union-attr]  # a pipe
        for _ in range(200):
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.1)
                break
    assert server.returncode == 143


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_before_there_is_anything_to_cancel_ends_the_program(tmp_path: Path, number: signal.Signals) -> None:
    """A signal while the user's module is loading ends the program at once, whatever the module makes of exceptions."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "print('loading', flush=True)\n"
        "while True:\n"
        "    try: time.sleep(0.01)\n"
        "    except BaseException: pass\n",
        encoding="utf-8",
    )
    with command("serve", "slow:platform", cwd=tmp_path) as server:
        assert server.stdout.readline() == "loading\n"  # type: ignore[union-attr]  # a pipe
        server.send_signal(number)
        assert server.communicate(timeout=20) == ("", "")
    assert server.returncode == ENDS[number]


def test_a_signal_that_is_ignored_stays_ignored(platform: LocalPlatform) -> None:
    """Under nohup, and for Ctrl-C in the background of a script, a command goes on to its end."""
    go_on = threading.Event()
    platform.action("hold")(lambda _: go_on.wait(20))
    words = ["sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh", *PROGRAM, "execute", "hold"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(platform.requests) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        go_on.set()
        assert process.communicate(timeout=20) == ("true\n", "")
    assert process.returncode == 0


def in_a_shell(line: str) -> tuple[int, str, str]:
    """Run a line as somebody who has pasted it into a shell; its exit code, stdout and stderr."""
    words = ["sh", "-c", line]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "action_id", ["act_1", "-V1StGXR8_Z5", "--help", "-v", "--", "it's", 'a"b', "$HOME", "`id`", ";id", "*", "é☃", "@x"]
)
def test_the_command_that_collects_works_when_pasted(action_id: str, tmp_path: Path) -> None:
    """Whatever the id, the platform and the token's file are, the printed command collects the result."""
    file = tmp_path / "my 'token'"
    file.write_text(TOKEN, encoding="utf-8")
    with Server() as server:
        server.always("POST", reply(200, {"id": action_id}))
        server.always("GET", running)
        target = ("--base-url", server.url, "--auth-token-file", str(file))
        code, _, err = shell("", "execute", "x", "--timeout", "100ms", *target)
        assert code == 4
        said, _, line = err.splitlines()[1].partition(f"{action_id}: ")
        assert said == "To collect the result of action "
        server.always("GET", reply(200, {"id": action_id, "status": "COMPLETED", "result": 42}))
        assert in_a_shell(line) == (0, "42\n", "")
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("arguments", [("status", "act_1"), ("result", "act_1"), ("start", "x"), ("execute", "x")])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_nothing_is_said_of_an_action_that_nobody_has_seen(
    platform: LocalPlatform, arguments: tuple[str, ...], status: int, run: Run
) -> None:
    """Where the platform has confirmed no action, the refusal is all that is said."""
    platform.fail_next(status)
    code, out, err = run(*arguments)
    assert (code, out) == (3, "")
    assert re.fullmatch(rf"zamp-sdk: (starting the action|asking for action act_1): HTTP {status} .*\n", err)


def test_nothing_is_said_of_an_action_where_nothing_listens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing listens, the error is all that is said."""
    monkeypatch.setenv("ZAMP_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("ZAMP_AUTH_TOKEN", TOKEN)
    code, out, err = run("status", "no_such_action")
    assert (code, out) == (3, "")
    assert re.fullmatch(r"zamp-sdk: asking for action no_such_action: cannot connect to .*\n", err)


@pytest.mark.parametrize(
    ("post", "get"),
    [
        (reply(200, {"id": "act_1"}), reply(401, {"error": "the token has expired"})),
        (reply(200, {"id": "act_1"}), reply(404)),
        (reply(200, {"id": "act_1", "error": "half done"}), running),
    ],
)
def test_after_a_start_each_error_says_how_to_collect(
    post: Any, get: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this command has started is not lost, whatever goes wrong later."""
    monkeypatch.setattr(lifecycle, "POLL_NOT_FOUND_GRACE", 0.0)
    monkeypatch.setenv("ZAMP_AUTH_TOKEN", TOKEN)
    with Server() as server:
        server.always("POST", post)
        server.always("GET", get)
        monkeypatch.setenv("ZAMP_BASE_URL", server.url)
        code, out, err = run("execute", "x")
    assert (code, out) == (3, "")
    error, line = err.splitlines(keepends=True)
    assert error.startswith("zamp-sdk: ")
    assert re.fullmatch(COLLECT, line)


def test_a_fault_of_ours_loses_no_action(
    platform: LocalPlatform, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault in the command line itself is a traceback, and how to collect the result is said all the same."""
    monkeypatch.setattr(cli, "_json", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("execute", "echo")
    assert re.fullmatch(COLLECT, capsys.readouterr().err)


PYTHONS = re.compile(
    r"[a-z]+_(url|token|name|interval|attempts|coefficient|timeout)\b|get_handle|ActionExecutor|\.\.\.\)"
)
"""How Python names what the command line names otherwise."""


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (
            ("status", "a"),
            {"ZAMP_BASE_URL": ""},
            "ZAMP_BASE_URL is not set: set it in the environment, or give --base-url",
        ),
        (
            ("execute", "x"),
            {"ZAMP_AUTH_TOKEN": " "},
            "ZAMP_AUTH_TOKEN is not set: set it in the environment, or give --auth-token-file",
        ),
        (("start", "x"), {"ZAMP_BASE_URL": "api.zamp.ai"}, "the base URL has no scheme"),
        (("start", "x", "--base-url", "https://u:p@x"), {}, "the base URL must be like https://host"),
        (("start", "x", "--base-url", "https://a..b"), {}, "the base URL has a host name that cannot be looked up"),
        (("start", "x"), {"ZAMP_AUTH_TOKEN": "a b"}, "the token must be printable ASCII"),
        (("start", " "), {}, "ACTION must not be empty"),
        (("start", "x", "--start-to-close", "0"), {}, "--start-to-close must be over zero"),
        (("start", "x", "--maximum-attempts", "-1"), {}, "--maximum-attempts must not be negative"),
        (("start", "x", "--backoff-coefficient", "0.5"), {}, "--backoff-coefficient must be a finite number"),
        (("start", "x", "--initial-interval", "1h"), {}, "--maximum-interval must not be under --initial-interval"),
        (("status", "act_1", "--base-url", "HERE"), {"ZAMP_AUTH_TOKEN": "wrong"}, "check the token"),
        (("start", "no_such_action"), {}, "check the action's name, and the base URL"),
        (("status", "no_such_action"), {}, "check the id, and that the base URL is of the platform"),
        (("start", "x", "[NaN]"), {}, "params[0]: "),
        (("execute", "wait", "1", "--timeout", "100ms"), {}, "had not ended after"),
    ],
)
def test_messages_speak_the_command_lines_language(
    platform: LocalPlatform,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    said: str,
    *,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Messages name options and variables, and none of Python's arguments and calls."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = run(*(platform.base_url if word == "HERE" else word for word in arguments))
    assert code in (2, 3, 4)
    assert out == ""
    assert said in err
    assert not PYTHONS.search(err.replace(sys.executable, ""))


def test_an_error_that_cannot_be_told_keeps_its_exit_code(platform: LocalPlatform) -> None:
    """A full stderr does not turn a failed request into a failed action."""
    words = [sys.executable, "-m", "zamp_sdk", "result", "act_nope"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, stderr=full, check=False, timeout=30).returncode == 3


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("POST", f"it may have started all the same|{COLLECT}"),
        ("GET", COLLECT),
    ],
)
@pytest.mark.usefixtures("platform")
def test_ctrl_c_says_what_is_left_running(
    method: str,
    words: str,
    run: Run,
    interrupt_after: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ctrl-C says what is left running even where it comes while the command's own code runs."""
    interrupt_after(method)
    code, out, err = run("execute", "doze", "60")
    assert (code, out) == (130, "")
    assert re.search(words, err + caplog.text)


def test_serve_runs_the_users_own_platform(tmp_path: Path) -> None:
    """The user's own platform is served until Ctrl-C, and says how to reach it."""
    (tmp_path / "mine.py").write_text(
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "platform = LocalPlatform()\n"
        "@platform.action\n"
        "def double(params): return 2 * params\n",
        encoding="utf-8",
    )
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        line = server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        variables = {name: value for name, _, value in (pair.partition("=") for pair in line.split()[1:])}
        with command("execute", "double", "21", variables=variables) as process:
            assert process.communicate(timeout=20) == ("42\n", "")
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=20)
    assert (server.returncode, err) == (0, "Serving double; Ctrl-C ends it.\n")


@pytest.mark.parametrize("number", ENDS)
def test_serve_ends_well_when_it_is_asked_to(number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and SIGHUP are how a server is meant to end: exit code 0."""
    with command("serve") as server:
        assert server.stdout.readline().startswith("export ")  # type: ignore[union-attr]  # a pipe
        server.send_signal(number)
        server.communicate(timeout=20)
    assert server.returncode == 0


def test_a_signal_that_does_not_wake_the_event_loop_is_noticed(tmp_path: Path) -> None:
    """A signal counts also where it comes to another thread, or just before the event loop begins to wait."""
    (tmp_path / "mine.py").write_text(
        "import signal, threading\n"
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "platform = LocalPlatform()\n"
        "@platform.action\n"
        "def end(params): signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n",
        encoding="utf-8",
    )
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        line = server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        variables = {name: value for name, _, value in (pair.partition("=") for pair in line.split()[1:])}
        shell("", "start", "end", **variables)  # the server may end before its reply
        server.communicate(timeout=20)
    assert server.returncode == 0


def test_serve_ends_as_process_1_of_a_container() -> None:
    """As process 1, for which the system ignores what a program does not handle, serve ends at SIGTERM."""
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], check=False).returncode != 0:
        pytest.skip("needs unshare, and the right to use it")
    with subprocess.Popen(
        [*words, *PROGRAM, "serve"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline().startswith("export ")  # type: ignore[union-attr]  # a pipe
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
            os.kill(int(children), signal.SIGTERM)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, "Traceback" in err) == (0, False)


@pytest.mark.parametrize(
    ("module", "code", "out", "err"),
    [
        ("mine", 0, "42\n", "Serving double; Ctrl-C ends it.\n"),
        ("none", 1, "", "zamp-sdk: cannot load 'none:platform'"),
    ],
)
def test_serve_in_a_script(tmp_path: Path, module: str, code: int, out: str, err: str) -> None:
    """A script of sh takes the server's variables over and ends it well; where none can be served it ends itself."""
    (tmp_path / "mine.py").write_text(
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "platform = LocalPlatform()\n"
        "@platform.action\n"
        "def double(params): return 2 * params\n",
        encoding="utf-8",
    )
    (tmp_path / "script.sh").write_text(
        "set -e\n"
        "mkfifo serve.env\n"
        f"python3 -m zamp_sdk serve {module}:platform > serve.env &\n"
        "read -r line < serve.env\n"
        'eval "$line"\n'
        "python3 -m zamp_sdk execute double 21\n"
        "kill $!\n"
        "wait $!\n"
        "rm serve.env\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["sh", "script.sh"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(5)", "SystemExit: 5"),
        ("raise SystemExit", "SystemExit"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def (", "SyntaxError: invalid syntax"),
        ("class Skipped(BaseException): pass\nraise Skipped('not today')", "Skipped: not today"),
        ("class Bad(Exception):\n  def __str__(self): raise SystemExit\nraise Bad", "Bad: <"),
        ("raise ValueError('one\\n  two')", "ValueError: one two"),
        ("platform = 1", "mine:platform must be a LocalPlatform, not int"),
        ("from zamp_sdk import local_platform as l; platform = l.LocalPlatform(); platform.start()", "already running"),
    ],
)
def test_a_module_that_cannot_be_served_is_a_message(tmp_path: Path, source: str, reason: str) -> None:
    """What is wrong with the user's own module is a message, no traceback."""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (2, "")
    assert err.startswith(
        ("zamp-sdk: cannot load 'mine:platform' (write MODULE:NAME): ", "zamp-sdk: mine", "zamp-sdk: cannot start")
    )
    assert reason in err
    assert err.count("\n") == 1


def test_verbose_shows_where_a_module_fails(tmp_path: Path) -> None:
    """With -v the traceback of what the user's module raises comes before the message."""
    (tmp_path / "mine.py").write_text("def fail(): raise SystemExit(5)\nfail()\n", encoding="utf-8")
    with command("serve", "mine:platform", "-v", cwd=tmp_path) as server:
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (2, "")
    assert 'mine.py", line 1, in fail' in err
    assert err.endswith("zamp-sdk: cannot load 'mine:platform' (write MODULE:NAME): SystemExit: 5\n")


def test_a_module_may_run_an_event_loop_while_it_loads(tmp_path: Path) -> None:
    """The user's module is loaded as by any other program, outside of an event loop."""
    (tmp_path / "mine.py").write_text(
        "import asyncio\n"
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "platform = LocalPlatform()\n"
        "asyncio.run(asyncio.sleep(0))\n",
        encoding="utf-8",
    )
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        assert server.stdout.readline().startswith("export ")  # type: ignore[union-attr]  # a pipe


def shell(redirection: str, *arguments: str | bytes, **variables: str) -> tuple[int, str, str]:
    """Run a command with a redirection, from a pipe and to pipes; its exit code, stdout and stderr."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        timeout=20,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirection", ["<&-", "2>&-"])
def test_a_process_without_one_of_its_streams_does_its_work(platform: LocalPlatform, redirection: str) -> None:
    """A process that is started without stdin or stderr does its work all the same."""
    assert shell(redirection, "execute", "echo", "1") == (0, "1\n", "")
    code, out, err = shell(redirection, "execute", "echo", "-")
    assert (code, out) == (2, "")
    assert ("stdin is not JSON" in err) == (redirection != "2>&-")


@pytest.mark.parametrize(
    ("redirection", "reason", "name"),
    [(">/dev/full", "No space left on device", "execute"), (">&-", "it is closed", "start")],
)
def test_a_result_that_cannot_be_written_is_exit_code_2(
    platform: LocalPlatform, redirection: str, reason: str, name: str
) -> None:
    """Where stdout is full or closed, the message has the command that collects the result, which works."""
    code, out, err = shell(redirection, name, "echo", "[1]")
    assert (code, out) == (2, "")
    first, second, *more = err.splitlines(keepends=True)
    assert more == []
    assert first == f"zamp-sdk: cannot write to stdout: {reason}\n"
    collect = re.fullmatch(COLLECT, second)
    assert collect is not None
    assert shell("", "result", collect[1]) == (0, "[\n  1\n]\n", "")


def test_an_unread_id_is_told_on_stderr(platform: LocalPlatform) -> None:
    """Where nobody reads the id of what was started, stderr has it."""
    reading, writing = os.pipe()
    os.close(reading)
    with command("start", "echo", stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 141
    assert re.fullmatch(COLLECT, err)


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_stdin_and_stdout_are_utf_8_whatever_the_locale(
    platform: LocalPlatform, variables: dict[str, str], tmp_path: Path
) -> None:
    """What is piped in and out is UTF-8, with or without a byte order mark, as the files of @FILE are."""
    file = tmp_path / "params.json"
    for mark, params, redirection in (("", "-", f"<{file}"), ("\ufeff", "-", f"<{file}"), ("\ufeff", f"@{file}", "")):
        file.write_text(mark + '{"f": "ü☃"}', encoding="utf-8")
        assert shell(redirection, "execute", "echo", params, **variables) == (0, '{\n  "f": "ü☃"\n}\n', "")
    assert {request.body["params"]["f"] for request in platform.requests if request.body} == {"ü☃"}


def test_what_is_no_utf_8_on_stdin_is_refused(platform: LocalPlatform, tmp_path: Path) -> None:
    """Text in another encoding is exit code 2, and nothing is sent."""
    (tmp_path / "params.json").write_bytes('{"f": "ü"}'.encode("latin-1"))
    code, out, err = shell(f"<{tmp_path}/params.json", "execute", "echo", "-")
    assert (code, out) == (2, "")
    assert "stdin is not JSON" in err
    assert platform.requests == []


PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def test_arguments_are_utf_8_whatever_the_locale(platform: LocalPlatform) -> None:
    """Where the locale has no encoding for them, arguments are read as UTF-8."""
    platform.action("grüßen")(lambda params: params)
    words = ("execute", "grüßen", '{"f": "ü☃"}', "--summary", "für Ü")
    assert shell("", *words, **PLAIN_C) == (0, '{\n  "f": "ü☃"\n}\n', "")
    body = platform.requests[0].body
    assert (body["summary"], body["params"]) == ("für Ü", {"f": "ü☃"})


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (("start", "echo", "1", "--summary", b"f\xfcr"), "--summary"),
        (("start", "echo", b'"\xfc"'), "PARAMS"),
        (("start", b"\xfc"), "ACTION"),
        (("status", b"\xfc"), "ID"),
    ],
)
@pytest.mark.parametrize("variables", [{}, PLAIN_C])
def test_arguments_that_are_not_utf_8_are_refused(
    platform: LocalPlatform, arguments: tuple[Any, ...], argument: str, variables: dict[str, str]
) -> None:
    """What is in no known encoding is exit code 2, a message that says what to do, and nothing is sent."""
    code, out, err = shell("", *arguments, **variables)
    assert (code, out) == (2, "")
    assert f"argument {argument}: not in UTF-8 (write it in UTF-8, or set LC_ALL to its encoding)" in err
    assert platform.requests == []


def test_files_may_have_any_name(platform: LocalPlatform, tmp_path: Path) -> None:
    """The names of files are taken as they are, whatever the locale."""
    (tmp_path / "tökén").write_text(platform.auth_token, encoding="utf-8")
    (tmp_path / "pärams").write_text("[1]", encoding="utf-8")
    words = ("execute", "echo", f"@{tmp_path}/pärams", "--auth-token-file", f"{tmp_path}/tökén")
    assert shell("", *words, **PLAIN_C, ZAMP_AUTH_TOKEN="") == (0, "[\n  1\n]\n", "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_token_file_may_have_a_byte_order_mark(
    platform: LocalPlatform, run: Run, tmp_path: Path, encoding: str
) -> None:
    """A file that an editor has marked as UTF-8 holds the same token."""
    (tmp_path / "token").write_text(f"{platform.auth_token}\r\n", encoding=encoding)
    assert run("execute", "echo", "1", "--auth-token-file", str(tmp_path / "token")) == (0, "1\n", "")


def test_a_token_file_in_another_encoding_is_refused(platform: LocalPlatform, run: Run, tmp_path: Path) -> None:
    """What PowerShell writes with > is refused by a message that says what to do, without the token."""
    file = tmp_path / "token"
    file.write_text("s3cret-token", encoding="utf-16")
    code, out, err = run("execute", "echo", "1", "--auth-token-file", str(file))
    assert (code, out) == (2, "")
    assert err == f"zamp-sdk: {file} is not in UTF-8: write the token into it as plain text\n"
    assert platform.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("execute", "echo", "1", "--auth-token", "sk_live_x"),
        ("execute", "echo", "1", "--auth-token=sk_live_x"),
        ("execute", "--auth-token", "sk_live_x", "echo", "1"),
        ("execute", "--auth-token", "sk_live_x", "{}"),
        ("execute", "echo", "1", "--auth-token-f", "sk_live_x"),
        ("--auth-token", "sk_live_x", "execute", "echo", "1"),
        ("--auth-token=sk_live_x", "execute", "echo", "1"),
        ("--token", "sk_live_x", "result", "act_1"),
        ("result", "act_1", "--token", "-sk_live_x"),
        ("result", "act_1", "-sk_live"),
        ("result", "act_1", "sk_live_x"),
        ("sk_live_x",),
        ("serve", "--auth-token", "sk_live_x"),
        ("serve", "--port", "sk_live_x"),
        ("execute", "echo", "1", "--timeout", "sk_live_x"),
        ("execute", "echo", "1", "--maximum-attempts", "sk_live_x"),
        ("execute", "echo", "1", "--backoff-coefficient=sk_live_x"),
        ("-vsk_live_x", "execute", "echo", "1"),
        ("execute", "echo", "1", "--verbose=sk_live_x"),
    ],
)
def test_what_may_be_a_token_is_never_repeated(platform: LocalPlatform, run: Run, arguments: tuple[str, ...]) -> None:
    """The value of an option that does not exist is not shown, and nothing is sent."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "sk_live" not in err
    assert platform.requests == []


def test_an_unknown_option_is_named(run: Run) -> None:
    """The option itself is shown."""
    _, _, err = run("execute", "echo", "1", "--auth-token=sk_live_x", "--colour", "red")
    assert err.endswith("error: unrecognized arguments --auth-token --colour\n")


def test_no_command_prints_the_help(run: Run) -> None:
    """Without a command the help is on stdout, and the exit code is that of a wrong usage."""
    code, out, err = run()
    assert (code, err) == (2, "")
    assert run("--help") == (0, out, "")
    assert "COMMAND" in out
    assert "Exit codes: 0 done" in out


@pytest.mark.parametrize(
    ("argv", "name", "command"),
    [
        ("/venv/bin/zamp-sdk", "zamp-sdk", "/venv/bin/zamp-sdk"),
        ("/my venv/zamp-sdk", "zamp-sdk", "'/my venv/zamp-sdk'"),
        ("/x/zamp_sdk/__main__.py", f"{Path(sys.executable).name} -m zamp_sdk", f"{sys.executable} -m zamp_sdk"),
    ],
)
@pytest.mark.usefixtures("platform")
def test_the_program_is_named_as_it_can_be_called(
    argv: str, name: str, command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help has the program's name, and the command that collects a result can be copied as it stands."""
    monkeypatch.setattr(sys, "argv", [argv, "execute"])
    assert run("--help")[1].startswith(f"usage: {name} ")
    assert f"example:\n  {name} start " in run("start", "--help")[1]
    _, _, err = run("execute", "wait", "0.2", "--timeout", "50ms")
    assert re.search(rf"To collect the result of action (act\w+): {re.escape(command)} result \1\n$", err)


@pytest.mark.parametrize("name", ["execute", "start"])
def test_the_help_tells_the_policy_that_is_really_sent(platform: LocalPlatform, run: Run, name: str) -> None:
    """Without an option of the policy none is sent; with one, the others are those that the help names."""
    helped = " ".join(run(name, "--help")[1].split())
    assert "Without any of these none is sent" in helped
    assert "the others are sent as 30s, 11, 15m and 1.5." in helped
    run(name, "echo")
    run(name, "echo", "{}", "--maximum-attempts", "11")
    plain, with_policy = (request.body for request in platform.requests if request.method == "POST")
    assert "retry_policy" not in plain
    assert with_policy["retry_policy"] == {
        "initial_interval": "PT30S",
        "maximum_attempts": 11,
        "maximum_interval": "PT15M",
        "backoff_coefficient": 1.5,
    }


@pytest.mark.parametrize("arguments", [("-v", "execute", "echo"), ("execute", "echo", "--verbose")])
def test_verbose_shows_the_requests(platform: LocalPlatform, arguments: tuple[str, ...]) -> None:
    """With -v, before or after the command, each request is a line on stderr; the result alone is on stdout."""
    code, out, err = shell("", *arguments)
    assert (code, out) == (0, "{}\n")
    assert re.search(r"^zamp-sdk: POST .*/actions", err, re.MULTILINE)
    assert re.search(r"^zamp-sdk: GET .*/actions/act_", err, re.MULTILINE)
    assert platform.auth_token not in err


def test_serve_listens_where_it_is_told(unused_port: int) -> None:
    """--port is where the platform listens; a port that is taken is exit code 2."""
    with command("serve", "--port", str(unused_port)) as server:
        assert f"http://127.0.0.1:{unused_port} " in server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        code, _, err = shell("", "serve", "--port", str(unused_port))
        assert code == 2
        assert err == f"zamp-sdk: cannot start the platform on port {unused_port}: {os.strerror(errno.EADDRINUSE)}\n"


def test_serve_shows_the_traceback_of_a_failed_attempt(tmp_path: Path) -> None:
    """Who writes actions sees where they fail."""
    (tmp_path / "mine.py").write_text(
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "platform = LocalPlatform()\n"
        "@platform.action\n"
        "def divide(params): return 1 / params\n",
        encoding="utf-8",
    )
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        line = server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        variables = {name: value for name, _, value in (pair.partition("=") for pair in line.split()[1:])}
        assert shell("", "execute", "divide", "0", **variables)[0] == 1
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=20)
    assert re.search(r"^zamp-sdk: attempt 1 of action act_\w+ \('divide'\) failed$", err, re.MULTILINE)
    assert 'mine.py", line 4, in divide' in err


@pytest.fixture
def unused_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def test_the_demo_leaves_this_machine_by_no_proxy() -> None:
    """Whatever proxies the environment names, and in whichever case, the demo asks none."""
    with Server() as proxy:
        names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        variables = {**dict.fromkeys(names, proxy.url), "no_proxy": "", "NO_PROXY": "example.com"}
        code, out, _ = await asyncio.to_thread(shell, "", "demo", **variables)
        assert (code, proxy.connections) == (0, 0)
    assert "ActionFailedError" in out


@pytest.mark.parametrize(
    ("result", "printed", "told"),
    [
        ("[1e999, -1e999]", "[\n  null,\n  null\n]\n", True),
        ('{"a": {"b": [NaN]}}', '{\n  "a": {\n    "b": [\n      null\n    ]\n  }\n}\n', True),
        (r'"\ud800é"', '"\\ud800é"\n', False),
        (r'"\ud83d\ude00"', '"😀"\n', False),
    ],
)
def test_a_printed_result_is_valid_json(result: str, printed: str, told: bool, run: Run, tmp_path: Path) -> None:
    """What JSON or UTF-8 cannot hold is printed as null, which stderr says, or escaped."""
    with Server() as server:
        server.always("POST", reply(200, {"id": "act_1"}))
        server.always("GET", reply(200, f'{{"id": "act_1", "status": "COMPLETED", "result": {result}}}'.encode()))
        (tmp_path / "token").write_text(TOKEN, encoding="utf-8")
        target = ("--base-url", server.url, "--auth-token-file", f"{tmp_path}/token")
        code, out, err = run("result", "act_1", *target)
    assert (code, out) == (0, printed)
    assert ("not finite" in err) == told
    json.loads(out, parse_constant=pytest.fail)


def test_without_a_module_the_demo_is_served() -> None:
    """Without a module, the demo's actions are served."""
    with command("serve") as server:
        line = server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        server.send_signal(signal.SIGINT)
        assert "send_invoice" in server.communicate(timeout=20)[1]
    assert line.startswith("export ZAMP_BASE_URL=http://127.0.0.1:")


def test_a_reader_that_has_gone_away_is_exit_code_141(platform: LocalPlatform) -> None:
    """A reader of stdout that has gone away causes no message and no traceback, as where SIGPIPE ends a program."""
    reading, writing = os.pipe()
    os.close(reading)
    with command("execute", "echo", json.dumps("x" * 100_000), stdout=writing) as process:
        os.close(writing)
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 141


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """Run a command whose stderr is a terminal; its stdout, and what the terminal was sent."""
    try:
        leader, follower = pty.openpty()
    except OSError as exc:
        pytest.skip(f"this machine has no pseudo-terminal to give: {exc}")
    with command(*arguments, stderr=follower) as process:
        os.close(follower)
        out, _ = process.communicate(timeout=20)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    return out, shown


def test_a_terminal_shows_the_progress_until_the_end(platform: LocalPlatform) -> None:
    """On a terminal a line tells status, time and next request, and is gone at the end."""
    out, shown = on_a_terminal("execute", "wait", "0.6")
    assert out == "null\n"
    assert re.search(r"\r\x1b\[KRUNNING  0\.\d s, next request in 0\.\d s", shown)
    assert shown.endswith("\r\x1b[K")


def test_a_terminal_shows_that_a_request_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a platform limits how fast it is asked, the line says so, while an action starts and while it runs."""
    with LocalPlatform(rate_limit=1) as platform:
        platform.action("echo")(lambda params: params)
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        platform.fail_next(429, retry_after=1, only="start")
        out, shown = on_a_terminal("execute", "echo")
    assert out == "{}\n"
    for doing in ("starting", "RUNNING"):
        assert f"\x1b[K{doing}, waiting for its turn in a line of 1  " in shown


def test_the_progress_line_is_redrawn(platform: LocalPlatform, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is drawn anew while it waits, and wiped at the end."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run("execute", "wait", "0.5")
    assert (code, out) == (0, "null\n")
    assert err.count("\r\x1b[KRUNNING") >= 2
    assert err.endswith("\r\x1b[K")
