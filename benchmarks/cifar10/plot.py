"""Accuracy against FLOPs, of all methods that were trained for as many epochs.

    .venv/bin/python benchmarks/cifar10/plot.py

writes docs/images/cifar10-MODEL.svg for every model in results.json that has several targets.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from means import ONE_VIEW, means

mpl.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent.parent / "docs" / "images"


def plot(model: str, rows: list[dict[str, Any]], file: Path) -> None:
    """Draw one line a method, and the dense network as a level."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    best = {name: max(r["accuracy"] for r in rows if r["method"] == name) for name in _names(rows)}
    for index, name in enumerate(sorted(best, key=lambda name: -best[name])):
        own = sorted((r["flops_reduction"], r["accuracy"]) for r in rows if r["method"] == name)
        if name == "dense":
            axes.axhline(own[0][1], color="0.6", linestyle=":", label=name)
            continue
        ours = name == "ours"
        axes.plot(
            *zip(*own, strict=True),
            marker="o" if ours else "sv^DPX*"[index % 7],
            color="black" if ours else f"C{index % 10}",
            linewidth=2 if ours else 1,
            label=name,
        )
    axes.set_xlabel("times fewer FLOPs")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{model}: {rows[0]['epochs']} epochs from the same dense weights")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["method"] for row in rows}


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "rankprune"  # the same file for the same rows
    groups: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in means(json.loads((HERE / "results.json").read_text())):
        # the older recipe is in the table
        older = row["method"].endswith(ONE_VIEW)
        if row["epochs"] and row["start"] != "random" and not older:
            groups[row["model"], row["epochs"]].append(row)
    for model in sorted({model for model, _ in groups}):
        # of what was trained alike, where most methods were
        rows = max((rows for key, rows in groups.items() if key[0] == model), key=_variety)
        targets = {row["target"] for row in rows} - {None}
        if _variety(rows) > 1 and len(targets) > 1:
            # what ran away past all targets, or lost most, would squeeze the rest
            most, least = 1.2 * max(targets), max(row["accuracy"] for row in rows) - 8
            rows = [r for r in rows if r["flops_reduction"] < most and r["accuracy"] > least]
            plot(model, rows, IMAGES / f"cifar10-{model}.svg")


def _variety(rows: list[dict[str, Any]]) -> int:
    return len(_names(rows))


if __name__ == "__main__":
    main()
