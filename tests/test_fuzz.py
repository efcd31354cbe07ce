"""A short run of the random replies of which ``make fuzz`` makes many."""

from __future__ import annotations

import pytest

from tests.peers import fuzz, fuzz_reading


@pytest.mark.parametrize("seed", [1, 2])
def test_random_replies(seed: int) -> None:
    """Random replies make documented errors only, with whole ids and without the token; and some actions succeed."""
    ends = fuzz.main(400, seed)

    assert set(ends) <= {"HttpClientError", "ActionFailedError", "ActionTimeoutError", "result", "started", "budget"}
    assert ends["HttpClientError"] > ends["result"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_random_replies_in_pieces(seed: int) -> None:
    """However a random reply is cut, the reader makes of it what it makes of it in one piece, and what h11 makes."""
    ends = fuzz_reading.main(300, seed)

    assert ends["a reply after which the connection is kept"] > 30
    assert ends["a reply"] > 30
