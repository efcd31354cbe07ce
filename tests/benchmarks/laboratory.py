"""What the parts of the benchmark share: the two environments, the server, and running a program against it."""

from __future__ import annotations

import compileall
import email
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import trustme

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".bench"
OFFICIAL = "zamp-sdk==1.1.0"
OURS, THEIRS = "ours", "official"
SDKS = (OURS, THEIRS)
LATENCIES = (0.0, 0.025)  # s, one way
WORKER = Path(__file__).with_name("worker.py")
WORKLOAD_TIMEOUT = 120  # s


class Laboratory:
    """Both SDKs, each in an environment with nothing else, and a server in a process of its own."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n", encoding="ascii")

    def __enter__(self) -> Laboratory:  # noqa: PYI034  # Self needs Python 3.11
        self._wheels = {sdk: CACHE / f"wheels-{sdk}" for sdk in SDKS}
        self._environments = {sdk: CACHE / sdk for sdk in SDKS}
        self._install_official()
        self._install_ours()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(CACHE / "ca.pem"))
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(CACHE / "server.pem"))
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("server.py"), CACHE / "server.pem", *map(str, LATENCIES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ports = {(port["tls"], port["latency"]): port["port"] for port in self._answer()}
        # Nothing of the caller's must reach the programs: no PYTHONDONTWRITEBYTECODE, no proxy, no logging.
        self._environment = {"PATH": os.environ["PATH"], "SSL_CERT_FILE": str(CACHE / "ca.pem")}
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
        return sorted(self._wheels[sdk].glob("*.whl"))

    def installed(self, sdk: str) -> Path:
        """The folder the SDK and its dependencies are installed in; nothing else is."""
        return next(self._environments[sdk].glob("[Ll]ib*/**/site-packages"))

    def progress(self, text: str) -> None:
        """Say on a terminal what is being done, in place of what was said before."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    def _interpreter(self, sdk: str) -> Path:
        return self._environments[sdk] / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def _install_official(self) -> None:
        stamp = CACHE / "official.installed"
        made_for = f"{OFFICIAL} {sys.version}"
        if stamp.exists() and stamp.read_text(encoding="utf-8") == made_for:
            return
        self.progress(f"installing {OFFICIAL}")
        shutil.rmtree(self._wheels[THEIRS], ignore_errors=True)
        # It says that it needs 3.12, but runs on 3.11 too. Its dependencies mean what they say, so they come apart;
        # `download`, for `wheel` takes the option and does not heed it.
        older = ["--ignore-requires-python"] if sys.version_info < (3, 12) else []
        into: list[str | Path] = ["--dest", self._wheels[THEIRS]]
        self._pip("download", *older, "--no-deps", *into, OFFICIAL)
        with zipfile.ZipFile(self.wheels(THEIRS)[0]) as wheel:
            (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            dependencies = email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])
        self._pip("download", *into, *(name for name in dependencies if "extra ==" not in name))
        self._install(THEIRS, older)
        stamp.write_text(made_for, encoding="utf-8")

    def _install_ours(self) -> None:
        self.progress("installing this checkout")
        shutil.rmtree(self._wheels[OURS], ignore_errors=True)
        # The development tools have the build backend: without isolation nothing is fetched.
        self._pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", self._wheels[OURS], ROOT)
        self._install(OURS, [])

    def _install(self, sdk: str, options: list[str]) -> None:
        environment = self._environments[sdk]
        venv.create(environment, clear=True, with_pip=False, symlinks=os.name != "nt")
        self._pip("--python", self._interpreter(sdk), "install", "--no-deps", *options, *self.wheels(sdk))
        # pip compiles nothing where PYTHONDONTWRITEBYTECODE is set, and then every import would compile.
        compileall.compile_dir(self.installed(sdk), quiet=2)

    @staticmethod
    def _pip(*arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
