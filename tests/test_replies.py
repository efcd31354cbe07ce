"""What a reply says: ids, statuses, results and reasons, read in every shape; nothing secret in what is shown."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import cases
from tests.servers import TOKEN
from zamp_sdk import transport
from zamp_sdk.action_executor import replies
from zamp_sdk.action_executor.redaction import Redactor

EXCHANGES = json.loads((Path(__file__).parent / "data" / "exchanges.json").read_text(encoding="utf-8"))["exchanges"]
REDACT = Redactor(TOKEN)


def raw(body: Any, status_code: int = 200, **headers: str) -> transport.Reply:
    """Make a reply as it comes; ``retry_after="1"`` is a header, and a body that is not bytes is JSON."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return transport.Reply(status_code, names, body if isinstance(body, bytes) else json.dumps(body).encode())


def read_start(body: Any, status_code: int = 200, **headers: str) -> replies.ActionReply:
    """Read the reply to a start."""
    return replies.read_start(raw(body, status_code, **headers), REDACT, 0.0)


def read_poll(body: Any, status_code: int = 200, **headers: str) -> replies.ActionReply:
    """Read the reply to a question about the action act-1."""
    return replies.read_poll("act-1", raw(body, status_code, **headers), REDACT, 0.0)


def recorded_polls() -> list[Any]:
    """Take the replies to polls from the recordings."""
    polls = [reply for exchange in EXCHANGES for reply in exchange.get("replies", [])]
    assert polls, "tests/data/exchanges.json holds no poll"
    return polls


@pytest.mark.parametrize("reply", recorded_polls(), ids=lambda reply: reply["means"])
def test_a_recorded_reply_means_what_was_noted_beside_it(reply: Any) -> None:
    """A recorded reply means what was noted beside it."""
    means = reply["means"]
    read = read_poll(reply["body"])
    if means.startswith("HttpClientError"):
        assert (read.status, read.problem, read.may_retry) == (None, "quota exceeded", False)
        return
    inner = reply["body"].get("data") or reply["body"]
    assert (read.problem, read.action_id) == (None, "act-1")
    assert (read.status, read.result) == (inner["status"], inner.get("result"))
    assert read.reason == ("boom" if "boom" in means else "")


@pytest.mark.parametrize("reply", [exchange["reply"]["body"] for exchange in EXCHANGES if "reply" in exchange])
def test_a_recorded_start_names_its_action(reply: Any) -> None:
    """The reply to a start has the id of the action."""
    assert read_start(reply) == replies.ActionReply(200, action_id=reply["id"], size=len(json.dumps(reply)))


@pytest.mark.parametrize("action_id", cases.BAD_IDS)
def test_a_bad_id_is_refused_from_a_caller(action_id: str) -> None:
    """An id that no platform gives is a ValueError."""
    with pytest.raises(ValueError, match="not an action id"):
        replies.check_action_id(action_id)


def test_an_id_is_text() -> None:
    """An id of another type is a TypeError."""
    with pytest.raises(TypeError, match="action_id must be text, not int"):
        replies.check_action_id(7)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("action_id", cases.NO_IDS)
def test_an_unusable_id_of_a_reply_is_none(action_id: Any) -> None:
    """A start's reply whose id is missing, empty, a path or not text cannot be used, and says what it has instead."""
    read = read_start({"id": action_id})
    assert read.action_id is None
    assert str(read.problem).startswith("the reply has no usable id")
    assert str(read.problem).isprintable()
    assert (", but " in str(read.problem)) is (action_id not in (None, ""))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "the reply is not JSON: (empty)"),
        (b"<html>", "the reply is not JSON: <html>"),
        (b"[1]", "the reply is not a JSON object: [1]"),
        (b"null", "the reply is not a JSON object: null"),
        (b"\xff", "the reply is not JSON: \ufffd"),
        (b'{"a": 1', 'the reply is not JSON: {"a": 1'),
        ({}, "the reply has no status"),
        ({"id": "act-1", "status": 7}, "the reply has no status"),
        ({"id": "act-2", "status": "COMPLETED"}, "the reply is about another action"),
        ({"data": None, "error": None}, "the reply has no status"),
    ],
)
def test_a_reply_that_cannot_be_used_says_why_and_may_be_asked_for_again(body: Any, problem: str) -> None:
    """What is no JSON object, or tells no status of the action, is a problem that may pass."""
    read = read_poll(body, etag="x")
    assert (read.problem, read.may_retry) == (problem, True)
    assert read.headers == {"etag": "x"}
    assert read.body == (body.decode(errors="replace") if isinstance(body, bytes) else json.dumps(body))


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        pytest.param(
            b"7" * 5000,
            "more digits",
            marks=pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python reads any number"),
        ),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("read", [read_start, read_poll])
