"""Rows of results over their seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

#: Ends the names of methods whose teacher saw no mirror images, as in the recipe until then.
ONE_VIEW = "-one-view"
ALIKE = ("model", "start", "method", "target", "epochs", "lr")
MEASURED = (
    "accuracy",
    "dense_accuracy",
    "projected_accuracy",
    "flops_reduction",
    "params_reduction",
)


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
