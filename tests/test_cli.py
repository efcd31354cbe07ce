"""The command line: what it prints where, and with which exit code it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.servers import TOKEN, Server, eventually, reply, silent
from zamp_sdk import __version__, cli
from zamp_sdk.local_platform import LocalPlatform

ROOT = Path(__file__).parent.parent


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalPlatform]:
    """A running platform, to which the environment points."""
    platform = LocalPlatform(time_scale=0.001)
    platform.action("echo")(lambda params: params)
    platform.action("wait")(time.sleep)

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
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "zamp_sdk"], raising=False)


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
    assert re.search(r"python -m zamp_sdk result act\S+\n$", err)


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
    assert f"example:\n  python -m zamp_sdk {command}" in out


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
CALLED = re.escape(shlex.join([sys.executable if sys.version_info >= (3, 10) else "python", "-m", "zamp_sdk"]))


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


def test_ctrl_c_while_waiting_is_exit_code_130(platform: LocalPlatform) -> None:
    """Ctrl-C while waiting is exit code 130, and prints the command that collects the result."""
    with command("execute", "wait", "2") as process:
        while len(platform.requests) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert re.search(rf"Action (act\S+) goes on. To collect its result: {CALLED} result \1\n$", err)


def test_the_command_that_collects_has_the_options_of_the_one_that_started(
    platform: LocalPlatform, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed to collect a result later works as it is, with the same platform and the same token file."""
    file = tmp_path / "my token"
    file.write_text(platform.auth_token)
    monkeypatch.delenv("ZAMP_AUTH_TOKEN")
    target = ("--base-url", platform.base_url, "--auth-token-file", str(file))
    code, _, err = run("execute", "wait", "0.5", "--timeout", "100ms", *target)
    assert code == 4
    command = shlex.split(err.rpartition("python -m zamp_sdk ")[2])
    assert command[2:] == list(target)
    assert run(*command)[0] == 0


def test_an_error_that_cannot_be_told_keeps_its_exit_code(platform: LocalPlatform) -> None:
    """A full stderr does not turn a failed request into a failed action."""
    words = [sys.executable, "-m", "zamp_sdk", "result", "act_nope"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, stderr=full, check=False, timeout=30).returncode == 3


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("POST", "it may have started all the same|goes on. To collect its result"),
        ("GET", "goes on. To collect its result: python -m zamp_sdk result act"),
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
    """Ctrl-C says what is left running even where it is raised inside the task."""
    interrupt_after(method)
    code, out, err = run("execute", "wait", "2")
    assert (code, out) == (130, "")
    assert re.search(words, err + caplog.text)


async def test_ctrl_c_while_starting_tells_the_doubt() -> None:
    """What the library warns of reaches the terminal: the action may have started all the same."""
    with Server() as server:
        server.always("POST", silent)
        with command("execute", "x", variables={"ZAMP_BASE_URL": server.url, "ZAMP_AUTH_TOKEN": "t"}) as process:
            await eventually(lambda: server.count("POST") == 1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    said = "zamp-sdk: cancelled while starting action 'x': it may have started all the same\n"
    assert (process.returncode, out, err) == (130, "", said)


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
    assert (server.returncode, err) == (130, "Serving double; Ctrl-C ends it.\n")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("1 / 0", "cannot load 'mine:platform' (write MODULE:NAME): ZeroDivisionError: division by zero"),
        ("from zamp_sdk import local_platform as l; platform = l.LocalPlatform(); platform.start()", "already running"),
    ],
)
def test_a_module_that_cannot_be_served_is_a_message(tmp_path: Path, source: str, reason: str) -> None:
    """What is wrong with the user's own module is a message, no traceback."""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (2, "")
    assert err.startswith("zamp-sdk: ")
    assert reason in err
    assert err.count("\n") == 1


def shell(redirection: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
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
    first, second = err.splitlines()
    assert first == f"zamp-sdk: cannot write to stdout: {reason}"
    collect = re.fullmatch(rf"To collect the result: {CALLED} (result act\w+)", second)
    assert collect is not None
    assert shell("", *collect[1].split()) == (0, "[\n  1\n]\n", "")


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("execute", "--help"), ()])
def test_a_help_that_cannot_be_written_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    """What argparse prints is output like any other."""
    code, _, err = shell(">/dev/full", *arguments)
    assert (code, err) == (2, "zamp-sdk: cannot write to stdout: No space left on device\n")


