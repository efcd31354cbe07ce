"""What reading costs a thread: large replies in few and in many pieces, `python -m tests.benchmarks.chunks`.

Each row is read at its full size and at half of it: the ratio is 2 where the work is linear in what comes. (By length
it is higher, for there most of the time goes into memory, which the C library takes from the system from 32 MiB on.)
"""

from __future__ import annotations

import time
from typing import Callable

from zamp_sdk.transport.reading import MAX_CHUNKS, ReplyReader

from .report import Part

ROUNDS = 5
PIECE = 64 * 1024  # bytes that are received at a time
KIBIBYTE = b"x" * 1024

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_chunks(chunk: bytes, count: int) -> bytes:
    return CHUNKED + b"%x\r\n%s\r\n" % (len(chunk), chunk) * count + b"0\r\n\r\n"


def by_length(count: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (1024 * count, KIBIBYTE * count)


REPLIES: dict[str, tuple[Callable[[int], bytes], int]] = {  # makes one of such a size, received so many bytes at a time
    "64 MiB by length": (by_length, PIECE),
    "64 MiB in chunks of 1 KiB": (lambda count: in_chunks(KIBIBYTE, count), PIECE),
    "65,536 chunks of a newline": (lambda count: in_chunks(b"\n", count), PIECE),
    "the same, byte by byte": (lambda count: in_chunks(b"\n", count), 1),
}


def seconds(data: bytes, step: int) -> float:
    """Return how much CPU it takes to read this reply."""
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    reader = ReplyReader("GET")
    incoming = bytearray()
    reply = None
    start = time.process_time()
    for piece in pieces:
        incoming += piece
        reply = reader.proceed(incoming)
    taken = time.process_time() - start
    assert reply is not None
    return taken


def main() -> None:
    """Measure each reply in turn, and print the medians."""
    part = Part("CPU of reading a reply", other="half of it")
    for name, (make, step) in REPLIES.items():
        whole, half = make(MAX_CHUNKS), make(MAX_CHUNKS // 2)
        pairs = [(seconds(whole, step), seconds(half, step)) for _ in range(ROUNDS)]
        part.add(name, "ms", *zip(*pairs))
    print(part.as_text("whole", "half of it"))


if __name__ == "__main__":
    main()
