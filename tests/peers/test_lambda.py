"""In AWS Lambda's own Python runtime client, awslambdaric: the layer, one event loop an invocation, frozen processes.

The Runtime API, which the client talks to, is played here. Lambda freezes a process once it has answered and asks for
the next invocation, and thaws it when there is one; SIGSTOP and SIGCONT do the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.peers.venvs import venv
from tests.servers import RESULT, TOKEN, Server
from tests.test_layer import build, check_out
from zamp_sdk.local_platform import LocalPlatform

PATIENCE = 20.0  # s

# The README's examples, in short: execute, and the two halves of starting here and collecting there.
FUNCTION = """
import asyncio

import zamp_sdk
from zamp_sdk import ActionExecutor

print("zamp_sdk is", zamp_sdk.__file__)


def execute(event, context):
    return asyncio.run(ActionExecutor.execute("double", event))


def start(event, context):
    return asyncio.run(ActionExecutor.start("double", event)).id


def collect(event, context):
    return asyncio.run(ActionExecutor.get_handle(event).result())
"""


class RuntimeApi(socketserver.ThreadingTCPServer):
    """Lambda's Runtime API for one process (https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.idle = threading.Semaphore(0)  # one more for each time that the process asks for an invocation
        self.events: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()


@contextlib.contextmanager
def runtime_api() -> Iterator[RuntimeApi]:
    """Serve the Runtime API for the time of the block."""
    with RuntimeApi() as api:
        thread = threading.Thread(target=api.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield api
        finally:
            api.events.put(None)
            api.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RuntimeApi

    def do_GET(self) -> None:
        """Wait for an invocation, and hand it out."""
        assert self.path == "/2018-06-01/runtime/invocation/next"
        self.server.idle.release()
        invocation = self.server.events.get()
        if invocation is None:
            self.close_connection = True
            return
        request_id, event = invocation
        self._reply(
            200,
            json.dumps(event).encode(),
            {
                "Content-Type": "application/json",
                "Lambda-Runtime-Aws-Request-Id": request_id,
                "Lambda-Runtime-Deadline-Ms": "4102444800000",
                "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:123456789012:function:test",
            },
        )

    def do_POST(self) -> None:
        """Take an answer or an error."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answers.put((self.path, json.loads(body)))
        self._reply(202, b"", {})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class named it
        pass  # the base class writes to stderr


class Function:
    """A process of a Lambda function."""

    def __init__(self, process: subprocess.Popen[bytes], api: RuntimeApi) -> None:
        self._process = process
        self._api = api
        self._invocations = 0

    def _wait_until_idle(self) -> None:
        assert self._api.idle.acquire(timeout=PATIENCE)

    def invoke(self, event: Any) -> Any:
        """Hand an event to the handler and return its answer."""
        self._wait_until_idle()
        self._invocations += 1
        request_id = f"request-{self._invocations}"
        self._api.events.put((request_id, event))
        path, answer = self._api.answers.get(timeout=PATIENCE)
        assert path == f"/2018-06-01/runtime/invocation/{request_id}/response", answer
        return answer

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the process between two invocations, for the time of the block."""
        self._wait_until_idle()
        os.kill(self._process.pid, signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield
        os.kill(self._process.pid, signal.SIGCONT)
        self._api.idle.release()


@contextlib.contextmanager
def running(handler: str, python: Path, layer: Path, base_url: str, task: Path) -> Iterator[Function]:
    """Run a handler with the layer on its path, as Lambda does; it may print nothing but where the layer is."""
    (task / "function.py").write_text(FUNCTION)
    log = task / "log"
    with runtime_api() as api, log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "awslambdaric", f"function.{handler}"],
            cwd=task,
            stdout=output,
            stderr=output,
            env={
                "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_address[1]}",
                "AWS_EXECUTION_ENV": f"AWS_Lambda_python{sys.version_info[0]}.{sys.version_info[1]}",
                "LAMBDA_TASK_ROOT": str(task),
                "PYTHONPATH": str(layer / "python"),
                "PYTHONUNBUFFERED": "1",
                "ZAMP_BASE_URL": base_url,
                "ZAMP_AUTH_TOKEN": TOKEN,
            },
        )
        try:
            yield Function(process, api)
        finally:
            process.kill()
            process.wait()
    assert log.read_text().splitlines() == [f"zamp_sdk is {layer}/python/zamp_sdk/__init__.py"]


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the runtime client."""
    return venv("lambda", "awslambdaric")


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked layer."""
    folder = tmp_path_factory.mktemp("layer")
    with zipfile.ZipFile(build(check_out(folder / "checkout"))) as archive:
        archive.extractall(folder / "opt")
    return folder / "opt"


def close_idle_connections(server: Server) -> None:
    """Close every connection, none of which has a request under way, and wait until they are closed."""
    with server._lock:
        for sock in server._wires.values():
            sock.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + PATIENCE
    while server.open_connections and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.open_connections == 0


def test_three_invocations_with_a_freeze(python: Path, layer: Path, tmp_path: Path) -> None:
    """One process answers three invocations, although the platform closes its idle connections while it is frozen."""
    with Server() as platform, running("execute", python, layer, platform.url, tmp_path) as function:
        assert function.invoke({"n": 1}) == RESULT
        assert function.invoke({"n": 2}) == RESULT
        with function.frozen():
            assert platform.open_connections > 0
            close_idle_connections(platform)
        assert function.invoke({"n": 3}) == RESULT

    assert platform.count("POST") == 3


def test_start_in_one_function_and_collect_in_another(python: Path, layer: Path, tmp_path: Path) -> None:
    """The id that one function returns is enough for another, in a process of its own, to return the result."""
    platform = LocalPlatform(auth_token=TOKEN)
    platform.action("double")(lambda params: params["n"] * 2)
    tasks = {handler: tmp_path / handler for handler in ("start", "collect")}
    for task in tasks.values():
        task.mkdir()

    with platform:
        with running("start", python, layer, platform.base_url, tasks["start"]) as starter:
            action_id = starter.invoke({"n": 4})
        with running("collect", python, layer, platform.base_url, tasks["collect"]) as collector:
            assert collector.invoke(action_id) == 8
            assert collector.invoke(action_id) == 8
