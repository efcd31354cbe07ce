"""Beside the official SDK, as a black box: the same calls make the same requests, and what differs is told here.

Each SDK runs in a Python of its own, so that neither sees the other, and talks to a server that records what arrives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests import official_sdk
from tests.peers.conftest import absent
from tests.peers.venvs import ROOT, venv
from tests.servers import RESULT, TOKEN, Received, Server, Wire, reply

T = TypeVar("T")

# The arguments of each call, as they stand in a program.
CALLS = {
    "minimal": "'send_invoice', {'invoice_id': 'inv_123'}, action_retry_policy=POLICY",
    "empty params": "'send_invoice', {}, action_retry_policy=POLICY",
    "unicode": r"'Rechnung senden', {'é': 'ü', '日本': '😀', 'marks': '\"\\/<\u2028'}, action_retry_policy=POLICY",
    "nested": "'a', {'x': [1, 2.5, -0.0, 1e300, True, None, {'y': [[], {}]}], 'n': 2**70}, action_retry_policy=POLICY",
    "summary": "'a', {'x': 1}, summary='Sends an invoice', action_retry_policy=POLICY",
    "empty summary": "'a', {'x': 1}, summary='', action_retry_policy=POLICY",
    "timeout": "'a', {}, action_start_to_close_timeout=timedelta(minutes=10), action_retry_policy=POLICY",
    "short timeout": "'a', {}, action_start_to_close_timeout=timedelta(microseconds=1500), action_retry_policy=POLICY",
    "long policy": "'a', {}, action_retry_policy=policy(timedelta(hours=25, seconds=2.5), 2, timedelta(days=14), 2)",
    "unlimited": "'a', {}, action_retry_policy=policy(timedelta(0), 0, timedelta(microseconds=1), 1.0)",
    "all": "'a', {'x': 'y'}, summary='s', action_start_to_close_timeout=timedelta(hours=1), action_retry_policy=POLICY",
}
# Without a policy.
BARE_CALL = "'a', {'x': 1}"

# Makes the calls at the same time, each to a base URL of its own, by which the server can tell them apart.
PROGRAM = """if True:
    import asyncio, json, sys
    from datetime import timedelta
    from zamp_sdk import ActionExecutor, RetryPolicy

    def policy(initial, attempts, maximum, backoff):
        return RetryPolicy(
            initial_interval=initial, maximum_attempts=attempts, maximum_interval=maximum, backoff_coefficient=backoff
        )

    POLICY = policy(timedelta(seconds=30), 3, timedelta(minutes=15), 1.5)

    async def run(number, *args, **kwargs):
        base_url = f"{sys.argv[1]}/call-{number}"
        try:
            result = await ActionExecutor.execute(*args, base_url=base_url, auth_token=sys.argv[2], **kwargs)
            return {"result": result}
        except Exception as error:
            return {"kinds": [kind.__name__ for kind in type(error).__mro__], "text": str(error)}

    async def main():
        return await asyncio.gather(CALLS)

    print(json.dumps(asyncio.run(main())))
"""

# Of two SDKs, the official one first.
Both = tuple[T, T]


def run_program(python: Path | str, text: str, *arguments: str) -> Any:
    """Run a program, and return what the last line that it prints says as JSON."""
    isolated = [] if str(python) == sys.executable else ["-I"]  # or else it would find this package
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ZAMP_") and not name.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [python, *isolated, "-c", text, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_calls(python: Path | str, calls: Iterable[str], server: Server) -> list[Any]:
    """Make these calls with an SDK, and return what came of each."""
    text = PROGRAM.replace("CALLS", ", ".join(f"run({number}, {call})" for number, call in enumerate(calls)))
    outcomes: list[Any] = run_program(python, text, server.url, TOKEN)
    return outcomes


def body(request: Received) -> Any:
    """Return a request's body, read as JSON."""
    return json.loads(request.body)


@pytest.fixture(scope="module")
def official() -> Path:
    """A Python that has the newest official SDK on the index: one that changes the wire fails the tests below."""
    try:
        newest = official_sdk.find()
    except LookupError as exc:
        absent(str(exc))
    return venv("official", newest.requirement, interpreter=newest.python)


