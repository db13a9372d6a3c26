"""Rows of results over their seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

ALIKE = ("model", "start", "method", "target", "epochs", "lr", "views")
MEASURED = (
    "accuracy",
    "dense_accuracy",
    "projected_accuracy",
    "flops_reduction",
    "params_reduction",
)


def titled(row: dict[str, Any]) -> str:
    """The method, and that its teacher saw no mirror images."""
    return f"{row['method']} (one view)" if row["views"] == 1 else str(row["method"])


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for all seeds of a method: what tells it from others, means, number of seeds."""
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in ALIKE)].append(row)
    found = []
    for key, group in groups.items():
        mean: dict[str, Any] = dict(zip(ALIKE, key, strict=True))
        for name in MEASURED:
            values = [row[name] for row in group]
            mean[name] = None if None in values else statistics.fmean(values)
        found.append({**mean, "seeds": len(group)})
    return found
