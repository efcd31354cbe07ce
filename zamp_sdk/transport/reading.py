"""How a reply is read: bytes in, a reply out, or "not yet". Pure: no socket, no clock, no thread.

A ``ReplyReader`` reads one reply (RFC 9112, 2 to 7) and keeps its place. Whenever something has come, its owner calls
``proceed`` with all that it has; the reader takes what belongs to the reply, and each byte once. It is a generator that
reads from top to bottom, status line, headers, body, and yields wherever it has to wait, saying how far the reply has
come. So its place is a line of code, and not a state that somebody has to keep.

Where a reply ends is what everything hangs on: what was left of it would be taken for the reply to the next request.

- What is behind the end stays where it was, and the connection's owner, who sees it there, closes the connection.
- ``may_keep_connection`` is True only if the reply itself has said where it ends, in one way alone.
- Where the head says it in two ways, or not in numbers, nobody waits: the reply is refused at once.
- Around that, what is plain is read, however it is written: a bare LF, blanks before a colon, a header folded or said
  twice. A line that is no header is skipped, alone.
- An unsuccessful reply (of status 300 or over) counts once its head is there, with as much of its body as can be read:
  its status is what matters, and a peer may refuse a request and hang up before it has read it.

Why not ``http.client``: it reads from a file, and waits there. To be given a whole reply, it needs somebody before it
who finds the head's end, the length and each chunk, which is the larger half of reading. The rest of it we would have
to guard against: it drops the headers behind a bad one, takes no more than 100, has the email package parse them (a
tenth of a request's CPU, and ValueErrors for some Content-Types), and reads a chunk of size -1 or 0x1.
"""

from __future__ import annotations

import re
import zlib
from typing import Generator, Mapping, NamedTuple

from .failures import PeerError
from .messages import Reply

MAX_REPLY = 64 * 1024 * 1024
"""Bytes of a body, as it comes and after decompression: far over any sane result, far under a server's memory."""

TOO_LARGE = f"the reply is over {MAX_REPLY // 1024**2} MiB"

MAX_CHUNKS = 65_536
"""Chunks of a body: in chunks of 1 KiB it may be as large as any. So many are read in some tenths of a second."""

MAX_CHUNK_LINE = 4096
"""Bytes of the line before a chunk: a size of 16 digits at most, and extensions, of which nobody is known to send more
than a signature."""

MAX_HEAD = 256 * 1024
"""Bytes of status line and headers, with those of the informational replies before it; and of a trailer. Servers and
gateways themselves take 8 to 64 KiB."""

QUOTED = 100
"""Characters of what a peer wrote that an error quotes, as they came and at its end: so, secrets in them are found by
whoever shows the error, also one that is cut."""

VERSION = b"HTTP/"
"""How every reply begins (RFC 9112, 4)."""

LINE_ENDS = (b"\r\n", b"\n")
"""A line alone may end in LF (RFC 9112, 2.2)."""

NOT_CODED = {"", "identity", "none", "utf-8"}
"""What stands for no coding. The last two are not in RFC 9110, but there are servers that send them."""

_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9])[ \t]+([1-9][0-9]{2})([ \t\r\n].*)", re.DOTALL)
_FOLD = re.compile(r"\r?\n[ \t]+")  # a header's value that goes on in the next line (RFC 9112, 5.2)
_NAME = re.compile(r"([-!#$%&'*+.^_`|~0-9A-Za-z]+)[ \t]*")  # the blanks do not belong to it (RFC 9112, 5.1)
_BLANKS = re.compile(r"[ \t\r\0]+")  # CR and NUL have no business in a value, and count as blanks (RFC 9110, 5.5)
_LENGTH = re.compile(r"[0-9]{1,100}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(;.*)?\r?\n")
_GZIP = b"\x1f\x8b"  # how each member begins (RFC 1952, 2.3.1)


class Head(NamedTuple):
    """How a reply begins; its repr shows nothing that a peer wrote."""

    status_code: int
    reason: str
    version: int
    """11 for HTTP/1.1, or 10, as ``http.client`` writes it."""
    headers: Mapping[str, str]
    """Names in lower case, values with white space normalised; of a repeated name the last."""

    def __repr__(self) -> str:
        return f"<Head {self.status_code} with {len(self.headers)} headers>"