@pytest.fixture(scope="module")
def requests(official: Path) -> Both[dict[str, list[Received]]]:
    """The requests of each call, a start and a poll, as both SDKs have made them."""
    calls = {**CALLS, "bare": BARE_CALL}

    def record(python: Path | str) -> dict[str, list[Received]]:
        with Server() as server:
            outcomes = make_calls(python, calls.values(), server)
            assert outcomes == [{"result": RESULT}] * len(calls)
            return {
                name: [request for request in server.requests if request.target.startswith(f"/call-{number}/")]
                for number, name in enumerate(calls)
            }

    return record(official), record(sys.executable)


@pytest.mark.parametrize("call", CALLS)
def test_the_same_call_makes_the_same_requests(requests: Both[dict[str, list[Received]]], call: str) -> None:
    """Methods, paths, bodies and headers are equal, but for the headers that say how, and not what."""
    theirs, ours = requests[0][call], requests[1][call]
    assert [request.method for request in ours] == [request.method for request in theirs] == ["POST", "GET"]
    for their, our in zip(theirs, ours):
        assert our.target == their.target
        if their.method == "POST":
            assert body(our) == body(their)
        else:
            assert our.body == their.body == b""
        assert _without_manners(our) == _without_manners(their)
        assert our.headers["authorization"] == f"Bearer {TOKEN}"


def _without_manners(request: Received) -> dict[str, str]:
    """Return the headers in which the SDKs must agree; the others must be what each of them is known to send."""
    headers = dict(request.headers)
    ours = headers["user-agent"].startswith("zamp-sdk/")
    # Each run has a server, and so a port, of its own.
    assert headers.pop("host").startswith("127.0.0.1:")
    # Who asks, and what it can read: we say JSON, not compressed.
    assert ours or "aiohttp" in headers["user-agent"]
    del headers["user-agent"]
    assert headers.pop("accept") == ("application/json" if ours else "*/*")
    codings = headers.pop("accept-encoding")  # aiohttp adds zstd where Python can read it: from 3.14 on
    assert codings == "identity" if ours else codings.startswith("gzip, deflate")
    # The same JSON has fewer bytes as we write it: no white space, and no escapes.
    assert headers.pop("content-length", "0") == str(len(request.body))
    # Ours alone, for the start alone.
    assert ("idempotency-key" in headers) == (ours and request.method == "POST")
    headers.pop("idempotency-key", None)
    # Neither asks for its connection to be closed.
    assert headers.pop("connection", "keep-alive") == "keep-alive"
    return headers


def test_each_start_has_an_idempotency_key_of_its_own(requests: Both[dict[str, list[Received]]]) -> None:
    """No two starts share one, or the platform would take the second for the first."""
    keys = {post.headers["idempotency-key"] for post, _ in requests[1].values()}
    assert len(keys) == len(CALLS) + 1


def test_without_a_policy_the_official_sdk_sends_one_of_its_own(requests: Both[dict[str, list[Received]]]) -> None:
    """The one difference in a body: they fill in their default of 3 attempts, where we leave it to the platform."""
    theirs, ours = (body(recorded["bare"][0]) for recorded in requests)
    assert "retry_policy" not in ours
    assert theirs.pop("retry_policy") == {
        "initial_interval": "PT30S",
        "maximum_attempts": 3,
        "maximum_interval": "PT15M",
        "backoff_coefficient": 1.5,
    }
    assert ours == theirs


def test_the_signatures_are_the_same(official: Path) -> None:
    """Every parameter of our execute is one of theirs, of the same kind and default; these two are theirs alone."""
    program = """if True:
        import inspect, json
        from zamp_sdk import ActionExecutor
        parameters = inspect.signature(ActionExecutor.execute).parameters.values()
        print(json.dumps([[p.name, p.kind.name, repr(p.default)] for p in parameters]))
    """
    theirs, ours = run_program(official, program), run_program(sys.executable, program)
    assert [parameter for parameter in theirs if parameter[0] not in {"execution_mode", "log_action"}] == ours
    assert {"execution_mode", "log_action"} < {parameter[0] for parameter in theirs}


def test_the_retry_policies_are_the_same_but_for_the_default(official: Path) -> None:
    """Both have four fields without defaults; default() has 3 attempts there, and 11 here."""
    program = """if True:
        import json
        from zamp_sdk import RetryPolicy
        try:
            RetryPolicy()
            required = False
        except Exception:
            required = True
        kinds = [kind.__name__ for kind in RetryPolicy.__mro__]
        print(json.dumps([required, kinds, {name: str(value) for name, value in vars(RetryPolicy.default()).items()}]))
    """
    (their_required, their_kinds, theirs), (our_required, our_kinds, ours) = (
        run_program(official, program),
        run_program(sys.executable, program),
    )
    assert their_required
    assert our_required
    assert "BaseModel" in their_kinds
    assert our_kinds == ["RetryPolicy", "object"]
    assert theirs.pop("maximum_attempts") == "3"
    assert ours.pop("maximum_attempts") == "11"
    assert ours == theirs


