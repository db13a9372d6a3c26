"""AIMET's spatial SVD with greedily selected ranks, to FLOPs targets, for the CIFAR-10 comparison.

    .venv-aimet/bin/python cifar10_aimet.py --weights DENSE.safetensors --model resnet20 \\
        --target 2 2.84 3.6 --data FOLDER

Automatic mode: each convolution but the first is tried at AIMET's nine candidate ratios, with all
others as they are, and the ratios are chosen by the accuracies on images kept back from training.
They are measured once for all targets, and kept beside the compressed networks for later ones.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from _cifar10 import SHAPE, Task, fingerprint, flops, options, task
from _common import quiet
from torch import nn

with quiet():
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters

#: Where AIMET leaves the accuracies, below the working directory.
SCORES = Path("data") / "greedy_selection_eval_scores_dict.pkl"
STEPS = 14


def compressed(job: Task, ratio: float, score: Callable[..., float]) -> nn.Module:
    """The network at about `ratio` of the dense one's MACs, as AIMET counts them.

    Uses the accuracies in the working directory, or measures them if there are none.
    """
    model = job.dense()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    selection = GreedySelectionParameters(
        Decimal(str(ratio)), saved_eval_scores_dict=str(SCORES) if SCORES.exists() else None
    )
    parameters = SpatialSvdParameters(
        SpatialSvdParameters.Mode.auto,
        SpatialSvdParameters.AutoModeParams(selection, modules_to_ignore=[first]),
    )
    with quiet():
        compact, _ = ModelCompressor.compress_model(
            model,
            eval_callback=score,
            eval_iterations=None,
            input_shape=SHAPE,
            compress_scheme=CompressionScheme.spatial_svd,
            cost_metric=CostMetric.mac,
            parameters=parameters,
        )
    return compact.eval()


def measure(job: Task) -> None:
    """Put the accuracies into the working directory: those of before, where there are any."""
    kept = job.out / f"aimet-{job.network}-{job.images}-{fingerprint(job.dense())[:8]}.pkl"
    if kept.exists():
        SCORES.parent.mkdir()
        shutil.copy(kept, SCORES)
        return
    # small enough for the outputs to stay in cache, which takes a third off the time
    part = job.chosen()
    batches = list(part.batches(100))

    @torch.inference_mode()
    def score(model: nn.Module, *_: Any, **__: Any) -> float:
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(part)

    started = time.perf_counter()
    compressed(job, 0.5, score)
    print(f"accuracies: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    job.out.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_suffix(f".{os.getpid()}.tmp")
    shutil.copy(SCORES, scratch)
    os.replace(scratch, kept)


def nearest(job: Task, target: float) -> tuple[nn.Module, float]:
    """The costliest network within the target, and the ratio that AIMET was asked for.

    AIMET stops within 0.001 of a ratio, on either side, and its ratios move in steps.
    """
    dense = flops(job.dense())
    low, high = 0.5 / target, min(1.2 / target, 0.999)
    best: tuple[float, nn.Module, float] | None = None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        compact = compressed(job, ratio, lambda *_, **__: 0.0)
        reduction = dense / flops(compact)
        print(f"ratio {ratio:.5f}: {reduction:.4f} times fewer FLOPs", file=sys.stderr)
        if reduction < target:
            high = ratio
            continue
        low = ratio
        if best is None or reduction < best[0]:
            best = reduction, compact, ratio
    if best is None:
        raise SystemExit(f"no ratio gives {target} times fewer FLOPs")
    return best[1], best[2]


def main() -> None:
    job = task("aimet-spatial-svd", "aimet-torch", options(__doc__).parse_args())
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        measure(job)
        for target in job.targets:
            started = time.perf_counter()
            compact, ratio = nearest(job, target)
            settings = {
                "scheme": "spatial_svd",
                "mode": "auto, first convolution ignored",
                "cost_metric": "mac",
                "num_comp_ratio_candidates": 10,
                "use_monotonic_fit": False,
                "multiplicity": 1,
                "target_comp_ratio": round(ratio, 5),
                "images": job.images,
                "seconds": round(time.perf_counter() - started, 1),
            }
            job.finish(compact, target, settings)


if __name__ == "__main__":
    main()
