"""The demo: handwritten digits, a dense baseline, TRP to a budget, and the proof."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rankprune.recipes.config import TrainConfig, make_config
from rankprune.recipes.run import run
from rankprune.recipes.train import Progress
from rankprune.report import Report


def demo_config(seed: int = 0) -> TrainConfig:
    """The demo's options: both networks train for the same 30 epochs from the same weights."""
    return make_config(
        {
            "data": "digits",
            "model": "digits_cnn",
            "flops": 0.4,
            "baseline": True,
            "epochs": 30,
            "batch_size": 64,
            "lr": 0.05,
            "seed": seed,
        }
    )


def demo(seed: int = 0, progress: Progress | None = None) -> Report:
    """Train, project, factorise and compare, in a folder that is removed afterwards."""
    config = demo_config(seed)
    with tempfile.TemporaryDirectory(prefix="rankprune-demo-") as name:
        return run(config, Path(name), progress)
