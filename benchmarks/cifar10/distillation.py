"""Losses that make a student answer, and see, as the dense network does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from networks import stages
from torch import Tensor, nn
from torch.nn import functional as F


class Distilled:
    """Cross-entropy of labels and of the teacher's answers, and the error of its stages' outputs.

    Args:
        teacher: the dense network; a copy of it is kept.
        soft: weight of the teacher's answers beside the labels', 0 to 1.
        temperature: of the teacher's answers (Hinton et al. 2015, arXiv 1503.02531).
        match: weight of the stages' relative squared errors (Romero et al. 2015, FitNets, arXiv
            1412.6550, with all stages at once and no regressor: the shapes are the same).
    """

    def __init__(
        self, teacher: nn.Module, *, soft: float = 0.9, temperature: float = 4.0, match: float = 0.0
    ) -> None:
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.soft, self.temperature, self.match = soft, temperature, match
        self.stages = stages(teacher) if match else []

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), _watching(self.teacher, self.stages) as theirs:
            wanted = self.teacher(images).float()
        with _watching(model, self.stages) as ours:
            answers = model(images).float()
        heat = self.temperature
        loss = (1 - self.soft) * F.cross_entropy(answers, labels)
        loss = loss + self.soft * heat**2 * F.kl_div(
            (answers / heat).log_softmax(1),
            (wanted / heat).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        if self.match:
            pairs = zip(ours, theirs, strict=True)
            errors = [(a - b).float().square().mean() / b.float().square().mean() for a, b in pairs]
            loss = loss + self.match * torch.stack(errors).mean()
        return loss


@contextlib.contextmanager
def _watching(model: nn.Module, names: list[str]) -> Iterator[list[Tensor]]:
    """Outputs of some modules, in the order of their calls."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
