"""Beside other people's test tools, which replace parts of the standard library for a while.

Each case is a program of its own, whose very first action comes while the tool has its way, and which goes on without
it: what is imported and kept at that moment must not outlive the tool. The server is another process's and real.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.peers.venvs import install_project, venv
from tests.servers import RESULT, TOKEN, Server


class Tool(NamedTuple):
    """A test tool, and what becomes of an action while it is active."""

    imports: str
    active: str
    """A context manager, as an expression."""
    lets_pass: bool
    """Whether actions are really performed meanwhile."""


TOOLS = {
    # Records what it sees, which actions are not part of.
    "vcrpy": Tool("import vcr", "vcr.VCR(record_mode='all').use_cassette('cassette.yaml')", lets_pass=True),
    "responses": Tool("import responses", "responses.RequestsMock()", lets_pass=True),
    "pytest-httpserver": Tool("import pytest_httpserver", "pytest_httpserver.HTTPServer()", lets_pass=True),
    # Without a socket, asyncio makes no event loop.
    "pytest-socket": Tool(
        "import pytest_socket",
        "switched(pytest_socket.disable_socket, pytest_socket.enable_socket)",
        lets_pass=False,
    ),
    # The sockets of these two are none that a loop could watch.
    "httpretty": Tool("import httpretty", "httpretty.enabled()", lets_pass=False),
    "mocket": Tool("import mocket", "mocket.Mocketizer()", lets_pass=False),
    # The event loop's own clock must go on, or nothing that sleeps ever wakes.
    "freezegun": Tool("import freezegun", "freezegun.freeze_time('2012-01-14', real_asyncio=True)", lets_pass=True),
    "time-machine": Tool("import time_machine", "time_machine.travel('2012-01-14', tick=False)", lets_pass=True),
}

# What a test of one's own may replace, by hand.
REPLACED = ["http.client.HTTPConnection", "urllib.request.Request", "urllib.request.OpenerDirector"]

PROGRAM = """
import asyncio, contextlib, json, warnings
from unittest import mock
warnings.simplefilter("ignore")  # pytest-socket's, at each socket

{imports}

@contextlib.contextmanager
def switched(on, off):
    on()
    try:
        yield
    finally:
        off()

def act():
    try:
        return asyncio.run(asyncio.wait_for(ActionExecutor.execute("an_action", {{}}), 5))
    except Exception as error:
        return repr(error)

outcomes = []
with {active}:
    outcomes.append(act())
outcomes += [act(), act()]
print(json.dumps(outcomes))
"""
OURS = "from zamp_sdk import ActionExecutor"


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of an environment with the package and the tools; none of them minds the others being there."""
    python = venv("test-tools", *TOOLS)
    install_project(python)
    return python


def run(python: Path, program: str, folder: Path, server: Server | None = None) -> str:
    """Run a program in an environment that says where the server is, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if server is not None:
        environment |= {"ZAMP_BASE_URL": server.url, "ZAMP_AUTH_TOKEN": TOKEN}
    done = subprocess.run(
        [python, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("is_first", [True, False], ids=["tool first", "SDK first"])
@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_leaves_a_trace(
    python: Path, name: str, *, is_first: bool, is_tls: bool, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    """A process whose first action comes under a test tool's eyes has nothing but good ones after that."""
    tool = TOOLS[name]
    imports = [tool.imports, OURS] if is_first else [OURS, tool.imports]
    with Server(tls if is_tls else None) as server:
        outcomes = json.loads(
            run(python, PROGRAM.format(imports="\n".join(imports), active=tool.active), tmp_path, server)
        )
        assert outcomes[1:] == [RESULT, RESULT]
        assert (outcomes[0] == RESULT) == tool.lets_pass, outcomes
        assert server.count("POST") == 2 + tool.lets_pass


@pytest.mark.parametrize("name", REPLACED)
def test_no_stand_in_of_a_test_leaves_a_trace(python: Path, name: str, tmp_path: Path) -> None:
    """Nor has one whose first action came while a test had put something else in a class's place."""
    with Server() as server:
        program = PROGRAM.format(imports=OURS, active=f"mock.patch({name!r})")
        assert json.loads(run(python, program, tmp_path, server))[1:] == [RESULT, RESULT]


@pytest.mark.parametrize("name", [name for name, tool in TOOLS.items() if tool.lets_pass])
def test_the_local_platform_works_beside(python: Path, name: str, tmp_path: Path) -> None:
    """An action of a local platform that takes a while is performed while a tool is active in the same process."""
    tool = TOOLS[name]
    program = f"""if True:
        import asyncio, sys
        {tool.imports}
        from zamp_sdk import ActionExecutor
        from zamp_sdk.local_platform import LocalPlatform

        async def slow(params):
            await asyncio.sleep(0.3)
            return params

        async def act(platform):
            return await ActionExecutor.execute(
                "slow", [1], base_url=platform.base_url, auth_token=platform.auth_token
            )

        with {tool.active}, LocalPlatform() as platform:
            platform.action("slow")(slow)
            print(asyncio.run(act(platform)))
    """
    assert run(python, program, tmp_path) == "[1]\n"


def test_pytest_socket_lets_the_local_platform_through(python: Path, tmp_path: Path) -> None:
    """With ``--allow-hosts=127.0.0.1`` a test may use a local platform, and nothing else."""
    (tmp_path / "test_it.py").write_text(
        "import asyncio\n"
        "from zamp_sdk import ActionExecutor\n"
        "from zamp_sdk.local_platform import LocalPlatform\n"
        "def test_it():\n"
        "    with LocalPlatform() as platform:\n"
        "        platform.action('double')(lambda params: 2 * params)\n"
        "        where = {'base_url': platform.base_url, 'auth_token': platform.auth_token}\n"
        "        assert asyncio.run(ActionExecutor.execute('double', 21, **where)) == 42\n",
        encoding="utf-8",
    )
    program = "import pytest; raise SystemExit(pytest.main(['-q', '--allow-hosts=127.0.0.1', 'test_it.py']))"
    assert "1 passed" in run(python, program, tmp_path)


def test_pytest_httpserver_can_be_the_platform(python: Path, tmp_path: Path) -> None:
    """It is a real server, so that it can say what a test wants a platform to say."""
    program = f"""if True:
        import asyncio
        import pytest_httpserver
        {OURS}

        with pytest_httpserver.HTTPServer() as server:
            server.expect_request("/actions", method="POST").respond_with_json({{"id": "a"}})
            server.expect_request("/actions/a").respond_with_json({{"status": "COMPLETED", "result": 42}})
            call = ActionExecutor.execute("an_action", {{}}, base_url=server.url_for("/"), auth_token="a-token")
            print(asyncio.run(call))
    """
    assert run(python, program, tmp_path) == "42\n"
