"""The five parts of the benchmark: what each measures, and the figures it should reach."""

from __future__ import annotations

import asyncio
import io
import json
import random
import statistics
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

from zamp_sdk.action_executor import lifecycle, wire
from zamp_sdk.action_executor.redaction import Redactor

from .laboratory import LATENCIES, OURS, SDKS, THEIRS, Laboratory
from .report import Part, Row, ratios

ROUNDS = 7  # of what is measured as a whole process, or is near its target; less makes the whole take under 5 minutes
SETS = 5  # of the actions whose lateness is measured
SEEDS = 200  # runs of the simulated clock
FLOOR = "import asyncio, urllib.request, dataclasses, json"
FIRST_RESULT = (
    "import asyncio; from zamp_sdk import ActionExecutor; "
    "asyncio.run(ActionExecutor.execute('benchmark', {{'seconds': 0}}, base_url={!r}, auth_token='benchmark'))"
)
ACTION_SECONDS = 0.2
DURATIONS = [0.0, *(0.05 * 600 ** (step / 18) for step in range(19))]  # s: 0, and 0.05 to 30 on a logarithmic scale
COUNTS = (1, 10, 100, 1000)

Series = dict[str, list[float]]


def cold_start(laboratory: Laboratory) -> Part:
    """Measure whole processes, from their start to their exit."""
    part = Part("Cold start: whole processes, over a bare interpreter")
    first_result = FIRST_RESULT.format(laboratory.url())
    programs = {
        "bare": (OURS, "pass"),
        "asyncio": (OURS, "import asyncio"),
        "floor": (OURS, FLOOR),
        "import": (OURS, "import zamp_sdk"),
        "first": (OURS, first_result),
        "official import": (THEIRS, "import zamp_sdk"),
        "official first": (THEIRS, first_result),
    }
    walls: Series = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, (sdk, code) in programs.items():
            laboratory.progress(f"cold start: round {turn} of {ROUNDS}: {name}")
            # The median of three where a program takes but a moment.
            repeats = 1 if sdk == THEIRS else 3
            walls[name].append(statistics.median(laboratory.python(sdk, "-c", code) for _ in range(repeats)))
    # The first round only brought the files into memory.
    walls = {name: taken[1:] for name, taken in walls.items()}
    over = {name: [wall - bare for wall, bare in zip(taken, walls["bare"])] for name, taken in walls.items()}
    over_asyncio = [ours - theirs for ours, theirs in zip(walls["import"], walls["asyncio"])]

    part.add("a bare interpreter (not over itself)", "ms", walls["bare"])
    part.add("import asyncio", "ms", over["asyncio"])
    part.add(f"floor: {FLOOR}", "ms", over["floor"])
    part.add("import zamp_sdk", "ms", over["import"], over["official import"])
    part.add("import to first result", "ms", over["first"], over["official first"])
    for name, ours, theirs, limit in (
        ("import / floor", over["import"], over["floor"], 0.9),
        ("import / official", over["import"], over["official import"], 1 / 8),
        ("import beyond asyncio / floor", over_asyncio, over["floor"], 0.3),
        ("import to first result / floor", over["first"], over["floor"], 1.5),
        ("import to first result / official", over["first"], over["official first"], 1 / 10),
    ):
        part.expect(name, "x", ratios(ours, theirs), limit)
    return part


