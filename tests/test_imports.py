"""The public face, to the letter, and which module may import which."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
import typing
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import zamp_sdk
import zamp_sdk.action_executor
import zamp_sdk.action_executor.utils
from zamp_sdk import ActionExecutor, ActionStatus, RetryPolicy, SdkConfig
from zamp_sdk.local_platform import LocalPlatform

PACKAGE = Path(__file__).resolve().parent.parent / "zamp_sdk"

# --- the public face --------------------------------------------------------------------------------------------------

RUN_PARAMETERS = (
    "(action_name: 'str', params: 'Any', *, base_url: 'Optional[str]' = None, auth_token: 'Optional[str]' = None, "
    "summary: 'Optional[str]' = None, return_type: 'Optional[type]' = None, "
    "action_retry_policy: 'Optional[RetryPolicy]' = None, action_start_to_close_timeout: 'Optional[timedelta]' = None)"
)

# What each class offers: its methods' signatures, and "property -> type" for its properties.
PUBLIC: dict[str, dict[str, str]] = {
    "ActionExecutor": {
        "execute": f"{RUN_PARAMETERS} -> 'Any'",
        "start": f"{RUN_PARAMETERS} -> 'ActionHandle[Any]'",
        "get_handle": (
            "(action_id: 'str', *, base_url: 'Optional[str]' = None, auth_token: 'Optional[str]' = None, "
            "return_type: 'Optional[type]' = None) -> 'ActionHandle[Any]'"
        ),
    },
    "ActionHandle": {
        "id": "property -> str",
        "status": "(self) -> 'ActionStatus'",
        "result": "(self, timeout: 'Optional[timedelta]' = None) -> 'T_co'",
    },
    "RetryPolicy": {"default": "() -> 'RetryPolicy'"},
    "SdkConfig": {
        "resolve": "(base_url: 'Optional[str]', auth_token: 'Optional[str]') -> 'SdkConfig'",
    },
    "LocalPlatform": {
        "action": "(self, name: 'Any') -> 'Any'",
        "action_names": "property -> list[str]",
        "base_url": "property -> str",
        "clear": "(self) -> 'None'",
        "drop_next": ("(self, times: 'int' = 1, *, only: \"Optional[Literal['start', 'poll']]\" = None) -> 'None'"),
        "fail_next": (
            "(self, status: 'int' = 503, times: 'int' = 1, retry_after: 'Optional[int]' = None, *, "
            "only: \"Optional[Literal['start', 'poll']]\" = None) -> 'None'"
        ),
        "requests": "property -> list[RecordedRequest]",
        "start": "(self) -> 'None'",
        "stop": "(self) -> 'None'",
    },
    "ZampError": {},
    "HttpClientError": {},
    "ActionFailedError": {},
    "ActionTimeoutError": {},
    "MissingConfigError": {},
}

CONSTRUCTORS: dict[str, str] = {
    "RetryPolicy": (
        "(initial_interval: 'timedelta', maximum_attempts: 'int', maximum_interval: 'timedelta', "
        "backoff_coefficient: 'float') -> None"
    ),
    "SdkConfig": "(base_url: 'str', auth_token: 'str') -> None",
    "LocalPlatform": (
        "(*, auth_token: 'str' = 'local-token', time_scale: 'float' = 1.0, port: 'int' = 0, "
        "rate_limit: 'Optional[float]' = None) -> 'None'"
    ),
    "ZampError": "(message: 'str') -> 'None'",
    "HttpClientError": (
        "(message: 'str', status_code: 'Optional[int]' = None, response_body: 'Optional[str]' = None, *, "
        "headers: 'Optional[Mapping[str, str]]' = None, action_id: 'Optional[str]' = None, "
        "may_have_started: 'bool' = False) -> 'None'"
    ),
    "ActionFailedError": (
        "(message: 'str', *, action_id: 'str' = '', status: 'str' = '', error: 'Any' = None) -> 'None'"
    ),
    "ActionTimeoutError": (
        "(message: 'str', *, action_id: 'str' = '', status: 'str' = '', waited: 'float' = 0.0) -> 'None'"
    ),
    "MissingConfigError": "(message: 'str') -> 'None'",
}

# Each exception's bases, and its attributes when only a message is given.
ERRORS: dict[str, tuple[tuple[type[BaseException], ...], dict[str, Any]]] = {
    "ZampError": ((Exception,), {"message": "m"}),
    "HttpClientError": (
        (zamp_sdk.ZampError,),
        {
            "message": "m",
            "status_code": None,
            "response_body": None,
            "headers": {},
            "action_id": None,
            "may_have_started": False,
        },
    ),
    "ActionFailedError": (
        (zamp_sdk.ZampError, RuntimeError),
        {"message": "m", "action_id": "", "status": "", "error": None},
    ),
    "ActionTimeoutError": (
        (zamp_sdk.ZampError, TimeoutError),
        {"message": "m", "action_id": "", "status": "", "waited": 0.0},
    ),
    "MissingConfigError": ((zamp_sdk.ZampError, KeyError), {"message": "m"}),
}


def public_class(name: str) -> type:
    """Return a class by its name."""
    found: type = LocalPlatform if name == "LocalPlatform" else getattr(zamp_sdk, name)
    return found


def describe(owner: type, name: str) -> str:
    """Return a method's signature, or a property's type."""
    member = inspect.getattr_static(owner, name)
    if isinstance(member, property):
        return f"property -> {typing.cast(FunctionType, member.fget).__annotations__['return']}"
    return str(inspect.signature(getattr(owner, name)))


def test_the_package_exports_these_names_and_no_others() -> None:
    """The package exports these names, and no others."""
    assert sorted(zamp_sdk.__all__) == [
        "ActionExecutor",
        "ActionFailedError",
        "ActionHandle",
        "ActionStatus",
        "ActionTimeoutError",
        "HttpClientError",
        "MissingConfigError",
        "RetryPolicy",
        "SdkConfig",
        "ZampError",
        "__version__",
    ]
    assert all(hasattr(zamp_sdk, name) for name in zamp_sdk.__all__)
    assert zamp_sdk.action_executor.__all__ == ["ActionExecutor", "ActionHandle"]


def test_import_paths_of_the_official_sdk_work() -> None:
    """The names that the official SDK documents elsewhere are the same objects."""
    assert zamp_sdk.action_executor.utils.HttpClientError is zamp_sdk.HttpClientError
    assert zamp_sdk.action_executor.ActionExecutor is zamp_sdk.ActionExecutor
    assert zamp_sdk.action_executor.models.RetryPolicy is zamp_sdk.RetryPolicy


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_class_has_these_members_and_no_others(name: str) -> None:
    """A public class has these public members, with these signatures, and no others."""
    members = [member for member in vars(public_class(name)) if not member.startswith("_")]

    assert {member: describe(public_class(name), member) for member in members} == PUBLIC[name]


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_what_people_construct_takes_these_arguments(name: str) -> None:
    """A class that people construct takes these arguments."""
    assert str(inspect.signature(public_class(name))) == CONSTRUCTORS[name]


@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_has_these_bases_and_attributes(name: str) -> None:
    """An exception has these bases and these attributes."""
    bases, attributes = ERRORS[name]
    error = public_class(name)("m")

    assert public_class(name).__bases__ == bases
    assert vars(error) == attributes
    assert str(error) == "m"


def hinted() -> dict[str, Any]:
    """Everything public that has type hints: the classes, their constructors, methods and properties."""
    found: dict[str, Any] = {}
    for name in PUBLIC:
        cls = public_class(name)
        found[name] = cls
        for member in vars(cls):
            if member.startswith("_") and member != "__init__":
                continue
            value = inspect.getattr_static(cls, member)
            function = value.fget if isinstance(value, property) else getattr(cls, member, None)
            if inspect.isroutine(function) and getattr(function, "__annotations__", None):
                found[f"{name}.{member}"] = function
    return found


@pytest.mark.parametrize("name", hinted())
def test_type_hints_can_be_evaluated(name: str) -> None:
    """`typing.get_type_hints`, which frameworks call, works on everything public, on the oldest Python too."""
    hints = typing.get_type_hints(hinted()[name])

    assert all(not isinstance(hint, str) for hint in hints.values())


def test_value_classes_have_their_parameters_as_fields() -> None:
    """The two value classes have their parameters as fields; a policy's default is the platform's."""
    assert vars(SdkConfig("https://example.com", "t")) == {"base_url": "https://example.com", "auth_token": "t"}
    assert vars(RetryPolicy.default()) == {
        "initial_interval": timedelta(seconds=30),
        "maximum_attempts": 11,
        "maximum_interval": timedelta(minutes=15),
        "backoff_coefficient": 1.5,
    }


def test_there_are_six_statuses() -> None:
    """A status is text, one of six."""
    assert issubclass(ActionStatus, str)
    assert issubclass(ActionStatus, Enum)
    assert [status.value for status in ActionStatus] == [
        "RUNNING",
        "COMPLETED",
        "FAILED",
        "CANCELED",
        "TERMINATED",
        "TIMED_OUT",
    ]


def test_only_what_sends_something_is_awaited() -> None:
    """Only what sends something is a coroutine function."""
    awaited = {ActionExecutor.execute, ActionExecutor.start, zamp_sdk.ActionHandle.status, zamp_sdk.ActionHandle.result}

    assert all(map(inspect.iscoroutinefunction, awaited))
    assert not inspect.iscoroutinefunction(ActionExecutor.get_handle)


# --- what imports what ------------------------------------------------------------------------------------------------

# Which of the package's modules each may import; a ? marks those that only a function may import, when it is called.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    # What is said. Of the transport it knows the face alone.
    "action_executor.models": {"errors"},
    "action_executor.pacing": set(),
    "action_executor.redaction": set(),
    "action_executor.notices": set(),
    "action_executor.params": {"action_executor.models"},
    "action_executor.replies": {"action_executor.models", "action_executor.redaction", "transport"},
    "action_executor.lifecycle": {
        "errors",
        "action_executor.models",
        "action_executor.params",
        "action_executor.redaction",
        "action_executor.replies",
        "transport",
    },
    "action_executor.executor": {
        "errors",
        "action_executor.lifecycle",
        "action_executor.models",
        "action_executor.notices",
        "action_executor.pacing",
        "action_executor.params",
        "action_executor.redaction",
        "action_executor.replies",
        "transport",
    },
    "action_executor.utils": {"errors"},
    "action_executor": {"action_executor.executor"},
    # How bytes move. It knows nothing of what is said.
    "transport.messages": set(),
    "transport.failures": {"transport.messages"},
    "transport.hops": set(),
    "transport.tls": {"transport.failures"},
    "transport.connections": {"transport.hops"},
    "transport.reading": {"transport.failures", "transport.messages"},
    "transport.dialing": {"transport.hops"},
    "transport.routes": {
        "transport.connections",
        "transport.failures",
        "transport.hops",
        "transport.messages",
        "transport.reading",
    },
    "transport.sending": {"transport.messages"},
    "transport.pool": {"transport.connections"},
    "transport.exchange": {
        "transport.connections",
        "transport.dialing",
        "transport.failures",
        "transport.hops",
        "transport.messages",
        "transport.pool",
        "transport.reading",
        "transport.routes",
        "transport.sending?",
        "transport.tls",
    },
    "transport": {"transport.exchange?", "transport.hops?", "transport.messages"},
    "": {"errors", "action_executor", "action_executor.models"},
    "local_platform": {
        "action_executor.models",
        "local_platform.running",
        "local_platform.server",
        "local_platform.starts",
    },
    "local_platform.running": {"local_platform.threads"},
    "local_platform.server": {"local_platform.threads"},
    # It spells the wire format out on its own, to check the client and not to echo it.
    "local_platform.starts": {"action_executor.models"},
    "local_platform.threads": set(),
    "cli": {
        "errors",
        "action_executor",
        "action_executor.executor",
        "action_executor.lifecycle",
        "action_executor.models",
        "",
        "local_platform",
    },
    "__main__": {"cli"},
}


def module_name(path: Path) -> str:
    """Return a module's name inside the package; the package's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The package's modules that a module imports, each with a ? where only code inside of something else does.

    What only type checkers import is none of them; nor is the version, which stands where the build reads it.
    """
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(PACKAGE).parent.parts
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {inner for node in checked for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in for_types:
            base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            inside = [f"{base}.{alias.name}".lstrip(".") for alias in node.names if alias.name != "__version__"]
            targets = [target if target in MODULES else base for target in inside]
            found.update(f"{target}{'' if node in tree.body else '?'}" for target in targets)
    return found


def test_the_table_has_a_row_for_every_module() -> None:
    """The table of arrows has a row for every module."""
    assert set(MODULES) == set(ARROWS)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "zamp_sdk")
def test_a_module_imports_only_what_the_table_lets_it(name: str) -> None:
    """A module imports only what the table lets it import, and at the time that the table says."""
    allowed = ARROWS[name]

    assert {target for target in imports(name) if target not in allowed and target.rstrip("?") not in allowed} == set()


def test_no_module_imports_itself() -> None:
    """No module imports itself, by whatever way, not even when a function is called."""
    graph = {name: {target.rstrip("?") for target in imports(name)} for name in MODULES}

    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError

    assert order.index("transport") < order.index("action_executor.lifecycle") < order.index("")


def test_there_are_two_wings_and_one_door() -> None:
    """What is said knows the transport's face and nothing behind it; the transport knows nothing of what is said."""
    arrows = {(name.partition(".")[0], target.rstrip("?")) for name in MODULES for target in imports(name)}

    assert {target for wing, target in arrows if wing != "transport" and target.startswith("transport.")} == set()
    assert {target for wing, target in arrows if wing == "transport" and not target.startswith("transport.")} == set()
    assert ("action_executor", "transport") in arrows


