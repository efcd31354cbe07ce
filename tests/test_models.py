"""RetryPolicy, SdkConfig and ActionStatus: what they accept, what they refuse, and what they show."""

from __future__ import annotations

import dataclasses
import traceback
from datetime import timedelta
from typing import Any

import pytest

from tests import cases
from zamp_sdk import ActionStatus, MissingConfigError, RetryPolicy, SdkConfig

SECOND = timedelta(seconds=1)
GOOD = {"initial_interval": SECOND, "maximum_attempts": 3, "maximum_interval": 2 * SECOND, "backoff_coefficient": 1}


def test_default_policy() -> None:
    """The default policy is 30 s, 11 attempts, 15 min, 1.5."""
    assert RetryPolicy.default() == RetryPolicy(timedelta(seconds=30), 11, timedelta(minutes=15), 1.5)


def test_policy_is_frozen() -> None:
    """A policy cannot be changed after its validation."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        RetryPolicy.default().maximum_attempts = -1  # type: ignore[misc]  # that is the test


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("initial_interval", -SECOND, ValueError),
        ("initial_interval", 1.0, TypeError),
        ("maximum_interval", -SECOND, ValueError),
        ("maximum_interval", timedelta(0), ValueError),
        ("maximum_interval", None, TypeError),
        ("maximum_attempts", -1, ValueError),
        ("maximum_attempts", 1.5, TypeError),
        ("maximum_attempts", True, TypeError),
        ("backoff_coefficient", 0.99, ValueError),
        ("backoff_coefficient", float("nan"), ValueError),
        ("backoff_coefficient", float("inf"), ValueError),
        ("backoff_coefficient", 10**400, ValueError),
        ("backoff_coefficient", "2", TypeError),
        ("backoff_coefficient", True, TypeError),
    ],
)
def test_policy_refuses(field: str, value: Any, error: type[Exception]) -> None:
    """A field that breaks Temporal's rules is refused by its name."""
    arguments: dict[str, Any] = {**GOOD, field: value}
    with pytest.raises(error, match=field):
        RetryPolicy(**arguments)


@pytest.mark.parametrize(("field", "value"), [("maximum_attempts", 0), ("initial_interval", timedelta(0))])
def test_policy_accepts_the_bounds(field: str, value: Any) -> None:
    """No limit of attempts and no wait are both allowed."""
    arguments: dict[str, Any] = {**GOOD, field: value}
    assert getattr(RetryPolicy(**arguments), field) == value


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://api.example.com", "https://api.example.com"),
        (" https://api.example.com/ ", "https://api.example.com"),
        ("HTTPS://API.Example.com:8443/v1//", "https://api.example.com:8443/v1"),
        ("http://127.0.0.1:80/a b".replace(" ", "%20"), "http://127.0.0.1:80/a%20b"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("https://bücher.example/é", "https://xn--bcher-kva.example/%C3%A9"),
        ("https://my_host.example.", "https://my_host.example."),
        ("https://bu\u0308cher.example", "https://xn--bcher-kva.example"),  # a combining mark
        ("https://\u0909\u0926\u093e\u0939\u0930\u0923.example", "https://xn--p1b6ci4b4b3a.example"),
        ("https://api\u3002example", "https://api.example"),  # a full stop of its own
        ("https://\u65e5\u672c\uff0ejp", "https://xn--wgv71a.jp"),  # and another
        ("https://B\u00dcCHER.Example", "https://xn--bcher-kva.example"),
        ("https://xn--fa-hia.b\u00fccher.example", "https://xn--fa-hia.xn--bcher-kva.example"),
        ("https://api.example.com:000443", "https://api.example.com:443"),
    ],
)
def test_base_url_is_normalised(given: str, kept: str) -> None:
    """A path is kept, trailing slashes and capitals of the host are not, and a unicode host becomes ASCII."""
    assert SdkConfig(given, "t").base_url == kept