def size(laboratory: Laboratory) -> Part:
    """Measure what is downloaded, installed, put into a layer, and loaded."""
    part = Part("Size, with all dependencies")

    def add(name: str, unit: str, measure: Callable[[str], float]) -> None:
        part.add(name, unit, [measure(OURS)], [measure(THEIRS)])

    def files(sdk: str) -> list[Path]:
        return [path for path in laboratory.installed(sdk).rglob("*") if path.is_file()]

    def layer(sdk: str) -> int:
        laboratory.progress(f"size: zipping {sdk}")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in files(sdk):
                if path.suffix != ".pyc":
                    archive.write(path, path.relative_to(laboratory.installed(sdk)))
        return len(buffer.getvalue())

    add("wheels", "", lambda sdk: len(laboratory.wheels(sdk)))
    add("wheels, bytes", "kB", lambda sdk: sum(path.stat().st_size for path in laboratory.wheels(sdk)))
    add("installed, bytes", "kB", lambda sdk: sum(path.stat().st_size for path in files(sdk)))
    add("installed, files", "", lambda sdk: len(files(sdk)))
    add("layer zip", "kB", layer)
    figures = _alternate(laboratory, "size", "first", ROUNDS)
    for name, unit, key in (
        ("modules loaded by the import", "", "modules_imported"),
        ("modules loaded at the first result", "", "modules"),
        ("peak memory after the import", "MB", "memory_imported"),
        ("peak memory after the first result", "MB", "memory"),
    ):
        part.add(name, unit, *(_series(figures, key)[sdk] for sdk in SDKS))
    rows = {row.name: row for row in part.rows}
    part.expect("peak memory / official", "x", _ratios(rows["peak memory after the first result"]), 1 / 2)
    part.expect("installed bytes / official", "x", _ratios(rows["installed, bytes"]), 1 / 200)
    return part


def time_to_result(laboratory: Laboratory) -> Part:
    """Measure how long after its end a caller hears of an action."""
    part = Part("Time to result: lateness beyond an action's own end, and polls")
    laboratory.progress(f"time to result: {SETS} times 20 actions of up to 30 s")
    # Side by side: so few actions load no machine.
    with ThreadPoolExecutor() as executor:
        runs = list(executor.map(lambda sdk: laboratory.work(sdk, "lateness", *DURATIONS * SETS), SDKS))
    # By SDK and duration: what each of the sets found.
    ours, theirs = ([run["actions"][place :: len(DURATIONS)] for place in range(len(DURATIONS))] for run in runs)
    part.series = {
        sdk: [{"seconds": found[0]["seconds"], "late": _mean(found, "late")} for found in by_duration]
        for sdk, by_duration in ((OURS, ours), (THEIRS, theirs))
    }
    for key, unit in (("late", "s"), ("polls", "")):
        for seconds, mine, other in zip(DURATIONS, ours, theirs):
            part.add(f"{key}, {seconds:.2f} s", unit, [each[key] for each in mine], [each[key] for each in other])
        if key == "late":
            means = [[_mean(list(each), "late") for each in zip(*by_duration)] for by_duration in (ours, theirs)]
            mean_lateness = part.add("mean lateness", "s", *means)

    # The polls' jitter decides how each action comes out, so the targets are judged on a simulated clock too, which has
    # no network, over many runs; the official SDK has no jitter.
    simulated = [[_simulated(seconds, random.Random(seed)) for seconds in DURATIONS] for seed in range(SEEDS)]
    simulated_means = [statistics.mean(late for late, _ in run) for run in simulated]
    slack = [each["late"] - max(0.3 * seconds, 0.15) for seconds, mine in zip(DURATIONS, ours) for each in mine]
    slack_simulated = [
        max(late - max(0.3 * seconds, 0.15) for seconds, (late, _) in zip(DURATIONS, run)) for run in simulated
    ]
    official_mean = statistics.mean(mean_lateness.official_rounds)
    part.expect("latest beyond 30 % or 0.15 s, measured", "s", [max(slack)], 0.0)
    part.expect("latest beyond 30 % or 0.15 s, simulated", "s", slack_simulated, 0.0)
    part.expect("mean lateness / official, measured", "x", _ratios(mean_lateness), 1 / 3)
    part.expect("mean lateness / official, simulated", "x", [mean / official_mean for mean in simulated_means], 1 / 3)

    laboratory.progress("time to result: instant actions")
    for latency in LATENCIES:
        figures = _alternate(laboratory, "time to result", "instant", 1, 3, latency=latency)
        walls = {sdk: figures[sdk][0]["walls"] for sdk in SDKS}
        row = part.add(f"an instant action, {2e3 * latency:.0f} ms round trip", "ms", walls[OURS], walls[THEIRS])
        part.expect(row.name + ", two of them and 10 ms", "ms", row.ours_rounds, 4 * latency + 0.01)

    for seconds in (10.0, 20.0, 30.0, 60.0, 600.0):
        polls = [float(_simulated(seconds, random.Random(seed))[1]) for seed in range(SEEDS)]
        part.expect(f"polls in {seconds:.0f} s, simulated", "", polls, 49 if seconds == 600 else seconds / 0.5)
    return part


