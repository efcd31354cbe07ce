"""How bytes move: one request and its reply."""

from __future__ import annotations

from typing import Mapping, NamedTuple


class Reply(NamedTuple):
    """What came back; its repr shows nothing that a peer wrote."""

    status_code: int
    headers: Mapping[str, str]
    """Names in lower case, values with white space normalised; of a repeated name the last."""
    body: bytes
    """Without content coding."""

    def __repr__(self) -> str:  # error reporters ship the repr of variables, and a peer may have echoed the token
        return f"<Reply {self.status_code} of {len(self.body)} bytes>"
