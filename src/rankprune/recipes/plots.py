"""Pictures for the command line; matplotlib is imported only here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rankprune.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Blue, orange, green, pink: told apart by readers who do not see all colours.
_COLOURS = {
    "channel": "#0072b2",
    "spatial": "#d55e00",
    "decoupled": "#009e73",
    "depthwise": "#e69f00",
    "linear": "#cc79a7",
}
_COLUMNS = 5


def spectra_figure(rows: list[dict[str, Any]]) -> Figure:
    """One small plot a layer: σ_i / σ_1 over i / max rank, a curve for every scheme.

    The dot on each curve is its break-even rank: only ranks left of it save anything.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("a plot", "matplotlib", "plot") from None
    if not rows:
        raise ConfigError("nothing to plot: no layer can be factorised")
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 1.9 * lines + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for row in (row for row in rows if row["name"] == name):
            _draw(axis, row)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("rank, as a share of the largest (dot: break-even)", fontsize=9)
    figure.supylabel("σᵢ / σ₁", fontsize=9)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    named = {label: line for label, line in handles.items() if str(label) in _COLOURS}
    figure.legend(
        list(named.values()),
        [str(label) for label in named],
        loc="outside upper right",
        fontsize=8,
        ncols=len(named),
    )
    return figure


def _draw(axis: Any, row: dict[str, Any]) -> None:
    values, colour = row["values"], _COLOURS[row["scheme"]]
    peak = values[0] or 1.0
    shares = [(index + 1) / len(values) for index in range(len(values))]
    heights = [value / peak for value in values]
    axis.plot(shares, heights, color=colour, linewidth=1.2, label=row["scheme"])
    limit = min(row["break_even"], len(values))
    axis.plot(shares[limit - 1], heights[limit - 1], "o", color=colour, markersize=3.5)
