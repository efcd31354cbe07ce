"""One transport in many lives: several event loops, threads, forks, exits, and loops that watch no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import (
    OUT_OF_DESCRIPTORS,
    PROMPT,
    ROOT,
    Pace,
    execute,
    pool_is_at_rest,
    posix_only,
    run_script,
    start,
    wait_until,
)
from tests.servers import (
    ACTION_ID,
    CONNECT,
    RESULT,
    TOKEN,
    Server,
    eventually,
    hanging_port,
    reply,
    running,
    silent,
    started,
    started_after,
    then_close,
    tunnel,
)
from zamp_sdk import HttpClientError
from zamp_sdk.transport import hops

# --- several event loops ----------------------------------------------------------------------------------------------


def test_two_event_loops_in_sequence_share_the_pool(pace: Pace) -> None:
    """A connection outlives its event loop: the next one (the next Lambda invocation) uses it."""
    with Server() as server:
        for _ in range(3):
            assert asyncio.run(execute(server.url)) == RESULT
        assert server.connections == 1


def test_event_loops_in_several_threads_run_side_by_side(pace: Pace) -> None:
    """Each thread may run an event loop of its own."""
    with Server() as server, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: asyncio.run(execute(server.url)), range(8)))
        assert results == [RESULT] * 8
        assert (server.count("POST"), server.count("GET")) == (8, 8)


def test_32_event_loops_in_32_threads_all_get_results(pace: Pace) -> None:
    """Event loops in many threads share the connections, and each action runs once."""

    async def several(url: str) -> list[Any]:
        return await asyncio.gather(*(execute(url) for _ in range(5)))

    with Server() as server, ThreadPoolExecutor(32) as threads:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.01))
        assert list(threads.map(lambda _: asyncio.run(several(server.url)), range(32))) == [[RESULT] * 5] * 32
        assert (server.count("POST"), server.count("GET")) == (160, 160)
        assert server.most_open_connections <= 256
    assert pool_is_at_rest()


def test_an_event_loop_is_forgotten_after_its_requests(pace: Pace) -> None:
    """Nothing of the process's keeps a loop: a Lambda's invocations have one each."""
    with Server() as server:

        async def many() -> weakref.ref[asyncio.AbstractEventLoop]:
            await asyncio.gather(*(execute(server.url) for _ in range(70)))  # some of them have to wait for a slot
            return weakref.ref(asyncio.get_running_loop())

        loop = asyncio.run(many())
        gc.collect()
        assert loop() is None


CLOSED_LOOPS = """
import asyncio, gc, logging, sys, time, weakref
from zamp_sdk import ActionExecutor
from zamp_sdk.transport import pool

logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # that tasks were destroyed is what this is about
loops = weakref.WeakSet()

def close_over_requests(url, steps):
    loop = asyncio.new_event_loop()
    loops.add(loop)
    for _ in range(3):
        loop.create_task(ActionExecutor.execute("act", {}, base_url=url))
    for _ in range(steps):
        loop.call_soon(loop.stop)
        loop.run_forever()
    loop.close()

for steps in range(40):
    close_over_requests(sys.argv[1], steps)
for _ in range(100):
    gc.collect()
    if "<Pool: 0 of" in repr(pool.shared_pool()):
        break
    time.sleep(0.05)
print(len(loops), pool.shared_pool())
"""


def test_a_loop_that_is_closed_over_its_requests_is_forgotten_with_them(server: Server) -> None:
    """Wherever its requests are, a loop that is closed over them keeps no room and no connection, and says nothing."""
    server.always("GET", running)
    done = run_script(CLOSED_LOOPS, server.url)
    assert re.match(r"0 <Pool: 0 of \d+ rooms taken, 0 requests in the line, ", done.stdout)
    if sys.version_info >= (3, 10):  # asyncio itself did not expect it before
        assert "Traceback" not in done.stderr


# --- other event loops ------------------------------------------------------------------------------------------------


class Watchless(asyncio.SelectorEventLoop):
    """An event loop that watches no sockets, as Windows' proactor."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]  # the stub's is generic, as 3.9 cannot write it
        raise NotImplementedError

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]  # the stub's is generic, as 3.9 cannot write it
        raise NotImplementedError

    def remove_reader(self, fd: Any) -> bool:
        raise NotImplementedError

    def remove_writer(self, fd: Any) -> bool:
        raise NotImplementedError


