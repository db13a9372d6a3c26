"""What a run comes down to: its budget or rule as TRP's options, or a plan made beforehand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from rankprune.budget import Budget
from rankprune.calibrate import calibrate
from rankprune.options import TRP
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.recipes.batches import Normalise, train_batches
from rankprune.recipes.config import TrainConfig
from rankprune.recipes.data import ImageData


def plan_by_outputs(config: TrainConfig, data: ImageData, model: nn.Module) -> Plan | None:
    """A budget, spent by the errors of the outputs of a trained network's layers.

    In every process of a distributed run it is the first one's plan. None where the run does not
    start from a trained network, or the errors of the weights are to decide.
    """
    if not config.images_to_calibrate():
        return None
    device = next(model.parameters()).device
    plan = make_plan(
        model,
        config.target(),
        scheme=config.schemes(),
        example_inputs=example_inputs(data, device, batch=config.batch),
        stats=calibrate(model, _images(config, data, device)),
        multiple_of=config.multiple_of,
        runtime=config.runtime(),
    )
    (text,) = broadcast_object_list([plan.to_json()])
    return Plan.from_json(text)


def _images(config: TrainConfig, data: ImageData, device: torch.device) -> Iterator[Tensor]:
    """As they are trained on."""
    size = min(config.batch_size, len(data.train))
    batches = train_batches(data, batch=size, seed=config.seed, epoch=0, augment=config.augment)
    normalise = Normalise(data, device)
    for pixels, _ in itertools.islice(batches, math.ceil(config.images_to_calibrate() / size)):
        yield normalise(pixels)


def trp_options(config: TrainConfig, total: int, goal: Plan | None) -> TRP:
    """The TRP options of a run of this many steps, to a plan where there is one already."""
    target = config.target()
    options = TRP(
        rank=target,
        scheme=config.schemes(),
        multiple_of=config.multiple_of,
        runtime=config.runtime(),
        every=config.every,
        start=round(config.start * total),
        descent=round(config.descent * total) if isinstance(target, Budget) else 0,
        nuclear=config.nuclear,
        nuclear_mode=config.nuclear_mode,
        nuclear_when=config.nuclear_when,
    )
    if goal is None:
        return options
    return replace(options, rank=None, plan=goal, scheme="auto", multiple_of=None, runtime=None)


def example_inputs(data: ImageData, device: torch.device | str = "cpu", batch: int = 1) -> Tensor:
    """Blank images, to count FLOPs and to measure with."""
    return torch.zeros(batch, *data.shape, device=device)
