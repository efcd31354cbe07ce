"""2,000 actions at once on a platform that takes 50 requests a second: too long for a test (`make soak`).

Checked at its end: every action has its result, none was started twice, few requests were refused, and most of what the
platform would have taken was used. Prints its figures and exits with 1 if anything of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.limiting_platform import LimitingPlatform
from zamp_sdk import ActionExecutor

REFUSED = 0.2  # of all requests, at most: twice what the simulation has for this
USED = 0.75  # of what the platform would take, at least: the simulation has 0.85, without a machine that is busy


async def execute_all(base_url: str, actions: int) -> list[float]:
    """Execute so many actions at once, and return after how many seconds each had its result."""
    began = time.monotonic()

    async def execute(number: int) -> float:
        result = await ActionExecutor.execute("act", number, base_url=base_url, auth_token="limits")
        assert result == f"result of {number}"
        return time.monotonic() - began

    return sorted(await asyncio.gather(*map(execute, range(actions))))


def main() -> int:
    """Run the actions, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers.limits", description=__doc__)
    parser.add_argument("--actions", type=int, default=2_000)
    parser.add_argument("--rate", type=int, default=50, help="requests a second; the burst is as many")
    options = parser.parse_args()
    print(f"{options.actions:,} actions of 5 s at once, {options.rate} requests a second", flush=True)

    cpu = time.process_time()
    with LimitingPlatform({"rate": options.rate, "burst": options.rate}, retry_after=1, seconds=5.0) as platform:
        took = asyncio.run(execute_all(platform.url, options.actions))
    cpu = time.process_time() - cpu

    refused = platform.refused / (platform.refused + platform.taken)
    used = platform.taken / (options.rate * (1 + took[-1]))
    twice = sum(count > 1 for count in platform.starts.values())
    print(f"results after {took[0]:.1f} to {took[-1]:.1f} s, the middle one after {took[len(took) // 2]:.1f} s")
    print(
        f"{platform.taken:,} requests taken, {platform.refused:,} refused ({refused:.1%}); {used:.0%} of the limit used"
    )
    print(f"started: {len(platform.starts):,}, twice: {twice}; {cpu:.1f} s of CPU, the platform's included")
    is_good = len(platform.starts) == options.actions and not twice and refused <= REFUSED and used >= USED
    print("as it should be" if is_good else "VIOLATION")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
