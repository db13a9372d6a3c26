"""The report as one HTML file: no script, no network, nothing but the page itself.

Figures become texts here, drawings come from `charts`, and `report.html.jinja` says where they
stand. Names come from models and folders, so that nobody vouches for them: the template escapes all
that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from rankprune.charts import (
    conditions,
    draw_latency,
    draw_layers,
    draw_spectrum,
    draw_trade_off,
    kept_energy,
)
from rankprune.errors import ConfigError
from rankprune.report import Cost, LatencyReport, LayerReport, Report
from rankprune.tables import (
    UNKNOWN,
    format_change,
    format_count,
    format_factor,
    format_known,
    format_ms,
    format_percent,
    format_short,
    known,
)

_TEMPLATE = "report.html.jinja"


def to_html(reports: Sequence[tuple[str, Report]]) -> str:
    """Write reports as one self-contained HTML page.

    Args:
        reports: name and report of every run; several are compared with each other.

    Returns:
        The page. It loads nothing and runs nothing, and is read in light or dark, on paper, on a
        phone, and with the keyboard.

    Raises:
        ConfigError: there is no report.

    Example:
        >>> import torch, rankprune as rp
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> compact = rp.factorize(model, rp.make_plan(model, rp.FixedRank(4)))
        >>> page = to_html([("mine", rp.report(model, compact, example_inputs=torch.ones(1, 32)))])
        >>> "<h1>mine</h1>" in page, "://" in page
        (True, False)
    """
    from jinja2 import Environment, StrictUndefined

    if not reports:
        raise ConfigError("no report to write; give one run or more")
    source = resources.files("rankprune").joinpath(_TEMPLATE).read_text("utf-8")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    runs = [_run(_printable(name), report) for name, report in reports]
    comparison = _comparison(runs, [report for _, report in reports]) if len(runs) > 1 else None
    return environment.from_string(source).render(runs=runs, comparison=comparison)


# -- texts ---------------------------------------------------------------------------------------


def _printable(name: str) -> str:
    """Folders may have names that are no text."""
    return name.encode("utf-8", "replace").decode()


def _points(before: float | None, after: float | None) -> str:
    """A difference of accuracies."""
    if known(before) is None or known(after) is None:
        return UNKNOWN
    assert before is not None
    assert after is not None
    points = round(100 * (after - before), 2)
    text = "0.00" if not points else f"{points:+.2f}" if abs(points) < 1e4 else f"{points:+.3g}"
    return text.replace("-", "−") + " points"


def _fewer(dense: int, compact: int, less: str = "fewer", more: str = "more") -> str:
    if dense == compact:
        return "as many" if less == "fewer" else "as large"
    if not dense or not compact:
        return UNKNOWN
    factor = format_factor(max(dense, compact) / min(dense, compact))
    return f"{factor} {less if dense > compact else more}"


def _lead(report: Report) -> str:
    """The whole report in one line."""
    parts = [
        _fewer(report.dense.flops, report.compact.flops) + " FLOPs",
        _fewer(report.dense.params, report.compact.params) + " parameters",
    ]
    if known(report.compact.accuracy) is not None:
        before = "" if report.dense.accuracy is None else _accuracy(report.dense) + " → "
        parts.append(f"accuracy {before}{_accuracy(report.compact)}")
    if report.latency:
        entry = max(report.latency, key=lambda entry: entry.speedup)
        parts.append(f"{format_factor(entry.speedup)} as fast in {entry.backend}")
    return ", ".join(parts)


def _accuracy(cost: Cost) -> str:
    return format_known(cost.accuracy, format_percent)


# -- a run ---------------------------------------------------------------------------------------


def _run(name: str, report: Report) -> dict[str, Any]:
    factorized = [layer for layer in report.layers if layer.scheme is not None]
    predicted = any(layer.latency_ms is not None for layer in report.layers)
    spectra = [(layer, draw_spectrum(layer)) for layer in factorized]
    return {
        "name": name,
        "lead": _lead(report),
        "totals": _totals(report),
        "difference": format_known(report.max_logit_error, format_short),
        "predicted": predicted,
        "layers": [_layer_row(layer, predicted) for layer in report.layers],
        "factorized": len(factorized),
        "chart": draw_layers(factorized),
        "spectra": [(layer.name, spectrum) for layer, spectrum in spectra if spectrum],
        "latency": [_latency_row(entry) for entry in report.latency],
        "times": draw_latency(report.latency),
        "environment": [f"{key} {str(value)[:200]}" for key, value in report.environment.items()],
    }


def _totals(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows: what, dense, compact, change."""
    dense, compact = report.dense, report.compact
    rows = [
        (label, format_count(old) + unit, format_count(new) + unit, change)
        for label, unit, old, new, change in (
            ("Parameters", "", dense.params, compact.params, _fewer(dense.params, compact.params)),
            ("FLOPs", "", dense.flops, compact.flops, _fewer(dense.flops, compact.flops)),
            (
                "Size",
                "B",
                dense.bytes,
                compact.bytes,
                _fewer(dense.bytes, compact.bytes, "smaller", "larger"),
            ),
        )
    ]
    # decomposing a projected network must cost nothing: the second row is the proof
    for label, before in (
        ("Accuracy", dense.accuracy),
        ("Accuracy, projected", report.projected_accuracy),
    ):
        if before is not None or (label == "Accuracy" and compact.accuracy is not None):
            change = _points(before, compact.accuracy)
            rows.append((label, format_known(before, format_percent), _accuracy(compact), change))
    for entry in report.latency:
        times = format_ms(entry.dense_ms), format_ms(entry.compact_ms)
        rows.append(
            (f"Latency: {conditions(entry)}", *times, format_factor(entry.speedup) + " as fast")
        )
    return rows