def fan_out(laboratory: Laboratory) -> Part:
    """Measure many actions at once."""
    part = Part(f"Fan-out: concurrent actions of {ACTION_SECONDS} s, default executor")
    targets = {
        (False, 0.0, 1000): {"wall": 1 / 2, "cpu_of_process": 1.0, "peak_memory": 1 / 2},
        (True, 0.0, 1000): {"wall": 2 / 7, "cpu_of_process": 2 / 5, "peak_memory": 1 / 6},
        (True, 0.025, 1): {},
        (True, 0.025, 200): {"wall": 1.0},
        (True, 0.025, 1000): {"wall": 0.8},
    }
    cells = [(tls, latency, count) for tls in (False, True) for latency in LATENCIES for count in COUNTS]
    cells.insert(-1, (True, 0.025, 200))
    for tls, latency, count in cells:
        # Elsewhere the network decides, and the official SDK's first poll after a second.
        is_close = count == 1000 and not latency
        rounds = ROUNDS if is_close else 2 if (tls, latency, count) in targets else 1
        name = f"{count:,} {'TLS' if tls else 'plain'} {latency * 1e3:.0f} ms"
        figures = _alternate(
            laboratory, f"fan-out: {name}", "fan-out", rounds, count, ACTION_SECONDS, tls=tls, latency=latency
        )
        _check_work(name, figures, count)
        for label, unit, key in (
            ("wall", "s", "wall"),
            ("CPU", "s", "cpu"),
            ("CPU, with the import", "s", "cpu_of_process"),
            ("peak memory", "MB", "peak_memory"),
            ("sockets at once", "", "peak_connections"),
            ("polls", "", "polls"),
            ("server's CPU", "s", "server_cpu"),
        ):
            series = _series(figures, key)
            row = part.add(f"{name}: {label}", unit, series[OURS], series[THEIRS])
            limit = targets.get((tls, latency, count), {}).get(key)
            if limit is not None:
                part.expect(row.name + " / official", "x", _ratios(row), limit)
            if key == "peak_connections":
                part.expect(row.name, "", [max(series[OURS])], 64)
            if key == "wall" and (tls, latency, count) == (True, 0.025, 1):
                part.expect(row.name, "s", row.ours_rounds, 0.45)
            if key not in ("server_cpu", "polls") and row.ratio is not None and row.ratio > 1:
                part.notes.append(f"loses: {row.name}: {row.ratio:.2f} times the official SDK's")
    return part


def limit(laboratory: Laboratory) -> Part:
    """Measure how far both are from the same two requests made by http.client on one connection."""
    part = Part("The limit: beside raw http.client with keep-alive, instant actions")
    rounds = 3
    busy = _alternate(laboratory, "limit", "busy", rounds, 500)
    raw, one = [], []
    for turn in range(rounds):
        laboratory.progress(f"limit: round {turn + 1} of {rounds}: one after the other")
        raw.append(laboratory.work(OURS, "raw", 500))
        one.append(laboratory.work(OURS, "instant", 500))

    def cpu(figures: dict[str, Any]) -> float:
        return float(figures["cpu"] / (figures["posts"] + figures["polls"]))

    raw_cpu, raw_wall = [cpu(run) for run in raw], [statistics.median(run["walls"]) for run in raw]
    one_cpu, one_wall = [cpu(run) for run in one], [statistics.median(run["walls"]) for run in one]
    part.add("CPU per request, 500 at once", "us", *([cpu(run) for run in busy[sdk]] for sdk in SDKS))
    part.add("CPU per request, one after the other", "us", one_cpu)
    part.add("CPU per request, raw http.client", "us", raw_cpu)
    part.add("wall per action, one after the other", "us", one_wall)
    part.add("wall per action, raw http.client", "us", raw_wall)
    part.notes.append(
        f"One after the other costs {statistics.median(ratios(one_cpu, raw_cpu)):.1f} times the CPU and "
        f"{statistics.median(ratios(one_wall, raw_wall)):.1f} times the wall time of raw http.client, which can do "
        "nothing else meanwhile."
    )
    return part


