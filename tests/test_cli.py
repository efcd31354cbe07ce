"""The command line: what it prints where, and with which exit code it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.servers import Server, eventually, silent
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


def test_execute(platform: LocalPlatform, run: Run) -> None:
    """The result is JSON on stdout, and stderr stays empty where nobody watches."""
    assert run("execute", "echo", '{"a": "é"}') == (0, '{\n  "a": "é"\n}\n', "")


def test_options_arrive(platform: LocalPlatform, run: Run) -> None:
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


def test_params_from_a_file_or_stdin(
    platform: LocalPlatform, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Params come from a file, from stdin, or are an empty object."""
    (tmp_path / "params.json").write_text("[1]", encoding="utf-8")
    assert run("execute", "echo", f"@{tmp_path}/params.json")[1] == "[\n  1\n]\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("2"))
    assert run("execute", "echo", "-")[1] == "2\n"
    assert run("execute", "echo")[1] == "{}\n"


def test_start_status_result(platform: LocalPlatform, run: Run) -> None:
    """An action started by one command is looked at and collected by others."""
    code, action_id, _ = run("start", "echo", "[]")
    assert code == 0
    assert run("result", action_id.strip()) == (0, "[]\n", "")
    assert run("status", action_id.strip()) == (0, "COMPLETED\n", "")


def test_failed_action(platform: LocalPlatform, run: Run) -> None:
    """A failed action is exit code 1 and the platform's reason."""
    code, out, err = run("execute", "fail")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"zamp-sdk: action act\S+ \(fail\) ended as FAILED: ValueError: boom\n", err)


def test_wait_that_is_over(platform: LocalPlatform, run: Run) -> None:
    """A wait that is over is exit code 4, and the command that collects the result."""
    code, out, err = run("execute", "wait", "0.5", "--timeout", "100ms")
    assert (code, out) == (4, "")
    assert re.search(r"python -m zamp_sdk result act\S+\n$", err)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
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
def test_usage(platform: LocalPlatform, run: Run, arguments: tuple[str, ...]) -> None:
    """What a user can get wrong is exit code 2 and a message, before anything is sent."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err
    assert "Traceback" not in err
    assert platform.requests == []


def test_missing_configuration(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing configuration is exit code 2 and a sentence."""
    monkeypatch.delenv("ZAMP_BASE_URL", raising=False)
    code, _, err = run("status", "act-1")
    assert code == 2
    assert err.startswith("zamp-sdk: ZAMP_BASE_URL is not set: ")


def test_token_file(platform: LocalPlatform, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_unknown_id(platform: LocalPlatform, run: Run) -> None:
    """An id that the platform does not know is exit code 3."""
    code, _, err = run("result", "act-unknown")
    assert code == 3
    assert "HTTP 404" in err
    assert "goes on" not in err


@pytest.mark.parametrize("command", ["execute", "start", "status", "result", "serve", "demo"])
def test_help(run: Run, command: str) -> None:
    """Every command's help has an example."""
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"example:\n  python -m zamp_sdk {command}" in out


def test_version(run: Run) -> None:
    """The version is told."""
    assert run("--version") == (0, f"zamp-sdk {__version__}\n", "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("1.5s", 1.5), ("500ms", 0.5), ("10m", 600), ("1h", 3600), ("2d", 172800), (".5", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    """A duration is a number, in seconds or with its unit."""
    assert cli._duration(text).total_seconds() == seconds


@contextlib.contextmanager
def command(
    *arguments: str, variables: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a process of its own, with warnings as errors; it does not outlive the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(variables or {})}
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "zamp_sdk", *arguments],
        text=True,
        env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_demo(run: Run) -> None:
    """The demo shows a result, a result on the third attempt and an error, and ends well."""
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert '{"sent": true, "invoice_id": "inv_123"}' in out
    assert '{"pages": 12, "attempts": 3}' in out
    assert "ActionFailedError: action act" in out
    assert out.count(">>> await ActionExecutor.execute(") == 3
    assert out.count("RUNNING") >= 2


def test_interrupted_wait(platform: LocalPlatform) -> None:
    """Ctrl-C while waiting is exit code 130, and prints the command that collects the result."""
    with command("execute", "wait", "2") as process:
        while len(platform.requests) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert re.search(r"Action (act\S+) goes on. To collect its result: python -m zamp_sdk result \1\n$", err)


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
def test_interrupted_anywhere(
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


async def test_interrupted_while_starting() -> None:
    """What the library warns of reaches the terminal: the action may have started all the same."""
    with Server() as server:
        server.always("POST", silent)
        with command("execute", "x", variables={"ZAMP_BASE_URL": server.url, "ZAMP_AUTH_TOKEN": "t"}) as process:
            await eventually(lambda: server.count("POST") == 1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    said = "zamp-sdk: cancelled while starting action 'x': it may have started all the same\n"
    assert (process.returncode, out, err) == (130, "", said)


def test_serve(tmp_path: Path) -> None:
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
def test_serve_a_module_that_cannot_be_served(tmp_path: Path, source: str, reason: str) -> None:
    """What is wrong with the user's own module is a message, no traceback."""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with command("serve", "mine:platform", cwd=tmp_path) as server:
        out, err = server.communicate(timeout=20)
    assert (server.returncode, out) == (2, "")
    assert err.startswith("zamp-sdk: ")
    assert reason in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream(platform: LocalPlatform, redirection: str) -> None:
    """A process that is started without stdin, stdout or stderr does its work all the same."""

    def run(params: str) -> tuple[int, str, str]:
        python = [sys.executable, "-X", "dev", "-W", "error", "-m", "zamp_sdk", "execute", "echo", params]
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *python]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=20, check=False
        )
        return done.returncode, done.stdout, done.stderr

    assert run("1") == (0, "" if redirection == ">&-" else "1\n", "")
    code, out, err = run("-")
    assert (code, out) == (2, "")
    assert ("stdin is not JSON" in err) == (redirection != "2>&-")


def test_serve_the_demo() -> None:
    """Without a module, the demo's actions are served."""
    with command("serve") as server:
        line = server.stdout.readline()  # type: ignore[union-attr]  # a pipe
        server.send_signal(signal.SIGINT)
        assert "send_invoice" in server.communicate(timeout=20)[1]
    assert line.startswith("export ZAMP_BASE_URL=http://127.0.0.1:")


def test_closed_stdout(platform: LocalPlatform) -> None:
    """A reader of stdout that has gone away causes no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with command("execute", "echo", json.dumps("x" * 100_000), stdout=writing) as process:
        os.close(writing)
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_progress_on_a_terminal(platform: LocalPlatform) -> None:
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


def test_a_terminal_without_unicode(run: Run, platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stdout cannot say a character, JSON's escapes do."""
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    cli._print_json("é")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b'"\\u00e9"\n'
