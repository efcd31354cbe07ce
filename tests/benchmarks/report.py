"""What a part of the benchmark found: rows for people and for JSON, and the targets it reached or missed. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable


@dataclass
class Row:
    """One figure of both SDKs, and the median of the ratios taken pair by pair."""

    name: str
    unit: str
    ours: float
    official: float | None = None
    ratio: float | None = None
    rounds: int = 1
    ours_rounds: list[float] = field(default_factory=list)  # in the order they were measured, for who doubts a median
    official_rounds: list[float] = field(default_factory=list)


@dataclass
class Target:
    """A figure that has a limit."""

    name: str
    unit: str
    figure: float
    limit: float
    spread: tuple[float, float] | None = None  # the least and the most of the rounds

    @property
    def reached(self) -> bool:
        return self.figure <= self.limit

    @property
    def decided(self) -> bool:
        """Whether every round says the same; if not, another run of the benchmark may say otherwise."""
        return self.spread is None or self.spread[1] <= self.limit or self.spread[0] > self.limit


@dataclass
class Part:
    """One part's findings."""

    title: str
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # for the chart, by SDK

    def add(self, name: str, unit: str, ours: Sequence[float], official: Sequence[float] = ()) -> Row:
        """Add the medians of both SDKs' rounds, and the median of their ratios."""
        row = Row(
            name,
            unit,
            statistics.median(ours),
            rounds=len(ours),
            ours_rounds=list(ours),
            official_rounds=list(official),
        )
        if official:
            row.official = statistics.median(official)
            row.ratio = statistics.median(ratios(ours, official)) if all(official) else None
        self.rows.append(row)
        return row

    def expect(self, name: str, unit: str, figures: Sequence[float], limit: float) -> None:
        """Note a target: the median of these figures is at most the limit."""
        self.targets.append(Target(name, unit, statistics.median(figures), limit, (min(figures), max(figures))))

    def as_text(self) -> str:
        """Render the rows as a Markdown table, and a line for each target and note."""
        table = [("", "zamp-sdk (this)", "official", "this / official", "rounds")]
        table += [
            (
                row.name,
                UNITS[row.unit](row.ours),
                "" if row.official is None else UNITS[row.unit](row.official),
                "" if row.ratio is None else f"{row.ratio:.4f}",
                str(row.rounds),
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |"
            for row in table
        ]
        lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|")
        for target in self.targets:
            show = UNITS[target.unit]
            verdict = "reached    " if target.reached else "NOT REACHED"
            line = f"{verdict} {target.name}: {show(target.figure)} (at most {show(target.limit)})"
            if target.spread and target.spread[0] != target.spread[1]:
                line += f", rounds {show(target.spread[0])} to {show(target.spread[1])}"
            lines.append(line if target.decided else line + ": THE ROUNDS DISAGREE")
        return "\n".join([f"\n## {self.title}\n", *lines[: len(table) + 1], "", *lines[len(table) + 1 :], *self.notes])


UNITS: dict[str, Callable[[float], str]] = {
    "ms": lambda seconds: f"{seconds * 1e3:,.1f} ms",
    "us": lambda seconds: f"{seconds * 1e6:,.0f} us",
    "s": lambda seconds: f"{seconds:.3f} s",
    "kB": lambda size: f"{size / 1e3:,.0f} kB",
    "MB": lambda size: f"{size / 1e6:,.1f} MB",
    "": lambda number: f"{number:,.0f}",
    "x": lambda number: f"{number:.4f}",
}
"""How a figure in SI units is shown."""


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratios pair by pair: what slows a machine for a moment slows both halves of a pair."""
    return [a / b for a, b in zip(numerators, denominators)]
