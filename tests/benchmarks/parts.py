"""The parts of the benchmark: what each measures, and the figures it should reach."""

from __future__ import annotations

import asyncio
import io
import statistics
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

from . import schedules
from .laboratory import LATENCIES, Laboratory
from .report import Part, Row, ratios

ROUNDS = 7  # of each measurement, unless `--rounds` says otherwise
SETS = 3  # of the actions whose lateness is measured
SAMPLES = 2000  # simulated actions around each duration
FIRST_RESULT = (
    "import asyncio; from zamp_sdk import ActionExecutor; "
    "asyncio.run(ActionExecutor.execute('benchmark', {{'seconds': 0}}, base_url={!r}, auth_token='benchmark'))"
)
ACTION_SECONDS = 0.2
LONGER = 2.0  # s, of actions that are far away: connections are made while they run
FAR, FARTHER = 0.025, 0.05  # s, one way
# Of an action of 0.2 s over TLS from far away: three round trips to connect, shake hands and start, and the poll that
# finds it ended.
FAR_LEAST = 3 * 2 * FAR + ACTION_SECONDS + 2 * FAR
DURATIONS = [0.0, *(0.05 * 900 ** (step / 60) for step in range(61))]  # s: 0, and 0.05 to 45 on a logarithmic scale
LONG = (120.0, 600.0, 1800.0, 3600.0, 10800.0)  # s, simulated

Series = dict[str, list[float]]


def cold_start(laboratory: Laboratory) -> Part:
    """Measure whole processes, from their start to their exit."""
    part = Part("Whole processes, less what a bare interpreter takes")
    ours, theirs = laboratory.sides
    first_result = FIRST_RESULT.format(laboratory.url())
    programs = {
        (side, name): code
        for name, code in (("bare", "pass"), ("import", "import zamp_sdk"), ("first", first_result))
        for side in laboratory.sides
    }
    walls: dict[tuple[str, str], list[float]] = {program: [] for program in programs}
    for turn in range(laboratory.rounds + 1):
        for program, code in programs.items():
            laboratory.progress(f"whole processes: round {turn} of {laboratory.rounds}: {' '.join(program)}")
            # The median of three where a program takes but a moment.
            walls[program].append(statistics.median(laboratory.python(program[0], "-c", code) for _ in range(3)))
    # The first round only brought the files into memory.
    over = {
        (side, name): [wall - bare for wall, bare in zip(taken[1:], walls[side, "bare"][1:])]
        for (side, name), taken in walls.items()
    }
    part.add("`import zamp_sdk`", "ms", over[ours, "import"], over[theirs, "import"])
    part.add("from the import to the first result", "ms", over[ours, "first"], over[theirs, "first"])
    return part


def size(laboratory: Laboratory) -> Part:
    """Measure what is downloaded, installed, put into a layer, and loaded."""
    part = Part("Size, with all dependencies")

    def add(name: str, unit: str, measure: Callable[[str], float]) -> None:
        part.add(name, unit, *([measure(side)] for side in laboratory.sides))

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
    add("zipped for AWS Lambda", "kB", layer)
    figures = alternate(laboratory, "size", "first", laboratory.rounds)
    for name, unit, key in (
        ("modules loaded by the import", "", "modules_imported"),
        ("modules loaded at the first result", "", "modules"),
        ("peak memory after the import", "MB", "memory_imported"),
        ("peak memory after the first result", "MB", "memory"),
    ):
        part.add(name, unit, *(series(figures, key)[side] for side in laboratory.sides))
    return part


