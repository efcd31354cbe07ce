"""What the tests against real programs share: finding a program, running it on a free port, and ending it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable, NoReturn

import pytest

from tests.conftest import Pace, pool_is_at_rest
from tests.servers import closed_port

# Read here because tests begin without any ZAMP_ variable.
REQUIRED = os.environ.get("ZAMP_TEST_PEERS") == "required"
PATIENCE = 10.0  # s for a program to listen, and to end
PORT_TRIES = 5  # another process may take a free port first


def absent(reason: str) -> NoReturn:
    """Skip the test; where everything must be there, as in continuous integration, fail it."""
    if REQUIRED:
        pytest.fail(reason)
    pytest.skip(reason)


def find_program(name: str, package: str) -> str:
    """Return a program's path; Debian keeps some where only root looks for them."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if path is None:
        absent(f"{name} is not installed: apt-get install {package}")
    return path


@contextlib.contextmanager
def running(command: Callable[[int], Sequence[str]], log: Path) -> Iterator[int]:
    """Run what ``command`` returns for a port, from when it listens there to the end of the block."""
    for _ in range(PORT_TRIES):
        port = closed_port()
        with log.open("ab") as output:
            process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            if _listens(process, port):
                yield port
                return
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    pytest.fail(f"it never listened; its last words: {log.read_text(errors='replace')[-2000:]}")


def run_program(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the shortest program that executes an action, in this environment, with warnings on."""
    program = """if True:
        import asyncio
        from zamp_sdk import ActionExecutor
        print(asyncio.run(ActionExecutor.execute("an_action", {})))
    """
    command = [sys.executable, "-X", "dev", "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process.poll() is None  # or else the port is another process's
        time.sleep(0.01)
    return False


@pytest.fixture(autouse=True)
def quick(pace: Pace) -> Pace:
    """Make retries and polls come fast."""
    return pace


@pytest.fixture(autouse=True)
def no_lease_left(clean_slate: None) -> Iterator[None]:
    """Whatever happens to a request, its connection goes back to the pool or is closed."""
    yield
    assert pool_is_at_rest()