def imported_by(statement: str) -> set[str]:
    """The modules that are loaded after a statement in a new interpreter without site-packages."""
    code = f"import sys; sys.path.insert(0, sys.argv[1])\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, PACKAGE.parent], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_is_cheap() -> None:
    """`import zamp_sdk` loads neither the transport, the command line, the local platform nor what those need."""
    costly = {
        "argparse",
        "decimal",
        "email",
        "http",
        "http.client",
        "http.server",
        "json",
        "socketserver",
        "urllib.request",
        "uuid",
    }
    own = {
        "zamp_sdk.cli",
        "zamp_sdk.local_platform",
        "zamp_sdk.transport.connections",
        "zamp_sdk.transport.exchange",
        "zamp_sdk.transport.hops",
        "zamp_sdk.transport.pool",
        "zamp_sdk.transport.routes",
        "zamp_sdk.transport.sending",
    }

    loaded = imported_by("import zamp_sdk")

    assert "zamp_sdk.action_executor.executor" in loaded
    assert loaded & (costly | own) == set()


def test_configuring_is_cheap() -> None:
    """Neither a policy, a configuration nor a handle loads the transport: the first request does."""
    statement = """
import zamp_sdk
zamp_sdk.RetryPolicy.default()
zamp_sdk.ActionExecutor.get_handle("act_1", base_url="https://example.com", auth_token="t")
"""

    assert imported_by(statement) & {"http.client", "urllib.request", "zamp_sdk.transport.exchange"} == set()


def test_importing_the_package_does_nothing_else() -> None:
    """`import zamp_sdk` starts no thread, sets no logging up and leaves the environment alone."""
    statement = """
import logging, os, threading
before = dict(os.environ)
import zamp_sdk
assert (dict(os.environ), threading.active_count(), logging.getLogger().handlers) == (before, 1, [])
assert logging.getLogger("zamp_sdk").handlers == []  # so that warnings reach stderr where nobody set up logging
"""

    assert "zamp_sdk" in imported_by(statement)