def time_to_result(laboratory: Laboratory) -> Part:
    """Measure how long after its end a caller hears of an action, and how many polls that takes."""
    part = Part("Time to result: how late after an action's end its caller is told, and polls")
    laboratory.progress(f"time to result: {SETS} times {len(DURATIONS)} actions of up to {DURATIONS[-1]:.0f} s")
    # Side by side: so few actions load no machine.
    with ThreadPoolExecutor() as executor:
        runs = list(executor.map(lambda side: laboratory.work(side, "lateness", *DURATIONS * SETS), laboratory.sides))
    # By side and duration: what each of the sets found.
    both = [[run["actions"][place :: len(DURATIONS)] for place in range(len(DURATIONS))] for run in runs]
    ours, theirs = both
    part.series = {
        side: [{"seconds": found[0]["seconds"], "late": _mean(found, "late")} for found in by_duration]
        for side, by_duration in zip(laboratory.sides, both)
    }
    for low, high, limit in ((0.0, 1.0, None), (1.0, 5.0, 1 / 2), (5.0, DURATIONS[-1], 1 / 5)):
        chosen = [place for place, seconds in enumerate(DURATIONS) if low <= seconds <= high]
        means = [
            [statistics.mean(by_duration[place][number]["late"] for place in chosen) for number in range(SETS)]
            for by_duration in both
        ]
        row = part.add(f"mean lateness of actions of {low:.0f} to {high:.0f} s", "s", *means)
        if limit:
            part.expect(row.name + " / official", "x", row_ratios(row), limit)
    polls = [
        [statistics.mean(found[number]["polls"] for found in by_duration) for number in range(SETS)]
        for by_duration in both
    ]
    row = part.add(f"mean polls of actions of 0 to {DURATIONS[-1]:.0f} s", "mean", *polls)
    part.expect(row.name + " / official", "x", row_ratios(row), 2.8)
    for seconds, mine, other in zip(DURATIONS, ours, theirs):
        if seconds in DURATIONS[1::10]:
            part.add(f"late, {seconds:.2f} s", "s", [each["late"] for each in mine], [each["late"] for each in other])
    for seconds, mine, other in zip(DURATIONS, ours, theirs):
        if seconds in DURATIONS[1::10]:
            part.add(f"polls, {seconds:.2f} s", "", [each["polls"] for each in mine], [each["polls"] for each in other])
    slack = [each["late"] - max(0.3 * seconds, 0.15) for seconds, mine in zip(DURATIONS, ours) for each in mine]
    part.expect("later than 30 % or 0.15 s, whichever is more, by", "s", [max(slack)], 0.0)

    _simulate(laboratory, part)
    laboratory.progress("time to result: instant actions")
    for latency in LATENCIES:
        figures = alternate(laboratory, "time to result", "instant", 1, 3, latency=latency)
        row = part.add(
            f"an instant action, {2e3 * latency:.0f} ms round trip",
            "ms",
            *(figures[side][0]["walls"] for side in laboratory.sides),
        )
        part.expect(row.name + ": two round trips and 10 ms", "ms", row.this_rounds, 4 * latency + 0.01)
    return part


def _simulate(laboratory: Laboratory, part: Part) -> None:
    """Add what takes too long to be measured.

    One side's jitter and the other's steps make every duration come out differently, so each is stood for by many
    around it.
    """
    for seconds in LONG:
        laboratory.progress(f"time to result: simulating actions of {seconds:.0f} s")
        found = [schedules.around(seconds, schedule, SAMPLES) for schedule in (schedules.ours, schedules.official)]
        lateness = part.add(f"simulated: mean lateness around {seconds:,.0f} s", "s", *([f.lateness] for f in found))
        counted = part.add(f"simulated: mean polls around {seconds:,.0f} s", "", *([f.polls] for f in found))
        if seconds in (120.0, 600.0):
            part.expect(lateness.name + " / official", "x", row_ratios(lateness), 1 / 4)
        if seconds == 600.0:
            part.expect(counted.name, "", [found[0].polls], 200)


