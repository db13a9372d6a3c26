"""The one training loop of the comparison: same images, same schedule, same precision for all."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from images import Cifar
from torch import Tensor, nn
from torch.nn import functional as F

from rankprune.low_rank import LowRank, low_rank_layers

#: Images, labels and the model to the loss.
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
#: Images and labels to the loss; afterwards the gradients are there.
Pass = Callable[[Tensor, Tensor], Tensor]


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
    lr: float = 0.05
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
    decay_products: bool = False,
) -> None:
    """Train in place, in fresh momentum, over a part of the schedule.

    Args:
        model: in training mode afterwards; on a GPU its pass is captured as a CUDA graph.
        data: of which the training part is used, on the model's device.
        training: what all methods get alike.
        span: from which share of the run to which; a method of two phases calls twice.
        loss: what is minimised.
        attach: called with the optimizer and the number of steps of the span, before the first.
        decay_products: weight decay of the factors' product instead of the factors (Frobenius
            decay; Khodak et al. 2021, arXiv 2105.01029).
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = training.steps(data)
    each = total // training.epochs
    first, last = (round(share * total) for share in span)
    device = data.train.labels.device
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if decay_products:
        layers = low_rank_layers(model).values()
        factors = dict.fromkeys(weight for layer in layers for weight in _factors(layer))
        groups = [
            {"params": [w for w in model.parameters() if w not in factors]},
            {"params": list(factors), "weight_decay": 0.0},
        ]
        loss = _with_decay(loss, training.weight_decay)
    optimizer = torch.optim.SGD(
        groups,
        training.lr,
        0.9,
        weight_decay=training.weight_decay,
        nesterov=True,
        fused=device.type == "cuda",
    )
    if attach is not None:
        attach(optimizer, last - first)
    started, losses = time.perf_counter(), torch.zeros((), device=device)
    model.train()
    compute: Pass | None = None
    for epoch in range(first // each, math.ceil(last / each)):
        for index, (images, labels) in enumerate(
            data.train.epoch(training.batch, training.seed, epoch)
        ):
            step = epoch * each + index
            if not first <= step < last:
                continue
            if compute is None:
                compute = _pass(model, loss, training, images, labels)
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step / total)
            losses += compute(images, labels)
            optimizer.step()
        minutes = (time.perf_counter() - started) / 60
        done = min(last, (epoch + 1) * each)
        mean = losses.item() / max(1, done - max(first, epoch * each))
        if not math.isfinite(mean):
            raise FloatingPointError(f"epoch {done / each:.2f}: the loss is {mean}")
        if done == last or not (epoch + 1) % max(1, training.epochs // 10):
            print(f"  epoch {done / each:.2f}: loss {mean:.4f}, {minutes:.1f} min", file=sys.stderr)
        losses.zero_()
    for parameter in model.parameters():
        parameter.grad = None  # a graph's lies in its own memory


def _pass(model: nn.Module, loss: Loss, training: Training, images: Tensor, labels: Tensor) -> Pass:
    """Forward and backward pass, in bfloat16 where asked."""

    def compute(images: Tensor, labels: Tensor) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        kind = images.device.type
        # a graph must not read weights that autocast has converted before it
        half = torch.autocast(kind, torch.bfloat16, enabled=training.bf16, cache_enabled=False)
        with _composed(model), half:
            value = loss(model, images, labels)
        value.backward()
        return value.detach()

    return _captured(compute, model, images, labels) if images.is_cuda else compute


def _factors(layer: LowRank) -> list[nn.Parameter]:
    return [factor.weight for factor in (layer[0], layer[1])]  # type: ignore[misc]


def _with_decay(loss: Loss, weight_decay: float) -> Loss:
    """And the energy of the factors' products, as SGD's weight decay counts that of weights."""

    def both(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            energies = [x.product().square().sum() for x in low_rank_layers(model).values()]
        return loss(model, images, labels) + 0.5 * weight_decay * torch.stack(energies).sum()

    return both


def _captured(compute: Pass, model: nn.Module, images: Tensor, labels: Tensor) -> Pass:
    """The same as a CUDA graph: of small layers, launching is what takes the time."""
    images, labels = images.clone(memory_format=torch.preserve_format), labels.clone()
    kept = [buffer.clone() for buffer in model.buffers()]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and workspaces
            compute(images, labels)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        value = compute(images, labels)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():  # BatchNorm's statistics have seen the batch too often
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)

    def replay(new_images: Tensor, new_labels: Tensor) -> Tensor:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return value

    return replay


@contextlib.contextmanager
def _composed(model: nn.Module) -> Iterator[None]:
    """Compute factorised convolutions as the dense ones that they are.

    The gradients are the factors' own. Two narrow convolutions take several times as long as a
    dense one of so few channels, forwards and backwards.
    """
    layers = [layer for layer in low_rank_layers(model).values() if isinstance(layer[1], nn.Conv2d)]
    for layer in layers:
        layer.forward = partial(_dense, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _dense(layer: LowRank, inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        weight = layer.product()
    return F.conv2d(
        inputs, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def calibration(data: Cifar, count: int = 2048, batch: int = 256) -> list[Tensor]:
    """Images as they are trained on, to calibrate or to estimate BatchNorm with.

    With images that are not augmented, BatchNorm's new statistics cost the dense ResNet-20 itself
    4 points.
    """
    batches = data.train.epoch(min(batch, len(data.train)), seed=0, epoch=0)
    return [images for images, _ in itertools.islice(batches, count // batch)]