def test_an_unread_id_is_told_on_stderr(platform: LocalPlatform) -> None:
    """Where nobody reads the id of what was started, stderr has it."""
    reading, writing = os.pipe()
    os.close(reading)
    with command("start", "echo", stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 141
    assert re.fullmatch(rf"Action (act\w+) goes on. To collect its result: {CALLED} result \1\n", err)


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
    ],
)
def test_what_may_be_a_token_is_never_repeated(platform: LocalPlatform, run: Run, arguments: tuple[str, ...]) -> None:
    """The value of an option that does not exist is not shown, and nothing is sent."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "sk_live" not in err
    assert platform.requests == []


def test_an_unknown_option_is_named(run: Run) -> None:
    """The option itself is shown, and where a token comes from."""
    _, _, err = run("execute", "echo", "1", "--auth-token=sk_live_x", "--colour", "red")
    assert err.endswith(
        "error: no such option: --auth-token, --colour "
        "(a token comes from ZAMP_AUTH_TOKEN or --auth-token-file: others can read a command line)\n"
    )


def test_a_help_that_nobody_reads_is_exit_code_141() -> None:
    """A reader that has gone away is no error of any command."""
    reading, writing = os.pipe()
    os.close(reading)
    with command("--help", stdout=writing) as process:
        os.close(writing)
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 141


def test_no_command_prints_the_help(run: Run) -> None:
    """Without a command the help is on stdout, and the exit code is that of a wrong usage."""
    code, out, err = run()
    assert (code, err) == (2, "")
    assert run("--help") == (0, out, "")
    assert "COMMAND" in out
    assert "Exit codes: 0 done" in out


@pytest.mark.parametrize(
    ("argv", "interpreter", "name", "command"),
    [
        ("/venv/bin/zamp-sdk", "python", "zamp-sdk", "/venv/bin/zamp-sdk"),
        ("/my venv/zamp-sdk", "python", "zamp-sdk", "'/my venv/zamp-sdk'"),
        ("/x/zamp_sdk/__main__.py", "python3.13", "python3.13 -m zamp_sdk", "python3.13 -m zamp_sdk"),
        ("/x/zamp_sdk/__main__.py", "bin/python", "python -m zamp_sdk", "bin/python -m zamp_sdk"),
    ],
)
@pytest.mark.usefixtures("platform")
def test_the_program_is_named_as_it_was_called(
    argv: str, interpreter: str, name: str, command: str, *, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help has the program's name, and the command that collects a result can be copied as it stands."""
    monkeypatch.setattr(sys, "argv", [argv, "execute"])
    monkeypatch.setattr(sys, "orig_argv", [interpreter, "-m", "zamp_sdk"], raising=False)
    if argv.endswith(".py") and sys.version_info < (3, 10):
        pytest.skip("before Python 3.10 no program knows how its interpreter was called")
    assert run("--help")[1].startswith(f"usage: {name} ")
    assert f"example:\n  {name} start " in run("start", "--help")[1]
    _, _, err = run("execute", "wait", "0.2", "--timeout", "50ms")
    assert re.search(rf"To collect its result: {re.escape(command)} result act\w+\n$", err)


def test_a_script_on_the_path_is_named_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell finds by its name is called by its name."""
    script = tmp_path / "zamp-sdk"
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert cli._program() == ["zamp-sdk"]


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
        assert err == f"zamp-sdk: cannot listen on port {unused_port}: Address already in use\n"


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


def test_a_terminal_shows_the_progress_until_the_end(platform: LocalPlatform) -> None:
    """On a terminal a line tells status, time and next poll, and is gone at the end."""
    leader, follower = pty.openpty()
    with command("execute", "wait", "0.6", stderr=follower) as process:
        os.close(follower)
        assert process.communicate(timeout=20)[0] == "null\n"
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert re.search(r"\r\x1b\[KRUNNING  0\.\d s, next poll in 0\.\d s", shown)
    assert shown.endswith("\r\x1b[K")


def test_the_progress_line_is_redrawn(platform: LocalPlatform, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is drawn anew while it waits, and wiped at the end."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run("execute", "wait", "0.5")
    assert (code, out) == (0, "null\n")
    assert err.count("\r\x1b[KRUNNING") >= 2
    assert err.endswith("\r\x1b[K")
