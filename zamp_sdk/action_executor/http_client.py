"""The transport's face: ``send`` sends one request and returns its reply, or why there is none. It never sends twice.

The first request imports the rest: ``exchange`` (the story of one request), ``pool`` (who has which connection),
``connections`` (bytes to and from a socket), ``hops`` (threads and waiting) and ``messages`` (urllib.request and
http.client at work in a thread).
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from .. import __version__
from .wire import Answer, Progress, Reply, Request

if TYPE_CHECKING:
    from .models import SdkConfig

USER_AGENT = f"zamp-sdk/{__version__} Python/{sys.version_info[0]}.{sys.version_info[1]} {sys.platform}"

logger: logging.Logger = logging.getLogger("zamp_sdk")


async def send(config: SdkConfig, request: Request, timeout: float, progress: Progress | None = None) -> Answer:
    """Send a request; ``timeout`` is in seconds, and waiting in the pool's line for room does not count."""
    from .exchange import exchange

    began = time.monotonic()
    answer = await exchange(config, request, timeout, user_agent=USER_AGENT, progress=progress or Progress())
    if logger.isEnabledFor(logging.DEBUG):
        outcome = answer.status_code if isinstance(answer, Reply) else answer.message
        milliseconds = (time.monotonic() - began) * 1000
        logger.debug("%s %s%s: %s, %.0f ms", request.method, config.base_url, request.path, outcome, milliseconds)
    return answer
