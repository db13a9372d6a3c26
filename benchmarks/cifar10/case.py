"""What a method gets, and what it gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from images import Cifar
from loop import Loss, Training, calibration, labels_only, train
from torch import Tensor, nn

import rankprune as rp
from rankprune.recipes.config import SOFT
from rankprune.recipes.teacher import TEMPERATURE, Teacher


@dataclass(frozen=True)
class Case:
    """One row's task.

    Attributes:
        trained: the dense network that all methods start from.
        data: the data set.
        training: what all methods get alike.
        target: FLOPs of the dense network / FLOPs asked for.
        network: name of the dense network in `NETWORKS`.
        source: where the data set was read from, for peers to read it themselves.
        mirrored: whether the dense network, where it teaches, answers to mirror images as well.
    """

    trained: nn.Module
    data: Cifar
    training: Training
    target: float
    network: str
    source: str
    mirrored: bool = True

    @property
    def example(self) -> Tensor:
        """To count FLOPs with."""
        return torch.zeros(1, 3, 32, 32, device=self.data.train.labels.device)

    @property
    def budget(self) -> rp.Budget:
        """The target as a budget."""
        return rp.Budget(flops=1 / self.target)

    @cached_property
    def images(self) -> list[Tensor]:
        """Training images to calibrate with."""
        return calibration(self.data)

    def dense(self) -> nn.Module:
        """A copy of the dense network."""
        return copy.deepcopy(self.trained)

    def taught(
        self,
        match: float = 0.0,
        answers: float = SOFT,
        temperature: float = TEMPERATURE,
        kind: type[Teacher] = Teacher,
    ) -> Loss:
        """Learning from the dense network's answers, and from its blocks' outputs."""
        teacher = kind(
            self.dense(),
            soft=answers,
            match=match,
            temperature=temperature,
            mirrored=self.mirrored,
        )
        return lambda model, images, labels: teacher(model, images, labels)[0]

    def plan(self, scheme: str, stats: rp.Stats | None = None) -> rp.Plan:
        """Ranks for the budget, from the dense network as it is."""
        return rp.make_plan(
            self.trained.eval(),
            self.budget,
            scheme=scheme,
            example_inputs=self.example,
            stats=stats,
        )


@dataclass(frozen=True)
class Result:
    """What a method made.

    Attributes:
        compact: the small network.
        projected: the network of dense layers that it was made of, where there is one.
    """

    compact: nn.Module
    projected: nn.Module | None = None


Method = Callable[[Case], Result]


def decompose(case: Case, plan: rp.Plan, *, stats: rp.Stats | None = None, bn: bool) -> nn.Module:
    """The trained network's factors; BatchNorm is estimated anew where `bn` says so."""
    compact = rp.factorize(case.dense(), plan, stats=stats)
    return rp.recalibrate_bn(compact, case.images) if bn else compact


def train_low_rank(
    case: Case,
    options: Callable[[int], rp.TRP],
    *,
    span: tuple[float, float] = (0.0, 1.0),
    loss: Loss = labels_only,
    after_attach: Callable[[rp.Controller], None] | None = None,
) -> tuple[nn.Module, rp.Plan]:
    """Train the dense network by TRP.

    Args:
        case: the task.
        options: the number of steps to the options.
        span: part of the schedule.
        loss: what is minimised.
        after_attach: gets the controller before the first step.

    Returns:
        The dense network, projected a last time, and the plan that was reached.
    """
    model = case.dense()
    controllers = []

    def attach(optimizer: torch.optim.Optimizer, steps: int) -> None:
        trp = options(steps)
        controllers.append(rp.attach(model, optimizer, trp, example_inputs=case.example))
        if after_attach is not None:
            after_attach(controllers[0])

    train(model, case.data, case.training, span=span, loss=loss, attach=attach)
    return model, controllers[0].finish()
