"""How bytes move: one HTTP request and its reply. The transport knows no action, no id and no JSON.

``send`` is given an ``Exchange``: a ``Request``, how to read its reply, and the seconds that both may take. It sends
the request once, and returns what was read, or a ``Failure`` that says why there is nothing. The first request imports
the rest:

========================  ==============================================================================================
``messages``              what goes in and what comes out
``exchange``              the story of one request, from the line to its reply
``pool``                  how many connections there may be, and the idle ones; the line in which requests wait for room
``routes``                straight, or by which proxy; CONNECT
``dialing``               from a host's name to a connected socket
``tls``                   whom to trust
``connections``           one connection: bytes, TLS
``sending``, ``reading``  how ``urllib.request`` writes a request; how a reply is read
``hops``                  the two ways to wait: for a thread, for a socket
``failures``              what went wrong, and what a person should do
========================  ==============================================================================================

*The loop owns and waits; threads work and never wait.* HTTP is spoken by ``urllib.request`` in ``asyncio.to_thread``,
and a thread that waited for a peer would be slow and unsafe: there are six on two cores, shared with name lookups and
the application, and six stalled replies would stop everything. So the sockets never block. The event loop waits for
them, and lends a request to a thread only where there is work for it.

*A reply can never be another request's*, because a connection is used again only if its last reply has said where it
ends, and if nothing whatsoever has come behind it.

*No module is imported in a thread*: a child that is forked meanwhile would wait for the import's lock for ever.

Why not asyncio's own streams? A connection has to outlive its event loop: a Lambda's handler runs ``asyncio.run`` for
each event, and a new TLS handshake for each is what makes other clients slow there. One line has to hold for all of a
process's event loops. And who has to go through urllib.request's proxies and tracing agents has to go through it.
"""

from __future__ import annotations

import os
from typing import Any, Callable, TypeVar

from .messages import HELD_BACK, Exchange, Failure, Reply, Request, is_this_machine

__all__ = ["HELD_BACK", "Exchange", "Failure", "Reply", "Request", "in_thread", "is_this_machine", "send"]

T = TypeVar("T")

# The rest is imported late, and until then a program may change the directory that a relative sys.path refers to.
__path__ = [os.path.abspath(path) for path in __path__]  # noqa: PTH100  # pathlib takes long to import


async def send(exchange: Exchange) -> Any:
    """Send the exchange's request, once; return what its ``read`` makes of the reply, a Failure, or HELD_BACK."""
    try:
        from .exchange import converse
    except OSError as exc:  # no descriptor is left to import it with
        return Failure(
            f"cannot send a request: {exc}", may_have_left=False, may_retry=True, cause=exc.with_traceback(None)
        )

    return await converse(exchange)


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread, and return what it returns or raise what it raises; where there is none, here.

    Cancelled before the function has begun, it never begins; one that has begun goes on alone.
    """
    from .hops import in_thread

    return await in_thread(function)