def at_once(laboratory: Laboratory) -> Part:
    """Measure a thousand actions at once on loopback, and one to a thousand from far away."""
    part = Part("Many actions at once, on the default executor")
    for tls, latency, count, seconds in (
        (False, 0.0, 1, ACTION_SECONDS),
        (False, 0.0, 1000, ACTION_SECONDS),
        (True, 0.0, 1000, ACTION_SECONDS),
        (True, FAR, 1, ACTION_SECONDS),
        (True, FAR, 200, LONGER),
        (True, FAR, 1000, LONGER),
        (True, FARTHER, 200, LONGER),
        (True, FARTHER, 500, LONGER),
        (True, FARTHER, 1000, LONGER),
    ):
        name = f"{count:,} action{'s' if count > 1 else ''} of {seconds:g} s, {'TLS' if tls else 'plain'}"
        name += f", {2e3 * latency:.0f} ms round trip" if latency else ""
        figures = alternate(laboratory, name, "fan-out", laboratory.rounds, count, seconds, tls=tls, latency=latency)
        _check_work(name, figures, count)
        for label, unit, key in (
            ("wall", "s", "wall"),
            ("CPU, with the import", "s", "cpu_of_process"),
            ("CPU after the import", "s", "cpu"),
            ("peak memory", "MB", "peak_memory"),
            ("connections at once", "", "peak_connections"),
            ("polls", "", "polls"),
        ):
            part.add(f"{name}: {label}", unit, *(series(figures, key)[side] for side in laboratory.sides))
    return part


def cpu_per_request(laboratory: Laboratory) -> Part:
    """Measure the CPU of a request where instant actions run one after the other, and 50 and 500 at once."""
    part = Part("CPU per request of instant actions")
    for tls in (False, True):
        for workload, count, name in (
            ("instant", 200, "alone"),
            ("busy", 50, "50 at once"),
            ("busy", 500, "500 at once"),
        ):
            kind = f"CPU per request, {name}, {'TLS' if tls else 'plain'}"
            figures = alternate(laboratory, kind, workload, laboratory.rounds, count, tls=tls)
            part.add(kind, "us", *([cpu(run) for run in figures[side]] for side in laboratory.sides))
    return part


def limit(laboratory: Laboratory) -> Part:
    """Measure how far this SDK is from the same two requests made by http.client on one connection."""
    part = Part("Instant actions one after the other, beside a bare http.client with keep-alive", "http.client")
    runs = []
    for turn in range(3):
        laboratory.progress(f"beside http.client: round {turn + 1} of 3")
        runs.append([laboratory.work(laboratory.ours, workload, 500) for workload in ("instant", "raw")])
    for name, measure in (("CPU per request", cpu), ("wall per action", lambda run: statistics.median(run["walls"]))):
        ours, raw = ([measure(run) for run in taken] for taken in zip(*runs))
        part.add(f"{name}, one after the other", "us", ours, raw)
    return part


def cpu(figures: dict[str, Any]) -> float:
    """The CPU seconds of one request."""
    return float(figures["cpu"] / (figures["posts"] + figures["polls"]))


def alternate(
    laboratory: Laboratory,
    title: str,
    workload: str,
    rounds: int,
    *numbers: float,
    tls: bool = False,
    latency: float = 0.0,
) -> dict[str, list[dict[str, Any]]]:
    """Run a workload on both sides in turn, so that what disturbs the machine disturbs both."""
    figures: dict[str, list[dict[str, Any]]] = {side: [] for side in laboratory.sides}
    for turn in range(rounds):
        for side in laboratory.sides:
            laboratory.progress(f"{title}: round {turn + 1} of {rounds}: {side}")
            figures[side].append(laboratory.work(side, workload, *numbers, tls=tls, latency=latency))
    return figures


def series(figures: dict[str, list[dict[str, Any]]], key: str) -> Series:
    """One of the figures of each round, by side."""
    return {side: [run[key] for run in runs] for side, runs in figures.items()}


def row_ratios(row: Row) -> list[float]:
    """The ratios of a row's rounds, pair by pair."""
    return ratios(row.this_rounds, row.other_rounds)