@pytest.mark.parametrize(
    "host",
    [
        "fa\u00df.example",  # a sharp s, which IDNA 2003 reads as ss
        "FA\u1e9e.example",  # its capital
        "\u03c3\u03b1\u03c2.example",  # a final sigma
        "a\u200db.example",  # zero width joiner
        "a\u200cb.example",  # zero width non-joiner
        "so\u00adft.example",  # soft hyphen
        "\uff46\uff55ll.example",  # full width
        "\ufb01.example",  # a ligature
        "\u2460.example",  # a digit in a circle
        "\u017f.example",  # a long s
        "xn--bcher-kva.fa\u00df.example",
        "api\u3002fa\u00df",
    ],
)
def test_a_host_that_two_standards_read_differently_is_refused(host: str) -> None:
    """A name that IDNA 2003 maps to another one is refused, asking for the form that has one meaning."""
    with pytest.raises(ValueError, match=r"base_url has a host name that standards read in different ways: .* xn--"):
        SdkConfig(f"https://{host}", "t")


@pytest.mark.parametrize("base_url", cases.BAD_BASE_URLS)
def test_base_url_is_refused(base_url: str) -> None:
    """A base URL that could lead the token astray is a ValueError that names it."""
    with pytest.raises(ValueError, match="base_url"):
        SdkConfig(base_url, "t")


@pytest.mark.parametrize("token", cases.BAD_TOKENS)
def test_token_is_refused_without_showing_it(token: str) -> None:
    """A token that is not printable ASCII is a ValueError whose whole chain does not quote it."""
    with pytest.raises(ValueError, match="auth_token") as caught:
        SdkConfig("https://api.example.com", token)
    assert cases.SECRET not in str(caught.value)
    assert cases.SECRET not in repr(caught.value)
    assert cases.SECRET not in "".join(traceback.format_exception_only(type(caught.value), caught.value))
    assert caught.value.__context__ is None


def test_token_is_stripped_and_hidden() -> None:
    """White space around a token goes, and the configuration's repr does not show what is left."""
    config = SdkConfig("https://api.example.com", " s3cret\n")
    assert config.auth_token == "s3cret"
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize(("base_url", "token"), [(1, "t"), ("https://a.example", b"t"), (None, "t")])
def test_config_wants_text(base_url: Any, token: Any) -> None:
    """Values that are not text are a TypeError."""
    with pytest.raises(TypeError, match="must be text"):
        SdkConfig(base_url, token)


def test_empty_token_is_refused() -> None:
    """A configuration without a token is none."""
    with pytest.raises(ValueError, match="auth_token must be printable ASCII without white space, and not empty"):
        SdkConfig("https://a.example", "  ")


def test_arguments_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument wins over the environment, and an empty argument counts as missing."""
    monkeypatch.setenv("ZAMP_BASE_URL", "https://env.example")
    monkeypatch.setenv("ZAMP_AUTH_TOKEN", "env")
    assert SdkConfig.resolve("https://arg.example", "arg") == SdkConfig("https://arg.example", "arg")
    assert SdkConfig.resolve("", None) == SdkConfig("https://env.example", "env")


@pytest.mark.parametrize("variable", ["ZAMP_BASE_URL", "ZAMP_AUTH_TOKEN"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_missing_configuration(monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None) -> None:
    """What is missing or empty is a KeyError kind whose text is a sentence with the variable's name."""
    monkeypatch.setenv("ZAMP_BASE_URL", "https://env.example")
    monkeypatch.setenv("ZAMP_AUTH_TOKEN", "env")
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    with pytest.raises(MissingConfigError) as caught:
        SdkConfig.resolve(None, None)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).startswith(f"{variable} is not set: set it in the environment, or pass ")


def test_status_is_text() -> None:
    """A status compares, prints and formats as the platform's own word."""
    assert ActionStatus.TIMED_OUT == "TIMED_OUT"
    assert f"{ActionStatus.RUNNING} {ActionStatus('FAILED')!s}" == "RUNNING FAILED"
