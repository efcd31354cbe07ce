"""Tracing agents wrap ``OpenerDirector.open`` and look at what it returns: calls work, and spans hold no token."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.peers.venvs import install_project, venv
from tests.servers import ACTION_ID, RESULT, TOKEN, Server, reply

OPENTELEMETRY = """
import asyncio, json, sys
from opentelemetry import trace
from opentelemetry.instrumentation.urllib import URLLibInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
URLLibInstrumentor().instrument()

from zamp_sdk import ActionExecutor

result = asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1]))
print(json.dumps({"result": result, "spans": [json.loads(span.to_json()) for span in spans.get_finished_spans()]}))
"""

ELASTIC = """
import asyncio, json, sys
import elasticapm

sent = []


class Client(elasticapm.Client):
    def queue(self, event_type, data, flush=False):
        sent.append((event_type, data))


client = Client(
    service_name="test", disable_send=True, central_config=False, metrics_interval="0ms", cloud_provider=False,
    span_compression_enabled=False, exit_span_min_duration="0ms", breakdown_metrics=False,
)
elasticapm.instrument()

from zamp_sdk import ActionExecutor

client.begin_transaction("test")
result = asyncio.run(ActionExecutor.execute("act", {}, base_url=sys.argv[1]))
client.end_transaction("test", "ok")
spans = [data for kind, data in sent if kind == "span"]
print(json.dumps({"result": result, "spans": spans, "all": sent}, default=str))
client.close()
"""

AGENTS = pytest.mark.parametrize(
    ("name", "requirements", "program"),
    [
        ("opentelemetry", ("opentelemetry-instrumentation-urllib", "opentelemetry-sdk"), OPENTELEMETRY),
        ("elastic-apm", ("elastic-apm",), ELASTIC),
    ],
    ids=["opentelemetry", "elastic-apm"],
)


def traced(python: Path, program: str, url: str) -> dict[str, Any]:
    """Run the program against a platform, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", program, url],
        capture_output=True,
        text=True,
        env={**env, "ZAMP_AUTH_TOKEN": TOKEN},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@AGENTS
@pytest.mark.parametrize("delay", [0.0, 0.05], ids=["within 2 ms", "after 2 ms"])
def test_an_action_runs_under_a_tracing_agent(
    name: str, requirements: tuple[str, ...], program: str, delay: float
) -> None:
    """The result is right, each request has a span, and no span holds the token, however soon the replies come."""
    python = venv(name, *requirements)
    install_project(python)
    with Server() as server:
        server.always("POST", reply(200, {"id": ACTION_ID}, delay=delay))
        server.always("GET", reply(200, {"status": "COMPLETED", "result": RESULT}, delay=delay))
        found = traced(python, program, server.url)
        assert found["result"] == RESULT
        assert len(found["spans"]) == len(server.requests) == 2
        shown = json.dumps(found["spans"])
        assert f"127.0.0.1:{server.port}" in shown
        if delay:
            assert shown.count('status_code": 102') == 2  # the spans end before the replies come
        headers = {header for request in server.requests for header in request.headers}
        assert "traceparent" in headers  # so that the platform's spans would be children of these
