"""What a part of the benchmark found: rows for people and for JSON, and the targets it reached or missed. No I/O."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable


@dataclass
class Row:
    """One figure of both sides, less is better, and the median of the ratios taken pair by pair."""

    name: str
    unit: str
    this: float
    other: float | None = None
    ratio: float | None = None
    rounds: int = 1
    this_rounds: list[float] = field(default_factory=list)  # in the order they were measured, for who doubts a median
    other_rounds: list[float] = field(default_factory=list)

    def cells(self) -> tuple[str, str, str, str]:
        """The name and the figures, as a table shows them."""
        show = UNITS[self.unit]
        other = "" if self.other is None else show(self.other)
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}" if self.ratio >= 0.1 else f"{self.ratio:.2g}"
        return self.name, show(self.this), other, ratio


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
    other: str | None = None  # what its rows compare with, if not with the official SDK
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # for the chart, by SDK

    def add(self, name: str, unit: str, this: Sequence[float], other: Sequence[float] = ()) -> Row:
        """Add the medians of both sides' rounds, and the median of their ratios."""
        row = Row(
            name, unit, statistics.median(this), rounds=len(this), this_rounds=list(this), other_rounds=list(other)
        )
        if other:
            row.other = statistics.median(other)
            row.ratio = statistics.median(ratios(this, other)) if all(other) else None
        self.rows.append(row)
        return row

    def expect(self, name: str, unit: str, figures: Sequence[float], limit: float) -> None:
        """Note a target: the median of these figures is at most the limit."""
        self.targets.append(Target(name, unit, statistics.median(figures), limit, (min(figures), max(figures))))

    def verdicts(self) -> list[str]:
        """A line for each target."""
        lines = []
        for target in self.targets:
            show = UNITS[target.unit]
            verdict = "reached" if target.reached else "**not reached**"
            line = f"{verdict}: {target.name}: {show(target.figure)} (at most {show(target.limit)})"
            if target.spread and target.spread[0] != target.spread[1]:
                line += f", rounds {show(target.spread[0])} to {show(target.spread[1])}"
            lines.append(line if target.decided else f"{line}; the rounds disagree")
        return lines

    def as_text(self, this: str, other: str) -> str:
        """Render the rows as a Markdown table, and a line for each target and note; the arguments are headers."""
        parts = [f"## {self.title}", table(self.rows, this, self.other or other)]
        lines = [f"- {line}" for line in [*self.verdicts(), *self.notes]]
        return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def table(rows: Sequence[Row], this: str, other: str) -> str:
    """Render rows as a Markdown table, without the columns of what none of them compares with."""
    columns = 2 if all(row.other is None for row in rows) else 4
    cells = [line[:columns] for line in [("", this, other, "ratio"), *(row.cells() for row in rows)]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|")
    return "\n".join(lines)


# What the project's README says in one sentence, with the figures of the rows that are named in braces.
SUMMARY = (
    "In brackets the official SDK's figures: it takes {from the import to the first result} from the import to the "
    "first result; the caller of an action of 5 to 45 s is told {mean lateness of actions of 5 to 45 s} late on "
    "average; 1,000 actions of 0.2 s at once over TLS take {1,000 actions of 0.2 s, TLS: wall} and "
    "{1,000 actions of 0.2 s, TLS: peak memory} of memory; but following an action of 0 to 45 s takes "
    "{mean polls of actions of 0 to 45 s} requests on average, and one action of 0.2 s takes "
    "{1 action of 0.2 s, plain: CPU after the import} of CPU time after the import."
)
WIDTH = 120  # characters of a line in the documents
BEGIN, END = "<!-- `make bench` writes from here -->", "<!-- to here -->"


def summary(rows: dict[str, Row]) -> str:
    """The sentence of figures that the project's README has: those of both sides, and of what either is better at."""

    def figures(name: re.Match[str]) -> str:
        _, this, other, _ = rows[name[1]].cells()
        return f"{this} ({other})"

    return textwrap.fill(re.sub("{(.*?)}", figures, SUMMARY), WIDTH, break_long_words=False, break_on_hyphens=False)


def block(text: str) -> str:
    """Put a text between the comments that mark what `make bench` writes."""
    return f"{BEGIN}\n\n{text}\n\n{END}"


def replace_block(document: str, text: str) -> str:
    """Put another text between those comments in a document."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise LookupError(f"the document has no {BEGIN} or no {END}")
    return before + block(text) + after


UNITS: dict[str, Callable[[float], str]] = {
    "ms": lambda seconds: f"{seconds * 1e3:,.1f} ms",
    "us": lambda seconds: f"{seconds * 1e6:,.0f} us",
    "s": lambda seconds: f"{seconds:.3f} s",
    "kB": lambda size: f"{size / 1e3:,.0f} kB",
    "MB": lambda size: f"{size / 1e6:,.1f} MB",
    "": lambda number: f"{number:,.0f}",
    "mean": lambda number: f"{number:,.1f}",
    "x": lambda number: f"{number:.3f}",
}
"""How a figure in SI units is shown."""


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratios pair by pair: what slows a machine for a moment slows both halves of a pair."""
    return [a / b for a, b in zip(numerators, denominators)]
