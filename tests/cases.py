"""What several layers are tried with, each kind in one place: base URLs, tokens, ids, status codes."""

from __future__ import annotations

from typing import Any

SECRET = "hunter2"  # no error may quote it

BAD_BASE_URLS = [
    "api.example.com",
    "//api.example.com",
    "ftp://api.example.com",
    "file:///etc/passwd",
    "data:application/json,{}",
    "http\u017f://api.example.com",  # a long s
    "http://",
    "https://",
    "https:///path",
    f"https://user:{SECRET}@api.example.com",
    f"https://api.example.com?key={SECRET}",
    f"https://api.example.com/#{SECRET}",
    f"https://api.example.com/\r\nX-Key: {SECRET}",
    "https://api.example.com/a b",
    "https://api.example.com\\@evil.example",
    "https://api.example.com:",
    "https://api.example.com:0",
    "https://api.example.com:65536",
    "https://api.example.com:http",
    "https://api.example.com:+80",
    "https://api.example.com:8_0",
    "https://api.example.com:\uff18\uff10",
    "https://[::1",
    "https://[zz]",
    "https://[fe80::1%12]",  # zones have no meaning beyond this machine, and urllib unquotes them
    "https://[fe80::1%25eth0]",
    "https://[abc]",
    "https://[v1.x]",
    "https://a..b.example",
    "https://" + "a" * 64 + ".example",
    "https://a%2fb.example",
]

BAD_TOKENS = [f"{SECRET}{bad}{SECRET}" for bad in ("\r\nX: y", "\n", "\t", " ", "\x00", "\x7f", "é", "\u2028")]
"""What no header can carry."""

BAD_IDS = [
    *("", " ", ".", "..", "../../admin", "a/b", "a\\b", "a?b", "a#b", "a%b", "a%2Fb"),
    *("a b", " act-1", "a\n", "a\r\nb", "\x1b[31mred", "\ud800"),
]
"""Text that no start may give as an id, and that nobody may ask for."""

NO_IDS: list[Any] = [*BAD_IDS, None, 7, True, ["a"], {"a": 1}]

# Status codes, by what they say about a start; a poll tries again after the first of them only.
MAY_PASS = (408, 425, 500, 501, 502, 503, 504, 520, 599)
"""The request may have been processed, or not."""
ELSEWHERE = (301, 302, 303)
"""It may have been processed: a redirect like these may follow that."""
REFUSED = (300, 304, 307, 308, 400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 413, 414, 415, 418, 422, 451)
"""It was not processed."""
