"""One workload in a fresh process, with whichever SDK its interpreter has.

Run as `python -I worker.py WORKLOAD URL [NUMBER...]` by the interpreter of a bare environment, so it imports nothing
of this project but the SDK by its public name: the two SDKs have the same `execute`. The last line on stderr is what
the workload took, as JSON.
"""

from __future__ import annotations

import sys

BARE_MODULES = len(sys.modules)  # before anything else is imported

import asyncio  # noqa: E402  # see above
import time  # noqa: E402  # see above

if False:  # TYPE_CHECKING without typing, which the SDK under test may or may not import
    from typing import Any

TOKEN = "benchmark-token"


def peak_memory() -> int:
    """The peak resident set of this process, in bytes."""
    try:
        # Not ru_maxrss: on Linux a child starts with its parent's peak.
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123  # pathlib would count as memory
            return int(file.read().partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def execute(url: str, seconds: float) -> Any:
    """A coroutine for an action that takes so long."""
    from zamp_sdk import ActionExecutor

    return ActionExecutor.execute("benchmark", {"seconds": seconds}, base_url=url, auth_token=TOKEN)


async def fan_out(url: str, count: float, seconds: float) -> dict[str, float]:
    """That many actions at once: `fan-out URL COUNT SECONDS`."""
    started, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(execute(url, seconds) for _ in range(int(count))))
    return {
        "wall": time.monotonic() - started,
        "cpu": time.process_time() - cpu,  # an SDK's lazy imports count, what `import zamp_sdk` loads does not
        "cpu_of_process": time.process_time(),
        "peak_memory": peak_memory(),
    }


async def lateness(url: str, *durations: float) -> dict[str, Any]:
    """How late the caller hears of actions that run at once, and after how many polls: `lateness URL SECONDS...`."""

    async def one(seconds: float) -> dict[str, float]:
        result = await execute(url, seconds)
        return {"seconds": seconds, "late": time.monotonic() - result["end"], "polls": result["polls"]}

    await execute(url, 0)  # so that none of them pays for the start of a process
    return {"actions": await asyncio.gather(*(one(seconds) for seconds in durations))}


async def instant(url: str, count: float) -> dict[str, Any]:
    """Instant actions, each after the other, on a connection that is open: `instant URL COUNT`."""
    await execute(url, 0)
    walls = []
    cpu = time.process_time()
    for _ in range(int(count)):
        started = time.monotonic()
        await execute(url, 0)
        walls.append(time.monotonic() - started)
    return {"cpu": time.process_time() - cpu, "walls": walls}


async def busy(url: str, count: float) -> dict[str, float]:
    """The CPU of so many instant actions at once, without the start of the process: `busy URL COUNT`."""
    await execute(url, 0)
    started, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(execute(url, 0) for _ in range(int(count))))
    return {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}


async def first(url: str) -> dict[str, float]:
    """The modules after the import and after a first result, and the memory of it: `first URL`."""
    import zamp_sdk  # noqa: F401  # the import is what is measured

    imported = len(sys.modules)
    imported_memory = peak_memory()
    await execute(url, 0)
    return {
        "modules_imported": imported - BARE_MODULES,
        "modules": len(sys.modules) - BARE_MODULES,
        "memory_imported": imported_memory,
        "memory": peak_memory(),
    }


async def raw(url: str, count: float) -> dict[str, Any]:
    """The least that the same two requests can cost: http.client on one connection. `raw URL COUNT`."""
    import http.client
    import json
    from urllib.parse import urlsplit

    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    headers = {"Authorization": "Bearer " + TOKEN, "Content-Type": "application/json"}
    body = json.dumps({"action_name": "benchmark", "params": {"seconds": 0}, "is_external_action": True})

    def one() -> None:
        connection.request("POST", "/actions", body, headers)
        action_id = json.loads(connection.getresponse().read())["id"]
        connection.request("GET", "/actions/" + action_id, headers=headers)
        reply = json.loads(connection.getresponse().read())
        assert reply["status"] == "COMPLETED"

    one()
    walls = []
    cpu = time.process_time()
    for _ in range(int(count)):
        started = time.monotonic()
        one()
        walls.append(time.monotonic() - started)
    cpu = time.process_time() - cpu
    connection.close()
    return {"cpu": cpu, "walls": walls}


if __name__ == "__main__":
    workloads: dict[str, Any] = {
        "fan-out": fan_out,
        "lateness": lateness,
        "instant": instant,
        "busy": busy,
        "first": first,
        "raw": raw,
    }
    _, name, base_url, *numbers = sys.argv
    if name != "first":
        import contextlib

        with contextlib.suppress(ImportError):  # `raw` needs none
            import zamp_sdk  # noqa: F401  # before the clock starts
    figures = asyncio.run(workloads[name](base_url, *map(float, numbers)))

    import json

    print(json.dumps(figures), file=sys.stderr)  # stdout has the log of the official SDK
