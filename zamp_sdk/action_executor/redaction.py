"""What a peer wrote, made fit to be shown: without secrets, and on one printable line. Pure.

A peer is a platform, a gateway or a proxy. It may echo the token that it was sent, or a proxy's user name and password,
as it came or as its own format writes it. So text of a peer goes through a ``Redactor`` once, where it is put into an
error or a log. Nothing else does: ids, known statuses and this package's own words stay as they are, whatever the token
may be.

A token is printable ASCII; a proxy's password may be any text, and is sent in UTF-8. A secret is searched for as it is;
percent-encoded (RFC 3986, 2.1), escaped as in JSON (RFC 8259, 7) or as an HTML character reference, once, each
character by itself; and all of that in base64 too, which is how ``Basic`` sends ``user:password`` (RFC 7617). What is
not ASCII is also found where the text was read in another charset than it was written in. What a peer cut short
(``sk_live_12...``) is found by its beginning. The time for that grows with the text and not faster, whatever the text
holds.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Sequence

SHORTEST_TOKEN = 8
"""Characters; a shorter one, such as "test", would be found in innocent words, and is left alone."""

SHORTEST_CREDENTIAL = 4
"""Characters of a proxy's user name or password, which are often short: an innocent word may be lost, but no secret."""

CUT = ("...", "\N{HORIZONTAL ELLIPSIS}", '"')
"""What stands where a text was cut short; a quote ends a text in JSON."""

MASK = "[token]"

SHOWN = 200
"""Characters of a peer's text that a message shows: two lines of a terminal."""

_NAMED = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}
"""The character references that HTML escapes use."""

_PART_OF_AN_ESCAPE = re.compile(r"%[\da-f]?|\\(u[\da-f]{0,3})?|&(#x?[\da-f]*|[a-z]*)", re.ASCII | re.IGNORECASE)


class Redactor:
    """Takes secrets out of what a peer wrote: the token, and the credentials of the proxy that it came through."""

    def __init__(self, token: str = "", credentials: Sequence[str] = ()) -> None:
        self._secrets = [token] if len(token) >= SHORTEST_TOKEN else []
        self._secrets += [secret for secret in credentials if len(secret) >= SHORTEST_CREDENTIAL]
        self._patterns: dict[str, re.Pattern[str]] | None = None

    def text(self, text: str) -> str:
        """Return the text with each secret replaced by ``[token]``."""
        if self._patterns is None:  # most requests go well, and need none
            # The longest first, for a secret may be part of another.
            forms = sorted({form for secret in self._secrets for form in _forms(secret)}, key=len, reverse=True)
            self._patterns = {form: re.compile("".join(map(_character, form))) for form in forms}
        for pattern in self._patterns.values():
            text = pattern.sub(MASK, text)
        for form in self._patterns:
            if len(form) > SHORTEST_TOKEN:
                text = _without_cut(text, form)
        return text

    def json(self, value: Any) -> Any:
        """Return a JSON value in which each text, names included, is without secrets."""
        from json import dumps, loads

        try:
            written = dumps(value, ensure_ascii=False)
        except RecursionError:  # as deep as it could just be read
            return "(nested too deeply to be shown)"
        clean = self.text(written)
        try:
            return value if clean == written else loads(clean)
        except ValueError:  # a token that has JSON's own punctuation in it
            return clean


def one_line(text: str, limit: int = SHOWN) -> str:
    """Return how a text begins, on one line that is safe to print; ``limit`` is in characters."""
    beginning = text[: 4 * limit]  # some of it may be white space
    line = " ".join(beginning.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit and len(beginning) == len(text) else line[:limit] + "..."


def _forms(secret: str) -> list[str]:
    from base64 import b64encode, urlsafe_b64encode  # only errors need them

    return [secret, *(encode(secret.encode()).decode().rstrip("=") for encode in (b64encode, urlsafe_b64encode))]


def _character(character: str) -> str:
    """Return a pattern of all the ways in which a character is written."""
    if character.isascii() and character.isalnum():
        return character  # which no format escapes, and which keeps the search fast
    from json import dumps  # a text that is not ASCII it writes as JSON's escapes

    code, octets = ord(character), character.encode()
    escape = dumps(character)[1:-1] if code > 127 else f"\\u{code:04x}"
    ways = [
        "\\\\" + re.escape(character),
        "(?i:" + "".join(f"%{octet:02x}" for octet in octets) + ")",
        f"(?i:{re.escape(escape)})",
        f"(?i:&#(?:{code}|x{code:x});)",
    ]
    if code > 127:  # a head is read as latin-1, and what is no UTF-8 with replacements
        ways += [re.escape(octets.decode("latin-1")), "\N{REPLACEMENT CHARACTER}"]
    if character == " ":  # in a password
        ways.append(r"\+")
    if character in _NAMED:
        ways.append(f"&{_NAMED[character]};")
    ways.append(re.escape(character))  # the last, for an escape may begin with it
    return f"(?:{'|'.join(ways)})"


def _without_cut(text: str, form: str) -> str:
    """Replace what is the beginning of a secret, and then ends as a text does that was cut short."""
    beginning = re.compile("".join(map(_character, form[:SHORTEST_TOKEN])))
    pieces: list[str] = []
    done, match = 0, beginning.search(text)
    while match:
        at, end = match.span()
        for character in form[SHORTEST_TOKEN:]:
            more = _character_pattern(character).match(text, end)
            if not more:
                break
            end = more.end()
        is_taken = text[end - 1] in "%\\&"  # what an escape begins with, for a character of the secret
        part = _PART_OF_AN_ESCAPE.match(text, end - 1 if is_taken else end)
        end = end if part is None else part.end()
        if end == len(text) or text.startswith(CUT, end):
            pieces += [text[done:at], MASK]
            done = end
        match = beginning.search(text, max(done, at + 1))
    return "".join(pieces) + text[done:]


@functools.lru_cache(maxsize=128)
def _character_pattern(character: str) -> re.Pattern[str]:
    return re.compile(_character(character))
