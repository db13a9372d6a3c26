"""Training a compact model to answer as the dense one does, on inputs without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.attach import attach
from rankprune.calibrate import mask_of, moved
from rankprune.errors import ConfigError, NumericsError
from rankprune.options import TRP
from rankprune.plan import Plan
from rankprune.profile import call

Match = Callable[[Any, Any, Tensor | None], Tensor]


def match_logits(
    student: Any, teacher: Any, mask: Tensor | None, *, temperature: float = 1.0
) -> Tensor:
    """KL divergence of the student's distribution from the teacher's (Hinton et al. 2015,
    arXiv 1503.02531), averaged over positions, times the temperature's square.

    Args:
        student: its output with `logits` [..., classes], or logits themselves.
        teacher: the same.
        mask: [B, T], to leave padding out; None takes all positions.
        temperature: by which logits are divided first: above 1 the unlikely classes count more.
    """
    ours = (_part(student, "logits").float() / temperature).log_softmax(-1)
    theirs = (_part(teacher, "logits").float() / temperature).log_softmax(-1)
    return temperature**2 * _mean((theirs.exp() * (theirs - ours)).sum(-1), mask)


def match_hidden(student: Any, teacher: Any, mask: Tensor | None) -> Tensor:
    """Squared error of the last hidden state, relative to the teacher's variance over features.

    Args:
        student: its output with `last_hidden_state` [B, T, C], or such states themselves.
        teacher: the same.
        mask: [B, T], to leave padding out; None takes all positions.
    """
    ours = _part(student, "last_hidden_state").float()
    theirs = _part(teacher, "last_hidden_state").float()
    scale = theirs.var(-1).mean().clamp_min(torch.finfo(torch.float32).tiny)
    return _mean((ours - theirs).square().mean(-1), mask) / scale


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Options of `distill`.

    Attributes:
        lr: peak learning rate of AdamW; it rises over the first tenth, then falls as a cosine.
        weight_decay: of AdamW.
        match: how the outputs are compared.
        clip: largest norm of the gradient.
        accumulate: batches in a step.
        bf16: forward passes in bfloat16.
        trp: projects during training; the student is then a dense model.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    match: Match = match_logits
    clip: float = 1.0
    accumulate: int = 1
    bf16: bool = False
    trp: TRP | None = None


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    options: Distillation | None = None,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> Plan | None:
    """Train the student, in place, to match the teacher's outputs.

    Args:
        student: a factorised model; with `trp` a dense one, to be factorised by the plan that
            comes back.
        teacher: the dense model, on the same device; it is not changed.
        batches: as in `calibrate`; all of them once, in their order.
        options: how.
        progress: called after each step with its number and its loss.

    Returns:
        With `trp` the plan that was reached.

    Raises:
        ConfigError: no batches.
        NumericsError: the loss became NaN or infinity.
    """
    options = options or Distillation()
    batches = list(batches)
    if not batches:
        raise ConfigError("no batches to distil with")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
    steps = math.ceil(len(batches) / options.accumulate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    controller = None if options.trp is None else attach(student, optimizer, options.trp)
    teacher.eval()
    student.train()
    try:
        for index, batch in enumerate(moved(batches, student)):
            mask = mask_of(batch)
            device = next(iter(trained)).device.type
            with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
                with torch.no_grad():
                    target = call(teacher, batch)
                loss = options.match(call(student, batch), target, mask)
            if not torch.isfinite(loss):
                raise NumericsError(
                    f"distillation diverged at batch {index}; lower lr={options.lr}"
                )
            left = min(
                options.accumulate, len(batches) - index // options.accumulate * options.accumulate
            )
            (loss / left).backward()
            if (index + 1) % options.accumulate == 0 or index + 1 == len(batches):
                torch.nn.utils.clip_grad_norm_(trained, options.clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if progress is not None:
                    progress(index // options.accumulate + 1, float(loss.detach()))
    except BaseException:
        if controller is not None:
            controller.detach()
        raise
    finally:
        student.eval()
    return None if controller is None else controller.finish()


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _part(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, name, None)
    if not isinstance(found, Tensor):
        raise ConfigError(f"the model's output ({type(output).__name__}) has no {name}")
    return found


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    weights = mask.to(values)
    return (values * weights).sum() / weights.sum().clamp_min(1)