def run_on(loop: asyncio.AbstractEventLoop, main: Any) -> Any:
    """Do what asyncio.run does, on this loop."""
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def test_a_loop_that_watches_no_sockets_will_do(server: Server, pace: Pace) -> None:
    """Where a loop has no add_reader, threads wait for the sockets, and all the rest is the same."""
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.3))
    server.on("GET", running, running)
    text = "x" * 3_000_000

    async def main() -> Any:
        return await asyncio.gather(execute(server.url), execute(server.url, text))

    assert run_on(Watchless(), main()) == [RESULT] * 2
    assert (server.count("POST"), server.count("GET")) == (2, 4)


def test_a_loop_that_watches_no_sockets_cancels_soon(server: Server, pace: Pace) -> None:
    """Where a thread waits for a socket, a cancellation does not wait for the peer."""
    server.always("POST", silent)

    async def main() -> None:
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 1)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: pool_is_at_rest() and server.open_connections == 0)

    began = time.monotonic()
    run_on(Watchless(), main())
    assert time.monotonic() - began < PROMPT


def test_a_loop_that_watches_no_sockets_finds_a_late_reply(
    server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that has come is read there, too, although every thread is busy until the deadline."""
    monkeypatch.setattr(hops, "WITHOUT_THREAD", 0.7)
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=0.3))
    release = threading.Event()

    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await start(server.url)  # imports
        pace.hurry("POST", 1, 0.6)
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == 2)
        asyncio.get_running_loop().run_in_executor(None, release.wait, 10)
        try:
            return await task
        finally:
            release.set()

    assert run_on(Watchless(), main()) == ACTION_ID


def test_a_loop_that_watches_no_sockets_keeps_deadlines(server: Server, pace: Pace) -> None:
    """Where threads wait for the sockets, a request's time is over when it is over."""
    server.always("POST", silent)
    pace.hurry("POST", 1, 0.6)
    with pytest.raises(HttpClientError, match="timed out") as caught:
        run_on(Watchless(), start(server.url))
    assert caught.value.may_have_started
    assert server.count("POST") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_uvloop_will_do(server: Server, pace: Pace) -> None:
    """Uvloop runs actions, large ones, hanging ones and cancelled ones as asyncio's own loop does."""
    uvloop = pytest.importorskip("uvloop")
    text = "x" * 3_000_000
    server.on("GET", running, running)

    async def main() -> None:
        assert await asyncio.gather(*(execute(server.url, text) for _ in range(5))) == [RESULT] * 5
        server.always("POST", silent)
        posts = server.count("POST")
        task = asyncio.ensure_future(start(server.url))
        await eventually(lambda: server.count("POST") == posts + 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pace.hurry("POST", 1, 0.5)
        with pytest.raises(HttpClientError, match="timed out"):
            await start(server.url)

    run_on(uvloop.new_event_loop(), main())
    assert pool_is_at_rest()


# --- forks ------------------------------------------------------------------------------------------------------------


FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forking while threads exist: here none does
from zamp_sdk import ActionExecutor
def run():
    result = asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1]))
    os.write(1, f"{result}\\n".encode())  # whole, while the other process writes too
run()
child = os.fork()
run()
if child:
    print(os.waitpid(child, 0)[1])
"""


@posix_only
def test_a_forked_child_makes_its_own_connections() -> None:
    """After a fork the child starts with an empty pool, and the parent's connection goes on working."""
    with Server() as server:
        done = run_script(FORK, server.url)
        assert done.stderr == ""
        assert sorted(done.stdout.splitlines()) == ["0", *[str(RESULT)] * 3]
        assert (server.count("POST"), server.count("GET"), server.connections) == (3, 3, 2)


FORK_IN_FLIGHT = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from zamp_sdk import ActionExecutor
def start():
    return ActionExecutor.start("act", {}, base_url=sys.argv[1])
async def main():
    task = asyncio.ensure_future(start())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    child = os.fork()
    if child == 0:
        os._exit(0 if run_in_child() else 1)
    print(os.waitpid(child, 0)[1], flush=True)
    print((await task).id)
def run_in_child():
    asyncio.events._set_running_loop(None)
    return asyncio.run(start()).id == "action-1"
