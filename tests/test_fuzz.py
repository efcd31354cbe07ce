"""A short run of the random replies of which ``make fuzz`` makes many."""

from __future__ import annotations

import pytest

from tests.peers import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_random_replies(seed: int) -> None:
    """Random replies make documented errors only, with whole ids and without the token; and some actions succeed."""
    ends = fuzz.main(400, seed)

    assert set(ends) <= {"HttpClientError", "ActionFailedError", "ActionTimeoutError", "result", "started", "budget"}
    assert ends["HttpClientError"] > ends["result"] > 0
