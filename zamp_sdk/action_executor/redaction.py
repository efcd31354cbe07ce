"""What a peer wrote, made fit to be shown: without secrets, and on one printable line. Pure.

A peer is a platform, a gateway or a proxy. It may echo the token that it was sent, as it came or as its own format
writes it. So text of a peer goes through a ``Redactor`` once, where it is put into an error or a log. Nothing else
does: ids, known statuses and this package's own words stay as they are, whatever the token may be.

Each character of a secret that some format writes in another way is searched for in all its ways at once:

- as it is;
- percent-encoded, also more than once (RFC 3986, 2.1);
- escaped as in JSON (RFC 8259, 7), also more than once;
- as an HTML character reference.

The same is done for the secret in base64, which is how ``Basic`` sends ``user:password`` (RFC 7617). What a peer cut
short (``sk_live_12...``) is found by its beginning.
"""

from __future__ import annotations

import re
from typing import Any

SHORTEST_SECRET = 8  # characters; a shorter one, such as "test", would be found in innocent words
CUT = ("...", "\N{HORIZONTAL ELLIPSIS}")  # what stands for the rest of a text
MASK = "[token]"
SHOWN = 200  # characters of a peer's text that a message shows: two lines of a terminal
_NAMED = {'"': "quot", "&": "amp", "'": "apos", "<": "lt", ">": "gt"}  # the character references that HTML escapes use


class Redactor:
    """Takes secrets out of what a peer wrote; those under 8 characters are left alone."""

    def __init__(self, *secrets: str) -> None:
        self._secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]
        self._patterns: list[tuple[re.Pattern[str], re.Pattern[str], list[str]]] | None = None

    def text(self, text: str) -> str:
        """Return the text with each secret replaced by ``[token]``."""
        if self._patterns is None:  # most requests go well, and need none
            self._patterns = [_patterns(form) for secret in self._secrets for form in _forms(secret)]
        for whole, _, _ in self._patterns:
            text = whole.sub(MASK, text)
        for _, beginning, characters in self._patterns:
            text = _without_cut(text, beginning, characters)
        return text

    def json(self, value: Any) -> Any:
        """Return a copy of a JSON value in which each text, names included, is without secrets.

        It keeps a list of what is left to do instead of calling itself: JSON can be nested more deeply than calls.
        """
        root = [value]
        unfinished: list[Any] = [root]  # copies whose members are still the peer's
        while unfinished:
            copy = unfinished.pop()
            for place, member in list(copy.items() if isinstance(copy, dict) else enumerate(copy)):
                if isinstance(member, str):
                    copy[place] = self.text(member)
                elif isinstance(member, dict):
                    copy[place] = {self.text(name): item for name, item in member.items()}
                    unfinished.append(copy[place])
                elif isinstance(member, list):
                    copy[place] = list(member)
                    unfinished.append(copy[place])
        return root[0]


def one_line(text: str, limit: int = SHOWN) -> str:
    """Return how a text begins, on one line that is safe to print; ``limit`` is in characters."""
    beginning = text[: 4 * limit]  # some of it may be white space
    line = " ".join(beginning.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit and len(beginning) == len(text) else line[:limit] + "..."


def _forms(secret: str) -> list[str]:
    from base64 import b64encode, urlsafe_b64encode  # only errors need them

    data = secret.encode(errors="surrogatepass")
    encoded = {encode(data).decode().rstrip("=") for encode in (b64encode, urlsafe_b64encode)}
    return [secret, *sorted(encoded)]


def _patterns(form: str) -> tuple[re.Pattern[str], re.Pattern[str], list[str]]:
    """Return patterns of the whole form, of its beginning, and of each of its characters."""
    characters = [_character(character) for character in form]
    return re.compile("".join(characters)), re.compile("".join(characters[:SHORTEST_SECRET])), characters


def _character(character: str) -> str:
    """Return a pattern of all the ways in which a character is written."""
    if character.isascii() and character.isalnum():
        return character  # which no format escapes, and which keeps the search fast
    code = ord(character)
    octets = character.encode(errors="surrogatepass")
    units = character.encode("utf-16-be", errors="surrogatepass")
    ways = [
        # The (?i:...) is for the hexadecimal digits. Eight backslashes are JSON inside JSON inside JSON.
        r"\\{0,8}" + re.escape(character),
        "(?i:" + "".join(f"%(?:25){{0,3}}{octet:02x}" for octet in octets) + ")",
        "(?i:" + "".join(rf"\\{{1,8}}u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)) + ")",
        f"(?i:&(?:amp;){{0,3}}#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});)",
    ]
    if character == "\\":
        ways[0] = r"\\{1,8}"
    elif character == " ":
        ways.append(r"\+")
    if character in _NAMED:
        ways.insert(0, f"&(?:amp;){{0,3}}{_NAMED[character]};")
    return f"(?:{'|'.join(ways)})"


def _without_cut(text: str, beginning: re.Pattern[str], characters: list[str]) -> str:
    """Replace what is the beginning of a secret, and then ends as a text does that was cut short."""
    pieces: list[str] = []
    done = at = 0
    while True:
        match = beginning.search(text, at)
        if match is None:
            return "".join(pieces) + text[done:]
        end, at = match.end(), match.start() + 1
        for character in characters[SHORTEST_SECRET:]:
            more = re.compile(character).match(text, end)  # re keeps what it has compiled
            if more is None:
                break
            end = more.end()
        if end == len(text) or text.startswith(CUT, end):
            pieces += [text[done : match.start()], MASK]
            done = at = end