def _alternate(
    laboratory: Laboratory,
    title: str,
    workload: str,
    rounds: int,
    *numbers: float,
    tls: bool = False,
    latency: float = 0.0,
) -> dict[str, list[dict[str, Any]]]:
    """Run a workload with both SDKs in turn, so that what disturbs the machine disturbs both."""
    figures: dict[str, list[dict[str, Any]]] = {sdk: [] for sdk in SDKS}
    for turn in range(rounds):
        for sdk in SDKS:
            laboratory.progress(f"{title}: round {turn + 1} of {rounds}: {sdk}")
            figures[sdk].append(laboratory.work(sdk, workload, *numbers, tls=tls, latency=latency))
    return figures


def _check_work(name: str, figures: dict[str, list[dict[str, Any]]], count: int) -> None:
    """Make sure that what was measured is what was asked for: each action started once, and seen to its end."""
    for sdk, runs in figures.items():
        for run in runs:
            if run["posts"] != count or run["polls"] < count:
                raise RuntimeError(f"{name}: {sdk} did other work than was asked for: {run}")


def _series(figures: dict[str, list[dict[str, Any]]], key: str) -> Series:
    return {sdk: [run[key] for run in runs] for sdk, runs in figures.items()}


def _ratios(row: Row) -> list[float]:
    return ratios(row.ours_rounds, row.official_rounds)


def _mean(actions: list[dict[str, float]], key: str) -> float:
    return statistics.mean(action[key] for action in actions)


def _simulated(seconds: float, chance: random.Random) -> tuple[float, int]:
    """How late an action of so many seconds is noticed, and by which poll, on a clock that only sleeping moves."""
    now = 0.0
    polls = 0
    steps = lifecycle.follow(
        "act",
        clock=lambda: now,
        jitter=chance.random,
        redact=Redactor(),
        started_at=0.0,
        limit=2 * seconds + 60,  # never in the way
    )
    step = next(steps)
    while True:
        if isinstance(step, lifecycle.Send):
            polls += 1
            if now >= seconds:
                return now - seconds, polls
            step = steps.send(wire.read_reply(200, {}, b'{"id": "act", "status": "RUNNING"}'))
        else:
            now += step.seconds
            step = next(steps)


def payloads(laboratory: Laboratory) -> Part:
    """Measure what long params cost, and how long they hold the event loop, beside json.dumps of the same rows."""
    from . import payloads as measure

    part = Part("Payloads: rows as params, and json.dumps of the same rows")
    plain = measure.plain_rows()
    for name, rows, limit in (("what JSON has", plain, 2.0), ("with dates and Decimals", measure.mixed_rows(), None)):
        encoded = measure.body(rows)
        same = json.loads(encoded)["params"]
        dumps, ours, dumps_hold, hold = [], [], [], []
        for turn in range(ROUNDS):
            laboratory.progress(f"payloads: {name}: round {turn + 1} of {ROUNDS}")
            dumps.append(measure.seconds(json.dumps, same))
            ours.append(measure.seconds(measure.body, rows))
            dumps_hold.append(asyncio.run(measure.longest_hold(measure.dumps_in_the_loop(same))))
            hold.append(asyncio.run(measure.hold_of_a_start(laboratory.url(), rows)))
        label = f"{len(encoded) / 1e6:.1f} MB, {name}"
        part.add(f"{label}: json.dumps", "ms", dumps)
        part.add(f"{label}: encoding", "ms", ours)
        part.add(f"{label}: json.dumps in the event loop holds it", "ms", dumps_hold)
        part.add(f"{label}: a start holds it", "ms", hold)
        if limit is not None:
            part.expect(f"{label}: encoding / json.dumps", "x", ratios(ours, dumps), limit)
        part.expect(f"{label}: hold / hold of json.dumps", "x", ratios(hold, dumps_hold), 1.0)
    return part


PARTS: dict[str, Callable[[Laboratory], Part]] = {
    "start": cold_start,
    "size": size,
    "time-to-result": time_to_result,
    "fan-out": fan_out,
    "limit": limit,
    "payloads": payloads,
}
