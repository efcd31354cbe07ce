"""What a peer wrote is shown without secrets and on one line; nothing else is touched."""

from __future__ import annotations

import base64
import html
import json
import random
import string
import time
from typing import Any, Callable
from urllib.parse import quote

import pytest

from zamp_sdk.action_executor.redaction import Redactor, one_line

TOKEN = "sk_live_0123456789/+=&\"'<>\\x"
WRITTEN: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON with \\/": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "JSON for HTML": lambda text: "".join(char if char.isalnum() else f"\\u{ord(char):04x}" for char in text),
    "URL": lambda text: quote(text, safe=""),
    "URL, path": quote,
    "URL, lower case": lambda text: "".join(char if char.isalnum() else f"%{ord(char):02x}" for char in text),
    "HTML": html.escape,
    "HTML, decimal": lambda text: "".join(char if char.isalnum() else f"&#{ord(char)};" for char in text),
    "HTML, hexadecimal": lambda text: "".join(char if char.isalnum() else f"&#x{ord(char):X};" for char in text),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
    "base64 in a URL": lambda text: quote(base64.b64encode(text.encode()).decode(), safe=""),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_forms(form: str) -> None:
    """A secret is found as it is, and as each format writes it."""
    shown = Redactor(TOKEN).text(f"seen {WRITTEN[form](TOKEN)}, twice {WRITTEN[form](TOKEN)}!")
    assert shown.replace("=", "").replace("%3D", "") == "seen [token], twice [token]!"


def test_several_secrets() -> None:
    """Every secret is found, the credentials of a proxy as Basic sends them too."""
    redactor = Redactor(TOKEN, ["user", "pass word", "user:pass word"])
    echoed = base64.b64encode(b"user:pass word").decode()
    shown = redactor.text(f"Basic {echoed}; pass+word; pass%20word; {TOKEN}")
    assert shown.replace("=", "") == "Basic [token]; [token]; [token]; [token]"


@pytest.mark.parametrize("size", range(8, len(TOKEN)))
@pytest.mark.parametrize("end", ["", "...", "…"])
def test_cut_short(size: int, end: str) -> None:
    """The beginning of a secret is found where a peer's text, or a peer's excerpt, ends."""
    assert Redactor(TOKEN).text(f"seen {TOKEN[:size]}{end}") == f"seen [token]{end}"


@pytest.mark.parametrize("end", ["", "...", '"'])
@pytest.mark.parametrize("form", ["JSON for HTML", "URL", "HTML", "HTML, decimal"])
def test_cut_short_as_a_format_writes_it(form: str, end: str) -> None:
    """So is a beginning that a format has escaped, also one that ends within an escape."""
    token = "tok+en/0123456789/+=&<0123"
    echo = WRITTEN[form](token)
    for size in range(len(WRITTEN[form](token[:8])), len(echo)):
        assert Redactor(token).text(f"seen {echo[:size]}{end}") == f"seen [token]{end}"


@pytest.mark.parametrize("text", ["sk_live_ is a prefix", "sk_live_0123 and more", "token", "sk_live..."])
def test_what_is_no_secret(text: str) -> None:
    """A beginning that is followed by other words, or that is too short, stays."""
    assert Redactor(TOKEN).text(text) == text


@pytest.mark.parametrize("secret", ["", "a", "test", "RUNNING"])
def test_short_secrets_are_left_alone(secret: str) -> None:
    """What is shorter than 8 characters cannot be told from innocent words."""
    text = f"a test of {secret} RUNNING {secret}..."
    assert Redactor(secret).text(text) == text


def test_json() -> None:
    """Texts and names anywhere in a JSON value are without secrets; the value given stays as it was."""
    value = {"a": [TOKEN, {TOKEN: [None, 1, 2.5, True, f"x{TOKEN}"]}], "b": {}}
    before = json.dumps(value)
    assert Redactor(TOKEN).json(value) == {"a": ["[token]", {"[token]": [None, 1, 2.5, True, "x[token]"]}], "b": {}}
    assert json.dumps(value) == before
    assert Redactor(TOKEN).json(TOKEN) == "[token]"
    assert Redactor(TOKEN).json(None) is None


def test_json_of_any_depth() -> None:
    """A value that is nested more deeply than JSON can be written is not shown at all."""
    value: Any = TOKEN
    for _ in range(100_000):
        value = [value]
    assert Redactor(TOKEN).json(value) == "(nested too deeply to be shown)"


