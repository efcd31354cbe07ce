"""The chart: how late each SDK tells of an action, by the action's own duration."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt  # the backend comes first

STYLES = (("#4c72b0", "s"), ("#c44e52", "o"))  # colour and marker of each side


def draw(series: dict[str, list[dict[str, float]]], labels: dict[str, str], target: Path) -> None:
    """Write the chart of both sides as SVG, the same for the same figures."""
    # Text stays text, and no date or random id makes every run a change.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "zamp-sdk", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (side, label), (colour, marker) in zip(labels.items(), STYLES):
        actions = series[side]
        axes.plot(
            [action["seconds"] for action in actions],
            [action["late"] for action in actions],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
        )
    axes.set_xscale("symlog", linthresh=0.05, linscale=0.3)
    axes.set_xlim(left=-0.005, right=60)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0, 0.1, 0.3, 1, 3, 10, 45], ["0", "0.1", "0.3", "1", "3", "10", "45"])
    axes.minorticks_off()
    axes.set_xlabel("how long the action itself takes (s, logarithmic)")
    axes.set_ylabel("how much later its caller is told (s); lower is better")
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)