def test_what_can_never_be_read_is_said_plainly(read: Any, result: bytes, problem: str) -> None:
    """Valid JSON that Python cannot read is told as what it is, and asking again does not help."""
    reply = read(b'{"id": "act-1", "status": "COMPLETED", "result": ' + result + b"}")
    assert problem in reply.problem
    assert not reply.may_retry


def test_a_usable_reply_carries_nothing_else() -> None:
    """What can be used has no text for errors, and its result is as it came, whatever is in it."""
    read = read_poll({"id": "act-1", "status": "COMPLETED", "result": f"Bearer {TOKEN}"}, etag="x")
    assert (read.result, read.headers, read.body, read.problem) == (f"Bearer {TOKEN}", {}, "", None)
    assert "Bearer" not in repr(read)


@pytest.mark.parametrize(
    ("code", "may_retry"), [(100, True), (301, False), (404, False), (408, True), (429, True), (500, True), (599, True)]
)
def test_another_status_code_is_a_problem(code: int, may_retry: bool) -> None:
    """A reply that is no success has a problem, in its own words, whatever else it says."""
    read = read_poll({"id": "act-1", "status": "COMPLETED", "error": "no"}, code)
    assert (read.status, read.problem, read.may_retry) == (None, "no", may_retry)


@pytest.mark.parametrize("declared", ["ISO-8859-1", '"iso-8859-1"', "latin1; x=y"])
def test_json_in_a_declared_charset_is_read_as_declared(declared: str) -> None:
    """JSON that is no UTF-8 is read in the charset that it declares."""
    body = '{"status": "COMPLETED", "result": "Müller"}'
    read = read_poll(body.encode("latin-1"), content_type=f"application/json; charset={declared}")
    assert read.result == "Müller"
    assert read_poll(body.encode("utf-16")).result == "Müller"
    refused = read_poll('{"error": "für"}'.encode("latin-1"), 400, content_type=f"application/json; charset={declared}")
    assert (refused.problem, refused.body) == ("für", '{"error": "für"}')


@pytest.mark.parametrize("declared", ["ISO-8859-1", "no-such-charset", "rot13"])
def test_utf_8_is_read_whatever_is_declared(declared: str) -> None:
    """JSON is UTF-8 (RFC 8259, 8.1), and gateways that declare something else are often wrong."""
    body = '{"status": "COMPLETED", "result": "Müller"}'.encode()
    assert read_poll(body, content_type=f"application/json; charset={declared}").result == "Müller"
    assert read_poll(body[:-4] + b'\xff"}', content_type=f"text/plain; charset={declared}").status in (
        None,
        "COMPLETED",
    )


def test_a_header_that_ends_like_a_token_without_its_quote() -> None:
    """Headers are looked through one by one: as JSON, the quote behind one would be taken for the end of a token."""
    read = replies.read_start(raw({}, 400, x_echo="abcdefgh12"), Redactor('abcdefgh12"'), 0.0)
    assert read.headers == {"x-echo": "[token]"}