def _layer_row(layer: LayerReport, predicted: bool) -> dict[str, Any]:
    cells = [
        layer.type,
        layer.scheme or "dense",
        layer.matrix or UNKNOWN,
        UNKNOWN if layer.rank is None else str(layer.rank),
        format_known(
            layer.energy, lambda value: f"{value:.4f}" if abs(value) < 100 else format_short(value)
        ),
        format_known(layer.error, lambda value: f"{value:.2g}"),
        format_change(layer.dense_params, layer.params),
        format_change(layer.dense_flops, layer.flops),
    ]
    if predicted:
        before, after = (
            format_known(value, format_ms) for value in (layer.dense_latency_ms, layer.latency_ms)
        )
        cells.append(before if before == after else f"{before.removesuffix(' ms')} → {after}")
    return {
        "name": layer.name,
        "dense": layer.scheme is None,
        "cells": cells,
        "reason": layer.reason,
    }


def _latency_row(entry: LatencyReport) -> tuple[str, list[str]]:
    return entry.backend, [
        str(entry.batch),
        str(entry.threads),
        format_ms(entry.dense_ms),
        format_ms(entry.compact_ms),
        format_known(entry.predicted_ms, format_ms),
        format_factor(entry.speedup),
        f"{entry.realised:.0%}" if abs(entry.realised) < 100 else format_factor(entry.realised),
    ]


# -- several runs --------------------------------------------------------------------------------


def _comparison(runs: Sequence[dict[str, Any]], reports: Sequence[Report]) -> dict[str, Any]:
    rows = []
    for run, report in zip(runs, reports, strict=True):
        dense, compact = report.dense, report.compact
        fastest = max((entry.speedup for entry in report.latency), default=None)
        rows.append(
            (
                run["name"],
                [
                    format_percent(compact.flops / dense.flops) if dense.flops else UNKNOWN,
                    format_percent(compact.params / dense.params) if dense.params else UNKNOWN,
                    format_count(compact.bytes) + "B",
                    _accuracy(dense),
                    _accuracy(compact),
                    _points(dense.accuracy, compact.accuracy),
                    format_known(fastest, format_factor),
                    format_known(kept_energy(report), lambda value: f"{value:.4f}"),
                    format_known(report.max_logit_error, format_short),
                ],
            )
        )
    columns = (
        "FLOPs left",
        "Parameters left",
        "Size",
        "Dense accuracy",
        "Compact accuracy",
        "Change",
        "Speed-up",
        "Energy kept",
        "Output difference",
    )
    used = [n for n in range(len(columns)) if any(cells[n] != UNKNOWN for _, cells in rows)]
    return {
        "columns": [columns[n] for n in used],
        "rows": [(name, [cells[n] for n in used]) for name, cells in rows],
        "chart": draw_trade_off([run["name"] for run in runs], reports),
    }