asyncio.run(main())
"""


@posix_only
def test_a_fork_does_not_disturb_a_request_that_is_under_way() -> None:
    """A child that is forked while its parent waits for a reply leaves that connection alone."""
    release = threading.Event()
    with Server() as server:
        server.on("POST", started_after(release), then_close(started))
        with subprocess.Popen(
            [sys.executable, "-c", FORK_IN_FLIGHT, server.url],
            cwd=ROOT,
            env={**os.environ, "ZAMP_AUTH_TOKEN": TOKEN},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            wait_until(lambda: server.count("POST") == 1)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"
            release.set()
            assert process.stdout.readline() == f"{ACTION_ID}\n"
        assert (server.count("POST"), server.connections) == (2, 2)


FORK_AT = """
import asyncio, gc, os, socket, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from zamp_sdk import ActionExecutor

def connections():
    "How many sockets are open that lead somewhere; an event loop has a pair of its own."
    return sum(
        isinstance(one, socket.socket) and one.fileno() >= 0 and one.family == socket.AF_INET
        for one in gc.get_objects()
    )

async def main():
    task = asyncio.ensure_future(ActionExecutor.start("act", {}, base_url=sys.argv[1]))
    while connections() == 0:
        await asyncio.sleep(0.01)
    await (task if sys.argv[2] == "idle" else asyncio.sleep(0.2))
    before = connections()
    child = os.fork()
    if child == 0:
        os.write(1, f"{before} in the parent, {connections()} in the child\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(connections(), "in the parent")
    task.cancel()
asyncio.run(main())
"""


@posix_only
@pytest.mark.parametrize("state", ["dialing", "handshake", "under way", "idle"])
def test_a_forked_child_holds_no_socket_of_its_parents(state: str, tls: ssl.SSLContext) -> None:
    """In whatever state a connection is, the child's copy is closed, so that the peer sees when the parent hangs up."""
    with contextlib.ExitStack() as stack:
        if state == "dialing":
            url = f"http://127.0.0.1:{stack.enter_context(hanging_port())}"
        else:
            server = stack.enter_context(Server(tls))
            url = server.url
            if state != "idle":
                server.always(CONNECT if state == "handshake" else "POST", silent)
        done = run_script(FORK_AT, url, state, SSL_CERT_FILE=os.environ["SSL_CERT_FILE"])
        assert done.stdout.splitlines() == ["1 in the parent, 0 in the child", "1 in the parent"]


# --- ends -------------------------------------------------------------------------------------------------------------


EXIT = """
import asyncio, atexit, gc, socket, sys
def count():
    print(sum(isinstance(one, socket.socket) and one.fileno() >= 0 for one in gc.get_objects()), "sockets are open")
atexit.register(count)  # the first to be registered is the last to be called
from zamp_sdk import ActionExecutor
print(asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1])))
"""


def test_nothing_is_left_open_at_exit(server: Server) -> None:
    """Kept connections are closed at exit: the interpreter's development mode has nothing to report."""
    done = run_script(EXIT, server.url)
    assert (done.stdout, done.stderr, done.returncode) == (f"{RESULT}\n0 sockets are open\n", "", 0)
    assert server.connections == 1


LATE = """
import asyncio, atexit, sys, threading
from zamp_sdk import ActionExecutor
def work():
    print(asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1])), flush=True)
if sys.argv[2] == "thread":
    threading.Thread(target=work).start()
elif sys.argv[2] == "timer":
    threading.Timer(0.2, work).start()
else:
    atexit.register(work)
"""


@pytest.mark.parametrize("life", ["thread", "timer", "atexit"])
def test_an_action_outlives_the_main_thread(life: str, server: Server) -> None:
    """A program whose main thread has ended gets its result, and ends: the loop does the work."""
    server.on("GET", running, running)
    # A process that makes its first connection while it exits leaves it to the system to close that.
    done = run_script(LATE, server.url, life, PYTHONWARNINGS="ignore::ResourceWarning")
    assert (done.stdout, done.stderr, done.returncode) == (f"{RESULT}\n", "", 0)
    assert (server.count("POST"), server.count("GET")) == (1, 3)


FULL = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
from zamp_sdk import ActionExecutor
from zamp_sdk.transport import hops
hops.WITHOUT_THREAD = 0.1
async def main():
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(6))
    def ask():
        action = ActionExecutor.execute("act", {}, base_url=sys.argv[1])
        return asyncio.run_coroutine_threadsafe(action, loop).result()
    print(await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(6))))
asyncio.run(main())
"""


def test_threads_that_wait_for_this_very_action_do_not_wait_for_ever(server: Server) -> None:
    """An executor that is full of threads which wait for their actions gets their results, and the program ends."""
    done = run_script(FULL, server.url)
    assert (done.stdout, done.stderr, done.returncode) == (f"{[RESULT] * 6}\n", "", 0)
    assert (server.count("POST"), server.count("GET")) == (6, 6)


CLOSED_AT_ONCE = """
import asyncio, sys
from zamp_sdk import ActionExecutor
loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(ActionExecutor.start("act", {}, base_url=sys.argv[1]))
except Exception as exc:
    print(exc)