@pytest.mark.parametrize("declared", ["idna", "punycode", "undefined", "hex", "utf-16", "mbcs", "_", "aliases", "..."])
@pytest.mark.parametrize("code", [200, 500])
def test_text_in_no_charset_is_shown_with_replacements(code: int, declared: str) -> None:
    """What is no UTF-8 and not in the charset that it declares either, is a problem like others, whatever that is."""
    read = read_start(b'{"id": "act-\xff\xe9", "error": null}', code, content_type=f"text/html; charset={declared}")
    assert read.problem is not None
    assert read.may_retry
    assert read.action_id is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("boom", "boom"),
        ({"message": "boom", "code": 7}, "boom"),
        ({"message": "boom", "type": "CardError"}, "CardError: boom"),
        ({"message": "boom", "type": 7}, "boom"),
        ({"code": 7}, '{"code":7}'),
        (["a"], '["a"]'),
        (None, "no reason given"),
        ("", "no reason given"),
    ],
)
def test_any_shape_of_error_is_told_in_words(error: Any, reason: str) -> None:
    """Any shape of error is told in words, and kept as it came."""
    read = read_poll({"status": "FAILED", "error": error})
    assert read.reason == reason
    assert read.error == error


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
        (b'{"message": "no"}', "no"),
        (b"{}", "{}"),
        (b"[7]", "[7]"),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b'{"error": "' + b"x" * 100_000 + b'"}', "x" * 500 + "..."),
        (b"", "(empty)"),
    ],
)
def test_a_refusal_is_told_by_what_says_why(body: bytes, reason: str) -> None:
    """A refusal is told by the field that says why, or as it came."""
    assert read_start(body, 400).problem == reason


SECOND = "Wed, 21 Oct 2026 07:28:00 GMT"
NOW = 1_792_567_680.0  # the same


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after": "5.0"}, 5.0),
        ({"retry-after": "0.503"}, 0.503),
        ({"retry-after": ".5"}, 0.5),
        ({"retry-after": "5."}, 5.0),
        ({"retry-after": "9" * 400}, float("inf")),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "."}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": SECOND}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": SECOND}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:20 GMT"}, 10.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:30 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "now"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 09:28:30 +0200", "date": SECOND}, 30.0),
        ({"retry-after": "Wednesday, 21-Oct-26 07:28:30 GMT", "date": SECOND}, 30.0),
        ({"retry-after": "Wed Oct 21 07:28:30 2026", "date": SECOND}, 30.0),
        ({"retry-after": "Wed Oct 21 07:28:30 2026", "date": "Wed Oct 21 07:28:00 2026"}, 30.0),
        ({"retry-after": "Wed, 99 Oct 99999999999999999999 07:28:30 GMT"}, None),
    ],
)
def test_retry_after_is_read_in_all_of_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    """Retry-After is seconds, with decimals too, or a date, compared with the reply's own or with this machine's."""
    assert replies.retry_after(headers, NOW) == seconds


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [TOKEN, f"Bearer {TOKEN} is wrong", TOKEN.replace("z", "\\u007a"), TOKEN[:12] + "..."])
@pytest.mark.parametrize("code", [200, 307, 401, 500])
def test_no_reply_shows_the_token(echo: str, code: int) -> None:
    """A reply that echoes the token has it in no text of an error, whatever field it comes in."""
    body = f'{{"error": {{"message": "{echo}"}}}}'.encode()
    headers = {"location": f"/{echo}", echo: echo}
    for read in (replies.read_start, lambda *all_of_it: replies.read_poll("act-1", *all_of_it)):
        reply = read(transport.Reply(code, headers, body), REDACT, 0.0)
        assert reply.problem
        assert TOKEN[:12] not in f"{reply._asdict()}"


def test_the_error_of_an_action_shows_no_token() -> None:
    """An action's error, and a status that nobody knows, are without the token; an id is as it came."""
    failed = read_poll({"id": "act-1", "status": "FAILED", "error": {"message": f"no {TOKEN}", TOKEN: [TOKEN]}})
    assert (failed.error, failed.reason) == ({"message": "no [token]", "[token]": ["[token]"]}, "no [token]")
    assert read_poll({"status": f"SEEN {TOKEN}", "error": "e"}).status == "SEEN [token]"
    assert read_start({"id": TOKEN}).action_id == TOKEN


def test_megabytes_of_error_that_nearly_hold_the_token_are_read_in_a_moment() -> None:
    """The time to redact a text grows with it and no faster, even where it is full of the token's beginnings."""
    body = json.dumps({"status": "FAILED", "error": TOKEN[:8] * 500_000}).encode()
    began = time.process_time()
    assert read_poll(body).error == TOKEN[:8] * 499_999 + "[token]"
    assert time.process_time() - began < 20  # 4 MB; compared each with each, its beginnings would take a day
