"""Accuracy against FLOPs, of all methods that had the same training.

    .venv/bin/python benchmarks/cifar10/plot.py

writes docs/images/cifar10-MODEL.svg for every model in results.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from means import means

mpl.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
IMAGES = HERE.parent.parent / "docs" / "images"


def plot(model: str, rows: list[dict[str, Any]], file: Path) -> None:
    """The longest training that several methods had, one line a method."""
    counts = {r["epochs"]: sum(o["epochs"] == r["epochs"] for o in rows) for r in rows}
    epochs = max((e for e, count in counts.items() if e and count > 3), default=0)
    rows = [r for r in rows if r["epochs"] == epochs and r["start"] != "random"]
    dense = [r["accuracy"] for r in rows if r["method"] == "dense"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for value in dense:
        axes.axhline(value, color="0.6", linestyle=":", label="dense")
    names = sorted(
        {r["method"] for r in rows},
        key=lambda name: -max(r["accuracy"] for r in rows if r["method"] == name),
    )
    for index, name in enumerate(name for name in names if not name.startswith("dense")):
        own = sorted((r["flops_reduction"], r["accuracy"]) for r in rows if r["method"] == name)
        ours = name == "ours"
        axes.plot(
            *zip(*own, strict=True),
            marker="o" if ours else "sv^<>DPX*p"[index % 10],
            color="black" if ours else f"C{index % 10}",
            linewidth=2 if ours else 1,
            label=name,
        )
    axes.set_xlabel("times fewer FLOPs")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{model}, CIFAR-10 as JPEG, {epochs} epochs from the same dense weights")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "rankprune"  # the same file for the same rows
    rows = means(json.loads((HERE / "results.json").read_text()))
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        plot(model, own, IMAGES / f"cifar10-{model}.svg")


if __name__ == "__main__":
    main()