loop.close()
"""


@pytest.mark.parametrize("proxy", ["", "socks5://127.0.0.1:1080"])
def test_a_loop_that_is_closed_right_after_a_failure_hears_of_nothing_more(proxy: str) -> None:
    """After a quick refusal, or one before the network, no thread has anything left to tell the loop."""
    with Server() as server:
        server.always("POST", reply(401))
        done = run_script(CLOSED_AT_ONCE, server.url, HTTP_PROXY=proxy)
        assert ("socks5://" if proxy else "HTTP 401") in done.stdout
        assert (done.stderr, done.returncode) == ("", 0)


# --- the first request ------------------------------------------------------------------------------------------------


RELATIVE = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from zamp_sdk import ActionExecutor
import zamp_sdk
os.chdir("/")
print(asyncio.run(ActionExecutor.execute("act", {"rows": ["x" * 100_000]}, base_url=sys.argv[1])))
print(sys.argv[2] in zamp_sdk.__file__)
"""


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_program_may_change_its_directory_before_its_first_action(
    kind: str, scheme: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What is imported with the first request is found, although sys.path has a relative path to it."""
    package = ROOT / "zamp_sdk"
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "vendor", "w") as archive:
            for path in package.rglob("*.py"):
                archive.write(path, path.relative_to(ROOT))
    else:
        shutil.copytree(package, tmp_path / "vendor" / "zamp_sdk", ignore=shutil.ignore_patterns("__pycache__"))
    with Server(request.getfixturevalue("tls") if scheme == "https" else None) as server:
        done = run_script(RELATIVE, server.url, "vendor", cwd=tmp_path)
        assert (done.stdout, done.stderr) == (f"{RESULT}\nTrue\n", "")


NO_DESCRIPTOR_FOR_IMPORTS = (
    OUT_OF_DESCRIPTORS
    + """
from zamp_sdk.transport import Exchange, Failure, Request, send

async def ask(url):
    request = Request("GET", url, "/actions/a", {}, None, lambda reply: reply.status_code, lambda text, secrets: text)
    return await send(Exchange(request, 10))

async def main(url, number):
    leave(number)
    outcome = await ask(url)
    if isinstance(outcome, Failure):
        print(outcome.may_have_left, outcome.may_retry, outcome.message)
    else:
        print(outcome)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(await ask(url))
asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
)


@posix_only
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_first_request_without_descriptors_is_a_failure_like_others(number: int, server: Server) -> None:
    """Where even the transport's own modules cannot be opened, nothing has left, and a later request is served."""
    done = run_script(NO_DESCRIPTOR_FOR_IMPORTS, server.url, number, SSL_CERT_FILE=os.environ.get("SSL_CERT_FILE", ""))
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    if number == 0 or first != "200":
        assert first.startswith("False True cannot ")
        assert "Too many open files" in first
    assert second == "200"


IMPORTS = """
import asyncio, sys, threading
from zamp_sdk import ActionExecutor

class Watch:
    "Notes what is imported in a thread."
    @staticmethod
    def find_spec(name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            print(name)

async def main():
    await asyncio.to_thread(int)
    sys.meta_path.insert(0, Watch)
    print(await ActionExecutor.execute("act", {}, base_url=sys.argv[1]))
asyncio.run(main())
"""


@pytest.mark.parametrize("is_by_proxy", [False, True])
def test_nothing_is_imported_in_a_thread(is_by_proxy: bool, server: Server) -> None:
    """A child that is forked while a thread imports would wait for that import for ever, so no thread does."""
    server.on("GET", reply(500, {"error": "not now"}, {"Retry-After": "0", "Date": "Thu, 01 Jan 1970 00:00:00 GMT"}))
    with Server() as proxy:
        proxy.always("CONNECT", tunnel(server.port))
        environment = {f"{scheme}_PROXY": proxy.url for scheme in ("HTTP", "HTTPS") if is_by_proxy}
        done = run_script(IMPORTS, server.url.replace("127.0.0.1", "localhost"), cwd=ROOT, **environment)
        assert (done.stdout, done.returncode) == (f"{RESULT}\n", 0)
        assert (proxy.requests != []) == is_by_proxy
