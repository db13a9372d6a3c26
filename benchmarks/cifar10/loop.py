"""The one training loop of the comparison: same images, same schedule, same precision for all.

Imports nothing of rankprune: peers are trained by it in environments of their own.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from images import Cifar, Part
from torch import Tensor, nn
from torch.nn import functional as F

#: Images, labels and the model to the loss.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def labels_only(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(images).float(), labels)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every method gets alike.

    Attributes:
        epochs: passes over the 45,000 training images.
        lr: the peak of a one-cycle schedule: up over the first 15 %, then down as a cosine.
        weight_decay: of SGD with Nesterov momentum 0.9.
        batch: images of a step.
        seed: of order and augmentation.
        bf16: forward passes in bfloat16.
    """

    epochs: int = 6
    lr: float = 0.03
    weight_decay: float = 1e-4
    batch: int = 128
    seed: int = 0
    bf16: bool = True

    def steps(self, data: Cifar) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * (len(data.train) // self.batch)

    def rate(self, share: float) -> float:
        """Learning rate when this share of the run is done."""
        if share < 0.15:
            return self.lr * (0.04 + 0.96 * share / 0.15)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (share - 0.15) / 0.85))


def train(
    model: nn.Module,
    data: Cifar,
    training: Training,
    *,
    span: tuple[float, float] = (0.0, 1.0),
    loss: Loss = labels_only,
    attach: Callable[[torch.optim.Optimizer, int], None] | None = None,
) -> None:
    """Train in place, in fresh momentum, over a part of the schedule.

    Args:
        model: in training mode afterwards.
        data: of which the training part is used.
        training: what all methods get alike.
        span: from which share of the run to which; a method of two phases calls twice.
        loss: what is minimised.
        attach: called with the optimizer and the number of steps of the span, before the first.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = training.steps(data)
    each = total // training.epochs
    first, last = (round(share * total) for share in span)
    optimizer = torch.optim.SGD(
        model.parameters(), training.lr, 0.9, weight_decay=training.weight_decay, nesterov=True
    )
    if attach is not None:
        attach(optimizer, last - first)
    started, losses = time.perf_counter(), 0.0
    model.train()
    for epoch in range(first // each, math.ceil(last / each)):
        for index, (images, labels) in enumerate(
            data.train.epoch(training.batch, training.seed, epoch)
        ):
            step = epoch * each + index
            if not first <= step < last:
                continue
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step / total)
            with torch.autocast("cpu", torch.bfloat16, enabled=training.bf16):
                value = loss(model, images, labels)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += value.item()
            if not math.isfinite(losses):
                raise SystemExit(f"step {step}: the loss is {value.item()}")
        minutes = (time.perf_counter() - started) / 60
        done = min(last, (epoch + 1) * each)
        mean = losses / max(1, done - max(first, epoch * each))
        print(f"  epoch {done / each:.2f}: loss {mean:.4f}, {minutes:.1f} min", file=sys.stderr)
        losses = 0.0


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Accuracy in percent, in fp32."""
    was = model.training
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in part.batches())
    model.train(was)
    return 100 * hits / len(part)


def calibration(data: Cifar, count: int = 2048, batch: int = 256) -> list[Tensor]:
    """Images as they are trained on, to calibrate or to estimate BatchNorm with.

    With images that are not augmented, BatchNorm's new statistics cost the dense ResNet-20 itself
    4 points.
    """
    batches = data.train.epoch(min(batch, len(data.train)), seed=0, epoch=0)
    return [images for images, _ in itertools.islice(batches, count // batch)]
