"""What went wrong, in words, and that a mistake of this package still looks like one."""

from __future__ import annotations

import dataclasses
import errno
import traceback
from collections.abc import Sequence
from typing import Any

import pytest

from tests.conftest import (
    Pace,
    execute,
    pool_is_at_rest,
    request_to,
    start,
)
from tests.servers import (
    ACTION_ID,
    RESULT,
    TOKEN,
    Server,
    eventually,
    reply,
)
from zamp_sdk.transport import (
    Failure,
    connections,
    dialing,
    exchange,
    pool,
    reading,
    sending,
)
from zamp_sdk.transport.connections import Route
from zamp_sdk.transport.failures import PeerError, SettingsError, TunnelError, explain

# --- what a person is told --------------------------------------------------------------------------------------------

STRAIGHT = Route(is_tls=True, authority="platform.test")
BY_PROXY = Route(
    is_tls=True,
    authority="proxy.test:3128",
    is_through_proxy=True,
    tunnel_to="platform.test",
    user="user",
    password="hunter2",
)


def told(exc: OSError, route: Route | None = STRAIGHT, *, may_have_left: bool = False) -> Failure:
    """Say what becomes of an error; what was handed over as secret is marked."""

    def redact(text: str, secrets: Sequence[str]) -> str:
        return f"<{text} without {', '.join(secrets)}>"

    request = dataclasses.replace(request_to("https://platform.test"), redact=redact)
    return explain(exc, request, route, may_have_left=may_have_left)


def test_where_and_how_far_is_told() -> None:
    """A failure names the platform, the proxy on the way to it, and whether the request may have left."""
    assert told(TimeoutError("timed out")).message == "cannot connect to platform.test: timed out"
    assert told(TimeoutError("timed out"), None).message == "cannot connect to platform.test: timed out"
    assert told(TimeoutError("timed out"), BY_PROXY, may_have_left=True).message == (
        "no reply from platform.test through the proxy proxy.test:3128: timed out"
    )
    assert told(OSError()).message == "cannot connect to platform.test: OSError"
    assert [told(OSError(), may_have_left=each).may_have_left for each in (True, False)] == [True, False]


def test_what_a_peer_wrote_is_redacted_and_nothing_else() -> None:
    """A peer's words lose the proxy's user name and password, too, and are no cause; the system's stay as they are."""
    by_peer = told(PeerError("what came is no HTTP: hunter2"), BY_PROXY)
    assert "<what came is no HTTP: hunter2 without user:hunter2, user, hunter2>" in by_peer.message
    assert by_peer.cause is None
    by_system = OSError(errno.ENETUNREACH, "Network is unreachable")
    assert told(by_system, BY_PROXY).message.endswith("Network is unreachable")
    assert told(by_system, BY_PROXY).cause is by_system


@pytest.mark.parametrize(
    ("exc", "advice", "may_retry"),
    [
        (PeerError("no"), "", True),
        (PeerError("no", may_retry=False), "", False),
        (SettingsError("no"), "", False),
        (OSError(errno.ENETUNREACH, "no"), "", True),
        (ConnectionRefusedError("no"), "check the address of the proxy, or whether it is up", True),
        *(
            (TunnelError(code), "the proxy cannot reach platform.test now", True)
            for code in (408, 425, 429, 500, 502, 503, 504, 599)
        ),
        (TunnelError(401), "put the proxy's user name and password into HTTPS_PROXY", False),
        (TunnelError(407), "put the proxy's user name and password into HTTPS_PROXY", False),
        *(
            (TunnelError(code), "the proxy does not let you through to platform.test", False)
            for code in (302, 400, 403, 404, 405, 451)
        ),
    ],
    ids=str,
)
def test_what_to_do_is_told(exc: OSError, advice: str, may_retry: bool) -> None:
    """Where a person can do something, the failure says what, and whether trying again may help."""
    outcome = told(exc, BY_PROXY)
    assert advice in outcome.message
    assert ("; " in outcome.message) == bool(advice)
    assert outcome.may_retry == may_retry


def test_frames_are_not_kept() -> None:
    """The cause of a failure holds no frames, whose variables hold the token, and no context."""
    try:
        try:
            raise ValueError(TOKEN)  # noqa: TRY301  # what is under test is what becomes of it
        except ValueError:
            raise TimeoutError("timed out")  # noqa: B904  # so that it has a context
    except TimeoutError as exc:
        outcome = told(exc)
    assert outcome.cause is not None
    assert outcome.cause.__traceback__ is None
    assert outcome.cause.__context__ is None


# --- mistakes of this package -----------------------------------------------------------------------------------------


def bug(*_: Any, **__: Any) -> Any:
    raise TypeError("a bug")


@pytest.mark.parametrize(
    "place",
    [
        pytest.param((exchange, "find_route"), id="exchange"),
        pytest.param((pool.Pool, "take"), id="pool"),
        pytest.param((sending, "open_request"), id="hop"),
        pytest.param((sending._Writer, "request"), id="hop in urllib.request"),
        pytest.param((reading.ReplyReader, "proceed"), id="hop that reads"),
        pytest.param((reading, "_headers"), id="hop in the reader"),
        pytest.param((dialing, "_begin_to_connect"), id="dial"),
        pytest.param((dialing, "_address"), id="dial before a lookup"),
        pytest.param((connections.Connection, "flush"), id="connection"),
    ],
)
@pytest.mark.parametrize("delay", [0.0, 0.05])
async def test_a_mistake_of_ours_looks_like_one(
    place: tuple[Any, str], delay: float, server: Server, pace: Pace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TypeError in the transport is not translated: it comes out as it is, and leaves nothing behind."""
    server.always("POST", reply(200, {"id": ACTION_ID}, delay=delay))
    with monkeypatch.context() as patch:
        patch.setattr(*place, bug)
        with pytest.raises(TypeError, match="a bug") as caught:
            await start(server.url)
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "bug"
    await eventually(lambda: pool_is_at_rest() and server.open_connections == 0)
    assert pool_is_at_rest()
    assert await execute(server.url) == RESULT
