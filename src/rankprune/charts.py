"""Drawings of a report: where lines, bars and points stand, and what they say aloud."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rankprune.report import LatencyReport, LayerReport, Report
from rankprune.tables import format_known, format_ms, format_percent, format_short, known

_MAX_POINTS = 64  # of a spectrum
_MAX_DECADES = 6
_MAX_LABEL = 24  # characters of a name inside a drawing

# A point's label by direction: its anchor and its offset.
_SIDES = (("start", 11, 5), ("end", -11, 5), ("middle", 0, -16), ("middle", 0, 26))
_LABEL_WIDTH, _LABEL_HEIGHT = 10, 20  # of a character, on a phone, where they are largest


def conditions(entry: LatencyReport) -> str:
    """Where a time was measured."""
    threads = "1 thread" if entry.threads == 1 else f"{entry.threads} threads"
    return f"{entry.backend}, batch {entry.batch}, {threads}"


@dataclass(frozen=True)
class _Axis:
    """Values to positions; what lies outside is drawn at the edge."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = min(max((value - self.low) / span, 0.0), 1.0) if span > 0 else 0.5
        return round(self.start + share * (self.stop - self.start), 1)


def draw_spectrum(layer: LayerReport) -> dict[str, Any] | None:
    """Singular values over their index, logarithmic, and where they are cut; 320×150."""
    values = [value if known(value) else 0.0 for value in layer.singular_values]
    peak, rank = max(values, default=0.0), layer.rank
    if peak <= 0 or rank is None:
        return None
    count = len(values)
    rank = min(rank, count)
    heights = [
        max(math.log10(value / peak), -_MAX_DECADES) if value / peak > 0 else -_MAX_DECADES
        for value in values
    ]
    decades = min(max(math.ceil(-min(heights)), 1), _MAX_DECADES)
    x, y = _Axis(1, max(count, 2), 40, 308), _Axis(-decades, 0, 128, 12)

    def line(indices: Iterable[int]) -> str:
        return " ".join(f"{x(index + 1)},{y(heights[index])}" for index in indices)

    shown = _thinned(count, rank)
    energy = format_known(layer.energy, lambda value: f"{value:.4f}")
    cut = x(min(rank + 0.5, count))
    return {
        "label": f"Singular values of {layer.name}, relative to the largest, from 1 down to "
        f"{min(values) / peak:.2g}; the cut at rank {rank} of {count} keeps {energy} of the energy",
        "summary": f"rank {rank} of {count}",
        "kept": line(index for index in shown if index < rank),
        "rest": line(index for index in shown if index >= rank - 1),
        "cut": cut,
        "cut_label": f"rank {rank}",
        "cut_anchor": "start" if cut < 200 else "end",
        "cut_text": cut + 5 if cut < 200 else cut - 5,
        "x_ticks": [(x(1), "1")] + ([(x(count), str(count))] if count > 1 else []),
        "y_ticks": [(y(-decade), _power(-decade)) for decade in range(decades + 1)],
    }


def _thinned(count: int, rank: int) -> list[int]:
    """At most 64 of the indices, evenly, and both sides of the cut among them."""
    if count <= _MAX_POINTS:
        return list(range(count))
    even = _MAX_POINTS - 2
    chosen = {round(n * (count - 1) / (even - 1)) for n in range(even)}
    return sorted(chosen | {rank - 1, min(rank, count - 1)})


def _power(exponent: int) -> str:
    if exponent > -3:
        return f"{10.0**exponent:g}"
    return "10⁻" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[-exponent]


def draw_layers(layers: Sequence[LayerReport]) -> dict[str, Any] | None:
    """Energy kept as bars, the weight's error as dots, layer by layer; 560×200."""
    if not any(known(layer.energy) is not None for layer in layers):
        return None
    y, slot = _Axis(0, 1, 186, 14), (552 - 56) / len(layers)
    bars = []
    for index, layer in enumerate(layers):
        energy, error = known(layer.energy), known(layer.error)
        middle = 56 + (index + 0.5) * slot
        bars.append(
            {
                "label": f"{layer.name}: energy kept {format_known(energy, format_short)}, "
                f"weight error {format_known(error, lambda value: f'{value:.2g}')}",
                "x": round(middle - 0.36 * slot, 2),
                "middle": round(middle, 2),
                "top": None if energy is None else y(energy),
                "dot": None if error is None else y(error),
            }
        )
    energies = [energy for layer in layers if (energy := known(layer.energy)) is not None]
    errors = [error for layer in layers if (error := known(layer.error)) is not None]
    label = (
        f"Energy kept by the {len(layers)} factorised layers, "
        f"from {format_short(min(energies))} to {format_short(max(energies))}"
    )
    if errors:
        label += f", and their weights' relative error, from {min(errors):.2g} to {max(errors):.2g}"
    return {
        "label": label,
        "bars": bars,
        "width": round(0.72 * slot, 2),
        "radius": round(min(4.0, 0.42 * slot), 2),
        "errors": bool(errors),
        "first": layers[0].name,
        "last": layers[-1].name,
        "base": y(0),
        "y_ticks": [(y(value), f"{value:g}") for value in (0, 0.5, 1)],
    }


