"""The picture of a comparison. It has no background, and colours that stand out from white and from black."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.comparison import Comparison
from benchmarks.describe import Description
from benchmarks.report import BULK, CALLS, ranked

_INK = "#808890"
_COLOURS = {"Silo": "#2f81f7", "Redis": "#d9822b", "PostgreSQL": "#2e9e6b"}  # By what holds the jobs.
_DURABLE = {
    "Silo": "Silo, on disk",
    "Redis": "on Redis, on disk once a second",
    "PostgreSQL": "on PostgreSQL, on disk",
}
_STYLE = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 10,
    "svg.hashsalt": "silo",  # The same figures make the same file.
}
_BAR = 0.36


def draw(comparison: Comparison, path: Path) -> None:
    """Write the picture as SVG."""
    queues = ranked(comparison)[::-1]  # Axes count from below.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 0.6 * len(queues) + 1.6), layout="constrained")
        rates, latencies = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _draw_rates(rates, comparison, queues)
        _draw_latencies(latencies, comparison, queues)
        rates.set_yticks(range(len(queues)), [queue.label for queue in queues])
        figure.legend(handles=_legend(queues), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _draw_rates(axes: Axes, comparison: Comparison, queues: list[Description]) -> None:
    axes.set_title("Jobs a second, end to end", color=_INK)
    for row, queue in enumerate(queues):
        colour = _COLOURS[queue.broker]
        calls, bulk = comparison.median(queue, CALLS), comparison.median(queue, BULK)
        at = row if bulk is None else row + _BAR / 2
        if calls is not None:
            bar = axes.barh(at, calls, _BAR, color=colour)
            axes.bar_label(bar, [f" {calls:,.0f}"])
        if bulk is not None:
            bar = axes.barh(row - _BAR / 2, bulk, _BAR, facecolor="none", edgecolor=colour, hatch="////")
            axes.bar_label(bar, [f" {bulk:,.0f}"])
    axes.margins(x=0.12)
    _tidy(axes)


def _draw_latencies(axes: Axes, comparison: Comparison, queues: list[Description]) -> None:
    axes.set_title("Idle latency in ms, p50 ● and p99 ○", color=_INK)
    axes.set_xscale("log")
    for row, queue in enumerate(queues):
        middle, late = comparison.median(queue, "lat_p50_ms"), comparison.median(queue, "lat_p99_ms")
        if middle is None or late is None:
            continue
        colour = _COLOURS[queue.broker]
        axes.plot([middle, late], [row, row], color=colour, linewidth=2, zorder=1)
        axes.scatter([middle], [row], color=colour, s=50, zorder=2)
        axes.scatter([late], [row], facecolor="none", edgecolor=colour, s=50, linewidth=1.5, zorder=2)
        for value, shift, side in ((middle, -7, "right"), (late, 7, "left")):
            axes.annotate(
                f"{value:.1f}", (value, row), (shift, -3), textcoords="offset points", ha=side, fontsize=8
            )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.15)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_INK, alpha=0.25)
    axes.set_axisbelow(True)


def _legend(queues: list[Description]) -> list[Patch]:
    brokers = sorted({queue.broker for queue in queues}, key=list(_COLOURS).index)
    return [
        *(Patch(color=_COLOURS[broker], label=_DURABLE[broker]) for broker in brokers),
        Patch(facecolor=_INK, label="a call for each job"),
        Patch(facecolor="none", edgecolor=_INK, hatch="////", label="many jobs in a call"),
    ]
