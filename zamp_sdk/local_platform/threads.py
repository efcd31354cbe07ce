"""Threads that do not outlive the program, and waiting for them."""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, Iterable

_logger = logging.getLogger("zamp_sdk")


def start_thread(work: Callable[[], object]) -> threading.Thread:
    """Start a daemon thread, which cannot keep a program from exiting."""
    thread = threading.Thread(target=work, name="zamp-local-platform", daemon=True)
    thread.start()
    return thread


def join(threads: Iterable[threading.Thread], deadline: float) -> None:
    """Wait until all have ended, or until the monotonic clock shows the deadline."""
    for thread in list(threads):
        if thread is not threading.current_thread():  # an action that stops its platform
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _logger.warning("a function that does not return was left behind")