# What actions return, each as the server sends it.
RESULTS = [None, True, 0, 2**60, 1.5, "", "ü😀", [], [1, [2]], {}, {"a": {"b": None}}, {"status": "RUNNING"}]


@pytest.fixture(scope="module")
def results(official: Path) -> Both[list[Any]]:
    """What both SDKs return for each of the results."""

    def complete(wire: Wire) -> bool:
        assert wire.request is not None
        result = RESULTS[int(wire.request.target.split("/")[1][len("call-") :])]
        return reply(200, {"status": "COMPLETED", "result": result, "error": None})(wire)

    def collect(python: Path | str) -> list[Any]:
        with Server() as server:
            server.always("GET", complete)
            return make_calls(python, [BARE_CALL] * len(RESULTS), server)

    return collect(official), collect(sys.executable)


@pytest.mark.parametrize("number", range(len(RESULTS)), ids=[json.dumps(result) for result in RESULTS])
def test_the_same_reply_gives_the_same_result(results: Both[list[Any]], number: int) -> None:
    """Whatever JSON an action returns, both SDKs return the same value."""
    assert results[0][number] == results[1][number] == {"result": RESULTS[number]}


# How an action ended, its error, and what the official SDK raises then.
FAILURES = [
    ("FAILED", "boom", "HttpClientError"),
    ("FAILED", {"message": "boom"}, "HttpClientError"),
    ("TIMED_OUT", "boom", "HttpClientError"),
    ("FAILED", None, "RuntimeError"),
    ("CANCELED", None, "RuntimeError"),
    ("TERMINATED", None, "RuntimeError"),
]


@pytest.fixture(scope="module")
def failures(official: Path) -> Both[list[Any]]:
    """What both SDKs raise for each of the failures."""

    def fail(wire: Wire) -> bool:
        assert wire.request is not None
        status, error, _ = FAILURES[int(wire.request.target.split("/")[1][len("call-") :])]
        return reply(200, {"status": status, "error": error})(wire)

    def collect(python: Path | str) -> list[Any]:
        with Server() as server:
            server.always("GET", fail)
            return make_calls(python, [BARE_CALL] * len(FAILURES), server)

    return collect(official), collect(sys.executable)


@pytest.mark.parametrize("number", range(len(FAILURES)), ids=[f"{row[0]} {row[1]}" for row in FAILURES])
def test_a_failed_action_is_a_runtime_error(failures: Both[list[Any]], number: int) -> None:
    """The official SDK raises RuntimeError only where there is no reason to tell; we always do, and tell the reason."""
    status, error, their_kind = FAILURES[number]
    theirs, ours = failures[0][number], failures[1][number]
    assert theirs["kinds"][0] == their_kind
    assert ours["kinds"][0] == "ActionFailedError"
    assert "RuntimeError" in ours["kinds"]
    assert status in ours["text"]
    if error is not None:
        assert "boom" in theirs["text"]
        assert "boom" in ours["text"]


def test_a_429_ends_the_wait_of_the_official_sdk_only(official: Path) -> None:
    """Where a poll is refused with 429, the official SDK raises, and this one asks again and returns the result."""
    outcomes = []
    for python in (official, sys.executable):
        with Server() as server:
            server.on("GET", reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}))
            outcomes += make_calls(python, [BARE_CALL], server)

    assert outcomes[0]["kinds"][0] == "HttpClientError"
    assert outcomes[1] == {"result": RESULT}


@pytest.mark.parametrize(
    ("missing", "given"), [("ZAMP_BASE_URL", "auth_token='t'"), ("ZAMP_AUTH_TOKEN", "base_url='http://127.0.0.1:9'")]
)
def test_missing_configuration_is_a_key_error_in_both(official: Path, missing: str, given: str) -> None:
    """Whoever catches KeyError goes on doing so; both name the variable."""
    program = f"""if True:
        import asyncio, json
        from zamp_sdk import ActionExecutor
        try:
            asyncio.run(ActionExecutor.execute("a", {{}}, {given}))
        except KeyError as error:
            print(json.dumps(str(error)))
    """
    for python in (official, sys.executable):
        assert missing in run_program(python, program)