def test_json_that_a_secret_is_part_of() -> None:
    """Where a secret has JSON's own punctuation in it, what is left is text."""
    assert Redactor('["abcdefgh').json({"a": ["abcdefgh"]}) == '{"a": [token]"]}'


@pytest.mark.parametrize("credential", ["user", "s3cr", "hunter2"])
def test_short_credentials_of_a_proxy(credential: str) -> None:
    """A proxy's user name or password is a secret from 4 characters on, in base64 too."""
    redactor = Redactor(TOKEN, [credential, f"x:{credential}"])
    basic = base64.b64encode(f"x:{credential}".encode()).decode().rstrip("=")
    assert redactor.text(f"denied for {credential}, Basic {basic}") == "denied for [token], Basic [token]"
    assert Redactor(TOKEN, ["abc"]).text("abc") == "abc"


FOREIGN: dict[str, Callable[[str], str]] = {
    **WRITTEN,
    "JSON in UTF-8": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "UTF-8 read as latin-1": lambda text: text.encode().decode("latin-1"),
    "latin-1 read as UTF-8": lambda text: text.encode("latin-1").decode(errors="replace"),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_a_password_that_is_not_ascii(form: str) -> None:
    """A proxy's password may have any letters, and is found also in text that was read in another charset."""
    shown = Redactor(TOKEN, ["pässwörd"]).text(f"denied for {FOREIGN[form]('pässwörd')}")
    assert shown.replace("=", "").replace("%3D", "") == "denied for [token]"


def test_a_password_beyond_unicodes_first_plane() -> None:
    """JSON in ASCII writes such a character as two."""
    assert Redactor(TOKEN, ["\U0001f600password"]).text(r"denied for \ud83d\uDE00password") == "denied for [token]"


def test_a_beginning_that_a_quote_ends() -> None:
    """A text in JSON that ends with the beginning of a secret was cut short."""
    assert Redactor(TOKEN).json({"key": TOKEN[:10]}) == {"key": "[token]"}


@pytest.mark.parametrize(
    "text", [TOKEN[:8] * 100_000, TOKEN[:-1] * 30_000, TOKEN[:8] + "." * 800_000, "\\" * 800_000, "\ufffd" * 800_000]
)
def test_a_long_text_is_redacted_in_a_moment(text: str) -> None:
    """What is full of beginnings of a secret, or of escapes, takes a time that grows with it and no faster."""
    began = time.process_time()
    assert TOKEN not in Redactor(TOKEN, ["a" * 40, "é" * 40]).text(text)
    assert time.process_time() - began < 20  # s; where each beginning is compared with all that follows it takes hours


def test_long_secrets() -> None:
    """A token of several kilobytes, as a JSON Web Token may be, is a secret as any other, whole and cut short."""
    token = "eyJ" + "aB3-_." * 1500
    assert Redactor(token).text(f"{token} {token[:7000]}...") == "[token] [token]..."


def test_repr() -> None:
    """The repr of a redactor does not show its secrets."""
    assert TOKEN not in repr(Redactor(TOKEN))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("", ""),
        (" two\r\n lines\t", "two lines"),
        ("\x1b[31mred\x07\x00", "?[31mred??"),
        ("\u202eevil\u2066", "?evil?"),
        ("\ud800", "?"),
        ("ü…日本", "ü…日本"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "..."),
        ("\n" * 10_000 + "x", "..."),
    ],
)
def test_one_line(text: str, line: str) -> None:
    """A text is shown on one printable line of at most 200 characters."""
    assert one_line(text) == line


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_and_texts(seed: int) -> None:
    """Whatever the token is, no echo of it survives, and a text without it stays as it is."""
    dice = random.Random(seed)
    printable = "".join(map(chr, range(33, 127)))
    for _ in range(50):
        alphabet = dice.choice([printable, string.ascii_letters + string.digits + "-_.", "ab", string.punctuation])
        token = "".join(dice.choices(alphabet, k=dice.randrange(8, 60)))
        words = ["".join(dice.choices("ghijk \n\x1b'\"{}", k=dice.randrange(30))) + "~" for _ in range(6)]
        redactor = Redactor(token)
        if not any(token in form for form in (" ".join(words), " ")):
            assert redactor.text(" ".join(words)) == " ".join(words)
        for form, write in WRITTEN.items():
            echo = write(token)
            shown = redactor.text(f"{words[0]}={echo} {words[1]}")
            assert echo not in shown, (token, form)
            assert token not in shown, (token, form)
            assert shown.startswith(words[0][:1]), (token, form)