class ReplyReader:
    """Reads one reply out of what comes; asked again whenever more may have come.

    Attributes:
        head: Status and headers, once they are there.
        may_keep_connection: Whether, now that the reply is whole, the connection may serve another request
            (RFC 9112, 9.3), if nothing is left behind the reply. After CONNECT it says nothing.
    """

    def __init__(self, method: str) -> None:
        self.head: Head | None = None
        self.may_keep_connection: bool = False
        self._method = method
        self._body = bytearray()
        self._is_body_whole = False  # whether what may still come is a trailer, which nobody needs
        self._incoming = bytearray()
        self._has_ended = False
        self._reading = self._read()

    def proceed(self, incoming: bytearray, *, has_ended: bool = False, is_last: bool = False) -> Reply | None:
        """Take what belongs to the reply out of ``incoming``, and return the reply if it is whole now.

        Args:
            incoming: What has come and was not taken yet.
            has_ended: Whether the peer sends no more.
            is_last: Whether nobody will wait for more: an unsuccessful reply counts as far as it has come.

        Returns:
            The reply, once; None while it is not whole.

        Raises:
            PeerError: What came is no reply, or ended too early.
        """
        self._incoming, self._has_ended = incoming, has_ended
        try:
            place = next(self._reading)
        except StopIteration as end:
            whole: Reply | None = end.value
            return whole
        except PeerError:
            if not self._is_unsuccessful:
                raise
            return self._reply()
        if (self._is_unsuccessful or self._is_body_whole) and (has_ended or is_last):
            return self._reply()
        if has_ended:
            raise PeerError(f"the peer closed the connection {place}")
        return None

    @property
    def _is_unsuccessful(self) -> bool:
        return self.head is not None and self.head.status_code >= 300

    def _read(self) -> Generator[str, None, Reply]:
        """Read the whole reply; how long its body is, is told by the first of these that applies (RFC 9112, 6.3)."""
        headers = yield from self._read_head()
        assert self.head is not None
        if self._method == "CONNECT":  # a tunnel begins here, and a refusal is known by its status
            return self._reply()
        transfer_coding = _combined(headers, "transfer-encoding")
        codings = _members(transfer_coding) - NOT_CODED
        has_length = "content-length" in self.head.headers
        is_framed = True
        if self.head.status_code in (101, 204, 304):
            pass  # there is no body
        elif codings == {"chunked"}:
            yield from self._read_chunks()
        elif codings:
            raise PeerError(f"the reply came in a transfer coding that nobody asked for: {transfer_coding[:QUOTED]}")
        elif has_length:
            yield from self._read_content(_length(_combined(headers, "content-length")), "its body")
        else:
            is_framed = False
            yield from self._read_until_end()
        if codings and (has_length or self.head.version == 10):
            is_framed = False  # somebody on the way may have seen its end elsewhere (RFC 9112, 6.1)
        reply = self._reply()
        options = _members(_combined(headers, "connection"))
        is_persistent = "keep-alive" in options if self.head.version == 10 else self.head.status_code != 101
        self.may_keep_connection = is_framed and is_persistent and "close" not in options
        return reply

    def _read_head(self) -> Generator[str, None, list[tuple[str, str]]]:
        """Read status and headers, which are returned as they came; informational replies are passed over."""
        left = MAX_HEAD
        while True:
            while not self._incoming.startswith(VERSION):
                if not VERSION.startswith(bytes(self._incoming)):  # it may wait for an answer now
                    raise PeerError(f"what came is no HTTP: {_quoted(self._incoming)}")
                yield "without a reply"
            lines = yield from self._take_lines(left, "within the head of its reply")
            left -= sum(map(len, lines))
            status_line = _STATUS_LINE.fullmatch(lines[0])
            if status_line is None:
                raise PeerError(f"the status line cannot be read: {_quoted(lines[0])}")
            status_code = int(status_line[2])
            if status_code == 101 or status_code >= 200:
                break
        headers = _headers(b"".join(lines[1:]))
        reason = status_line[3].decode("latin-1").strip()
        self.head = Head(status_code, reason, 10 if status_line[1] == b"0" else 11, dict(headers))
        return headers

    def _read_chunks(self) -> Generator[str, None, None]:
        """Read a body in chunks, and the trailer, which nobody asked for (RFC 9112, 7.1)."""
        count = 0
        while True:
            line = yield from self._take_line(MAX_CHUNK_LINE, "before the last chunk of its reply")
            chunk_line = _CHUNK_LINE.fullmatch(line)
            if chunk_line is None:
                raise PeerError(f"the size of a chunk cannot be read: {_quoted(line)}")
            size = int(chunk_line[1], 16)
            if not size:
                break
            count += 1
            if count > MAX_CHUNKS:
                raise PeerError(f"the reply has over {MAX_CHUNKS:,} chunks", may_retry=False)
            yield from self._read_content(size, "a chunk of its reply")
            line = yield from self._take_line(2, "before the last chunk of its reply")
            if line not in LINE_ENDS:
                raise PeerError("a chunk is longer than its size")
        self._is_body_whole = True
        yield from self._take_lines(MAX_HEAD, "before the trailer of its reply was over")

    def _read_until_end(self) -> Generator[str, None, None]:
        """Read a body that ends with the connection."""
        while True:
            yield from self._read_content(len(self._incoming), "its reply")
            if self._has_ended:
                return
            yield "within its reply"

    def _read_content(self, size: int, of: str) -> Generator[str, None, None]:
        """Read so many bytes of the body."""
        end = len(self._body) + size
        if end > MAX_REPLY:
            raise PeerError(TOO_LARGE, may_retry=False)
        while True:
            self._body += self._take(end - len(self._body))
            missing = end - len(self._body)
            if not missing:
                return
            yield f"after {size - missing:,} of {size:,} bytes of {of}"

    def _take_lines(self, limit: int, place: str) -> Generator[str, None, list[bytes]]:
        """Take lines up to the blank one that ends a head or a trailer, at most so many bytes."""
        lines: list[bytes] = []
        while not lines or lines[-1] not in LINE_ENDS:
            line = yield from self._take_line(limit, place)
            if not line.endswith(b"\n"):
                raise PeerError(f"got headers of over {MAX_HEAD // 1024} KiB")
            limit -= len(line)
            lines.append(line)
        return lines

    def _take_line(self, limit: int, place: str) -> Generator[str, None, bytes]:
        """Take a line with its end, or so many bytes of one that is longer."""
        searched = 0
        while True:
            end = self._incoming.find(b"\n", searched, limit) + 1
            if end or len(self._incoming) >= limit:
                return bytes(self._take(end or limit))
            searched = len(self._incoming)
            yield place

    def _take(self, size: int) -> bytearray:
        """Take so many bytes, or all if there are fewer."""
        taken = self._incoming[:size]
        del self._incoming[:size]  # at its beginning, a bytearray gives bytes up without moving the rest
        return taken

    def _reply(self) -> Reply:
        assert self.head is not None
        body = bytes(self._body)
        try:
            body = _decoded(body, self.head.headers.get("content-encoding", ""))
        except PeerError:
            if not self._is_unsuccessful:
                raise
        return Reply(self.head.status_code, self.head.headers, body)


