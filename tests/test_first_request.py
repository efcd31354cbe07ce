"""The first request of a process, which brings most of the package into memory: what else may happen meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import RESULT, TOKEN, Server, reply

ROOT = Path(__file__).resolve().parent.parent


def run(program: str, server: Server, *arguments: str) -> str:
    """Run a program in an interpreter of its own, and return what it printed."""
    environment = {**os.environ, "ZAMP_BASE_URL": server.url, "ZAMP_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_thread_imports_a_module() -> None:
    """Whatever an action needs is imported in the loop's thread: a fork would leave an import half done elsewhere."""
    program = """if True:
        import asyncio, json, sys, threading
        from zamp_sdk import ActionExecutor, HttpClientError

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if threading.current_thread() is not threading.main_thread():
                    imported.append(name)

        async def main():
            await ActionExecutor.execute("an_action", {"rows": ["x" * 1000] * 1000})
            try:
                await ActionExecutor.execute("an_action", {})
            except HttpClientError:
                pass

        imported = []
        sys.meta_path.insert(0, Finder())
        asyncio.run(main())
        print(json.dumps(imported))
    """
    with Server() as server:
        server.on(
            "GET", reply(200, {"status": "RUNNING"}), reply(200, {"status": "COMPLETED", "result": 1}), reply(403)
        )
        assert json.loads(run(program, server)) == []
        assert [request.method for request in server.requests] == ["POST", "GET", "GET", "POST", "GET"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("milliseconds", [0, 2, 4, 7, 10, 14, 18, 25, 40])
def test_a_child_that_is_forked_meanwhile_can_act(milliseconds: int) -> None:
    """A child forked in the loop, as by a pool of processes, at any moment of its first request, has its own."""
    program = """if True:
        import asyncio, os, signal, sys, time
        from zamp_sdk import ActionExecutor

        async def main():
            action = asyncio.ensure_future(ActionExecutor.execute("an_action", {}))
            fork_at = time.monotonic() + int(sys.argv[1]) / 1000
            while time.monotonic() < fork_at:
                await asyncio.sleep(0)
            child = os.fork()
            if not child:
                signal.alarm(10)
                asyncio.run(ActionExecutor.execute("an_action", {}))
                os._exit(0)
            print(await action)
            return child

        child = asyncio.run(main())
        print(os.waitpid(child, 0)[1])
    """
    with Server() as server:
        assert run(program, server, str(milliseconds)) == f"{RESULT}\n0\n"
        assert server.count("POST") == 2