def draw_latency(entries: Sequence[LatencyReport]) -> dict[str, Any] | None:
    """Dense, compact and predicted time as bars, for every backend; 560 wide."""
    groups, top = [], 0
    for entry in entries:
        times = {
            "dense": known(entry.dense_ms),
            "compact": known(entry.compact_ms),
            "predicted": known(entry.predicted_ms),
        }
        # each backend has its own scale: one at batch 1 would be nothing beside one at batch 256
        x = _Axis(0, max(value or 0.0 for value in times.values()), 0, 380)
        group: dict[str, Any] = {
            "name": _clipped(conditions(entry), 52),
            "top": top + 19,
            "bars": [],
        }
        top += 28
        for kind, value in times.items():
            if value is not None:
                text = f"{kind} {format_ms(value)}"
                group["bars"].append({"kind": kind, "y": top, "width": x(value), "text": text})
                top += 24
        top += 12
        groups.append(group)
    if not groups:
        return None
    shown = "; ".join(
        f"{group['name']}: " + ", ".join(bar["text"] for bar in group["bars"]) for group in groups
    )
    return {"label": f"Latency. {shown[:2000]}", "height": top - 12, "groups": groups}


def kept_energy(report: Report) -> float | None:
    """Mean energy that the weights keep, by parameters; a dense layer keeps all."""
    total = sum(layer.dense_params for layer in report.layers)
    energies = [1.0 if layer.scheme is None else known(layer.energy) for layer in report.layers]
    if not total or None in energies or all(layer.scheme is None for layer in report.layers):
        return None
    return sum(
        (energy or 0.0) * layer.dense_params
        for energy, layer in zip(energies, report.layers, strict=True)
    ) / float(total)


def draw_trade_off(names: Sequence[str], reports: Sequence[Report]) -> dict[str, Any] | None:
    """The first measure that all runs have, or else any, over the share of FLOPs; 560×320."""
    measures: tuple[tuple[str, Callable[[Report], float | None], bool], ...] = (
        ("accuracy", lambda report: known(report.compact.accuracy), True),
        ("energy kept", kept_energy, True),
        ("output difference", lambda report: known(report.max_logit_error), False),
    )
    found = [[measure(report) for report in reports] for _, measure, _ in measures]
    complete = [n for n, values in enumerate(found) if None not in values]
    partial = [n for n, values in enumerate(found) if any(v is not None for v in values)]
    if not partial:
        return None
    chosen = (complete or partial)[0]
    measure, _, more_is_better = measures[chosen]
    points = [
        (name, report.compact.flops / report.dense.flops, value)
        for name, report, value in zip(names, reports, found[chosen], strict=True)
        if value is not None and report.dense.flops
    ]
    if not points:
        return None
    references: list[float] = []
    if measure == "accuracy":
        references = sorted(
            {value for report in reports if (value := known(report.dense.accuracy)) is not None}
        )
    low, high = _range([value for _, _, value in points] + references)
    x = _Axis(0, max(1.0, *(share for _, share, _ in points)), 70, 530)
    y = _Axis(low, high, 284, 14)
    spots = [(x(share), y(value)) for _, share, value in points]
    labels = _labels([_clipped(name, _MAX_LABEL) for name, _, _ in points], spots)
    best = _frontier([(share, value if more_is_better else -value) for _, share, value in points])
    form = format_short if measure == "output difference" else format_percent
    texts = [f"{name}: {form(value)} at {format_percent(share)}" for name, share, value in points]
    return {
        "measure": measure,
        "label": f"{measure.capitalize()} against the share of FLOPs left. "
        + "; ".join(texts)[:2000],
        "points": [
            {"text": text, "spot": spot, "label": label}
            for text, spot, label in zip(texts, spots, labels, strict=True)
        ],
        "frontier": " ".join(f"{spots[n][0]},{spots[n][1]}" for n in best),
        "references": [(x(1), y(value)) for value in references],
        "missing": [name for name, v in zip(names, found[chosen], strict=True) if v is None],
        "x_ticks": [(x(n / 5), f"{20 * n}%") for n in range(6)],
        "y_ticks": [(y(value), text) for value, text in _ticks(low, high, form is format_percent)],
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis spans: the values and a little air."""
    low, high = min(values), max(values)
    air = 0.15 * (high - low) or 0.05 * abs(high) or 0.05
    return low - air, high + air


def _ticks(low: float, high: float, percent: bool) -> list[tuple[float, str]]:
    """Round values between two others, four to nine of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next((n for n in (0.5, 1, 2) if (high - low) / (n * step) <= 8), 5)
    digits = max(0, math.ceil(-math.log10(100 * step) - 1e-9))
    values = (n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1))
    if percent and abs(high) < 100 and digits < 6:
        return [(value, f"{value:.{digits}%}") for value in values]
    return [(value, format_short(value)) for value in values]


def _frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats at both, from left to right."""
    best, chosen = -math.inf, []
    for n in sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1])):
        if points[n][1] > best:
            best = points[n][1]
            chosen.append(n)
    return chosen


def _labels(
    names: Sequence[str], spots: Sequence[tuple[float, float]]
) -> list[tuple[str, float, float, str]]:
    """Text, position and anchor for every point, beside it where nothing is in the way."""
    taken = [(left - 7, top - 7, left + 7, top + 7) for left, top in spots]
    labels = []
    for name, (x, y) in zip(names, spots, strict=True):
        width = _LABEL_WIDTH * len(name)
        for anchor, right, down in _SIDES:
            left = x + right - {"start": 0, "middle": width / 2, "end": width}[anchor]
            bottom = y + down
            box = (left, bottom - _LABEL_HEIGHT + 4, left + width, bottom + 4)
            inside = box[0] >= 60 and box[2] <= 560 and box[1] >= 0 and box[3] <= 300
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            # no place is free: on the side where it at least stays in the picture
            anchor, right, down = _SIDES[0] if x < 300 else _SIDES[1]
            box = (x, y, x, y)
        taken.append(box)
        labels.append((name, round(x + right, 1), round(y + down, 1), anchor))
    return labels


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