def _check_work(name: str, figures: dict[str, list[dict[str, Any]]], count: int) -> None:
    """Make sure that what was measured is what was asked for: each action started once, and seen to its end."""
    for side, runs in figures.items():
        for run in runs:
            if run["posts"] != count or run["polls"] < count:
                raise RuntimeError(f"{name}: {side} did other work than was asked for: {run}")


def _mean(actions: list[dict[str, float]], key: str) -> float:
    return statistics.mean(action[key] for action in actions)


# Ratios to the official SDK that the rows of these names should reach.
RATIOS = {
    "`import zamp_sdk`": 1 / 7,
    "from the import to the first result": 1 / 7,
    "CPU per request, 500 at once, plain": 0.75,
    "CPU per request, 500 at once, TLS": 0.35,
    "1,000 actions of 0.2 s, plain: wall": 0.67,
    "1,000 actions of 0.2 s, plain: CPU, with the import": 0.75,
    "1,000 actions of 0.2 s, plain: peak memory": 0.4,
    "1,000 actions of 0.2 s, TLS: wall": 0.31,
    "1,000 actions of 0.2 s, TLS: CPU, with the import": 0.31,
    "1,000 actions of 0.2 s, TLS: peak memory": 0.125,
    "1 action of 0.2 s, TLS, 50 ms round trip: wall": 1.0,
    "200 actions of 2 s, TLS, 100 ms round trip: wall": 1.0,
    "500 actions of 2 s, TLS, 100 ms round trip: wall": 0.87,
    "1,000 actions of 2 s, TLS, 100 ms round trip: wall": 0.7,
}


def expect_ratios(part: Part) -> None:
    """Add the targets beside the official SDK to a part that has such rows."""
    for row in part.rows:
        if row.name in RATIOS:
            part.expect(row.name + " / official", "x", row_ratios(row), RATIOS[row.name])
        if row.name == "1 action of 0.2 s, TLS, 50 ms round trip: wall":
            part.expect(row.name + ": 1.15 times the least possible", "s", row.this_rounds, 1.15 * FAR_LEAST)
        if row.name.endswith(": connections at once"):
            part.expect(row.name, "", [max(row.this_rounds)], 256 if "round trip" in row.name else 100)


def payloads(laboratory: Laboratory) -> Part:
    """Measure what long params cost, and how long they hold the event loop, beside json.dumps of the same rows."""
    from . import payloads as measure

    part = Part("Payloads: rows as params, and json.dumps of the same rows", "json.dumps")
    for name, rows in (
        ("what JSON has", measure.plain_rows()),
        ("with UUIDs, dates and Decimals", measure.mixed_rows()),
        ("dataclasses", measure.dataclass_rows()),
    ):
        dumps, ours, dumps_hold, hold = [], [], [], []
        for turn in range(laboratory.rounds):
            laboratory.progress(f"payloads: {name}: round {turn + 1} of {laboratory.rounds}")
            dumps.append(measure.seconds(measure.dumps, rows))
            ours.append(measure.seconds(measure.body, rows))
            dumps_hold.append(asyncio.run(measure.longest_hold(measure.dumps_in_the_loop(rows))))
            hold.append(asyncio.run(measure.hold_of_a_start(laboratory.url(), rows)))
        label = f"{len(measure.body(rows)) / 1e6:.1f} MB, {name}"
        part.add(f"{label}: encoding", "ms", ours, dumps)
        part.add(f"{label}: longest hold of the event loop", "ms", hold, dumps_hold)
        part.expect(f"{label}: encoding / json.dumps", "x", ratios(ours, dumps), 2.0)
        part.expect(f"{label}: hold / hold of json.dumps", "x", ratios(hold, dumps_hold), 1.0)
    return part


PARTS: dict[str, Callable[[Laboratory], Part]] = {
    "start": cold_start,
    "size": size,
    "time-to-result": time_to_result,
    "at-once": at_once,
    "cpu": cpu_per_request,
    "limit": limit,
    "payloads": payloads,
}