def _headers(text: bytes) -> list[tuple[str, str]]:
    """Read header lines; one that is none is skipped, with what is folded under it."""
    headers = []
    for line in _FOLD.sub(" ", text.decode("latin-1")).split("\n"):
        name, colon, value = line.partition(":")
        match = _NAME.fullmatch(name)
        if colon and match:
            headers.append((match[1].lower(), _BLANKS.sub(" ", value).strip(" ")))
    return headers


def _combined(headers: list[tuple[str, str]], name: str) -> str:
    """Return a header's value; of a header that is there more than once, all of them as one list (RFC 9110, 5.3)."""
    return ", ".join(value for key, value in headers if key == name)


def _members(value: str) -> set[str]:
    """Return what a header's value lists, in lower case; what is said twice counts once."""
    return {member.strip(" ").lower() for member in value.split(",")}


def _length(value: str) -> int:
    """Read Content-Length, which may be said more than once, but not in two ways (RFC 9110, 8.6)."""
    length, *others = _members(value)
    if others or not _LENGTH.fullmatch(length):
        raise PeerError(f"the reply does not say one length: Content-Length is {value[:QUOTED]}")
    return int(length)


def _decoded(body: bytes, coding: str) -> bytes:
    """Undo a content coding although ``identity`` was asked for (RFC 9110, 8.4.1)."""
    codings = _members(coding) - NOT_CODED
    if not codings or not body:
        return body
    if not codings <= {"gzip", "x-gzip", "deflate"}:
        raise PeerError(f"the reply came in a content coding that nobody asked for: {coding[:QUOTED]}")

    # Of the two that call themselves deflate, zlib's format is the right one, and the bare one is in use.
    for window_bits in (zlib.MAX_WBITS + 32, -zlib.MAX_WBITS):
        try:
            return _decompressed(body, window_bits)
        except zlib.error:
            pass
    raise PeerError(f"the reply is broken {coding[:QUOTED]}")


def _decompressed(body: bytes, window_bits: int) -> bytes:
    """Decompress each member of what may have several (RFC 1952, 2.2); zlib.error if one of them is not whole."""
    decompressed = bytearray()
    position = 0
    while True:
        decompressor = zlib.decompressobj(window_bits)
        while not decompressor.eof:
            # Not more at a time: it grows up to a thousandfold, and zlib copies what is behind a member's end.
            piece = body[position : position + 4096]
            if not piece:
                raise zlib.error("cut short")
            decompressed += decompressor.decompress(piece)
            if len(decompressed) > MAX_REPLY:
                raise PeerError(TOO_LARGE, may_retry=False)
            position += len(piece) - len(decompressor.unused_data)
        if not body.startswith(_GZIP, position):  # what else is behind it, padding say, has no meaning
            return bytes(decompressed)


def _quoted(text: bytes | bytearray) -> str:
    """Return how a line of the peer begins."""
    return text[:QUOTED].partition(b"\n")[0].decode("latin-1").strip()
