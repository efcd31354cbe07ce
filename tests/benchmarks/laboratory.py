"""What the parts of the benchmark share: the two environments, the server, and running a program against it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Union

from tests.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".bench"
LATENCIES = (0.0, 0.025, 0.05)  # s, one way
WORKER = Path(__file__).with_name("worker.py")
WORKLOAD_TIMEOUT = 120  # s

Source = Union[Path, str]  # a checkout of this project, or a requirement for pip


class Laboratory:
    """Two SDKs, each in an environment with nothing else, on the same Python; and a server in a process of its own.

    Args:
        python: The interpreter that runs both.
        sources: By name, the one that is measured first, then the one that it is compared with.
        rounds: How often the parts measure what is near its target; what takes long or varies little, they measure
            less often.
    """

    def __init__(self, python: Path, sources: Mapping[str, Source], rounds: int) -> None:
        self.ours, self.theirs = self.sides = tuple(sources)
        self.rounds = rounds
        self._python = python
        self._sources = sources
        self._asking = threading.Lock()
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n", encoding="ascii")

    def __enter__(self) -> Laboratory:  # noqa: PYI034  # Self needs Python 3.11
        command = [str(self._python), "-c", "import platform; print(platform.python_version())"]
        self.python_version = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        for side, source in self._sources.items():
            self._install(side, source)
        authority = Authority(CACHE)
        certificate = authority.issue("127.0.0.1")
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("server.py"), certificate, *map(str, LATENCIES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ports = {(port["tls"], port["latency"]): port["port"] for port in self._answer()}
        # Nothing of the caller's must reach the programs: no PYTHONDONTWRITEBYTECODE, no proxy, no logging.
        self._environment = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(authority.file)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress("")
        self._server.communicate()  # the end of its input ends it

    def url(self, *, tls: bool = False, latency: float = 0.0) -> str:
        """The base URL of the server in this kind."""
        return f"{'https' if tls else 'http'}://127.0.0.1:{self._ports[tls, latency]}"

    def python(self, sdk: str, *arguments: str) -> float:
        """Run an isolated interpreter that has this SDK; returns its wall time from start to exit."""
        command = [str(self._interpreter(sdk)), "-I", *arguments]
        started = time.perf_counter()
        process = subprocess.Popen(command, env=self._environment, stdout=subprocess.DEVNULL, cwd=CACHE)
        # Not wait(timeout=): without a pipe it looks at 15, 31, 63, 113, ... ms, and that is what one would measure.
        watchdog = threading.Timer(WORKLOAD_TIMEOUT, process.kill)
        watchdog.start()
        try:
            status = process.wait()
            wall = time.perf_counter() - started
        finally:
            watchdog.cancel()
        if status:
            raise RuntimeError(f"{sdk}: {arguments} failed")
        return wall

    def work(self, sdk: str, workload: str, *numbers: float, tls: bool = False, latency: float = 0.0) -> dict[str, Any]:
        """Run a workload of worker.py; returns its figures and the server's."""
        command = [str(self._interpreter(sdk)), "-I", str(WORKER), workload, self.url(tls=tls, latency=latency)]
        self.server_figures()
        worker = subprocess.run(
            [*command, *map(str, numbers)],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=WORKLOAD_TIMEOUT,
            check=False,
            cwd=CACHE,
        )
        if worker.returncode:
            raise RuntimeError(f"{sdk}: {workload} failed:\n{worker.stderr}")
        figures: dict[str, Any] = json.loads(worker.stderr.splitlines()[-1])
        return {**figures, **self.server_figures()}

    def server_figures(self) -> dict[str, float]:
        """What the server counted since the last call."""
        assert self._server.stdin is not None
        with self._asking:
            self._server.stdin.write("\n")
            self._server.stdin.flush()
            figures: dict[str, float] = self._answer()
        return figures

    def wheels(self, sdk: str) -> list[Path]:
        """The wheels that this SDK is installed from, its dependencies' too."""
        return sorted((CACHE / f"{sdk}-wheels").glob("*.whl"))

    def installed(self, sdk: str) -> Path:
        """The folder the SDK and its dependencies are installed in; nothing else is."""
        return next((CACHE / sdk).glob("[Ll]ib*/**/site-packages"))

    def progress(self, text: str) -> None:
        """Say on a terminal what is being done, in place of what was said before."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    def _interpreter(self, sdk: str) -> Path:
        return CACHE / sdk / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def _install(self, side: str, source: Source) -> None:
        """Make the environment of one side; one from the index is kept until its version or the Python changes."""
        stamp = CACHE / f"{side}.installed"
        made_for = f"{source} on {self.python_version} at {self._python}"
        if isinstance(source, str) and stamp.exists() and stamp.read_text(encoding="utf-8") == made_for:
            return
        self.progress(f"installing {source}")
        stamp.unlink(missing_ok=True)
        wheels = CACHE / f"{side}-wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        self._run(self._python, "-m", "venv", "--clear", "--without-pip", CACHE / side)
        python = self._interpreter(side)
        if isinstance(source, str):
            self._pip("--python", python, "download", "--only-binary", ":all:", "--dest", wheels, source)
        else:
            # The development tools have the build backend: without isolation nothing is fetched.
            self._pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, source)
        self._pip("--python", python, "install", "--no-deps", *self.wheels(side))
        # pip compiles nothing where PYTHONDONTWRITEBYTECODE is set, and then every import would compile.
        self._run(python, "-I", "-m", "compileall", "-qq", self.installed(side))
        stamp.write_text(made_for, encoding="utf-8")

    @classmethod
    def _pip(cls, *arguments: str | Path) -> None:
        cls._run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)

    @staticmethod
    def _run(*command: str | Path) -> None:
        subprocess.run(list(map(str, command)), check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
