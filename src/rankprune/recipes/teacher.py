"""A dense network that another one learns from: its answers, and what its blocks return."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.recipes.config import MATCH, SOFT
from rankprune.recipes.distill import match_logits
from rankprune.survey import survey

TEMPERATURE = 4.0


class Teacher:
    """Makes the loss of a student that has the dense network's blocks, factorised or projected.

    Args:
        model: the dense network, put into eval mode; it is not trained.
        soft: weight of its answers beside the labels', 0 to 1.
        match: weight of the blocks' relative squared errors, averaged over blocks (Romero et al.
            2015, arXiv 1412.6550; no regressors, for the student's blocks have the same shapes).
        temperature: of the answers (Hinton et al. 2015, arXiv 1503.02531).
        mirrored: answers are the mean of those to an image and to its mirror image, which are more
            often right: for images that are mirrored in training.

    Example:
        >>> import copy
        >>> def block():
        ...     return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> dense = nn.Sequential(block(), block(), nn.Linear(8, 3))
        >>> student = copy.deepcopy(dense)
        >>> inputs, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
        >>> loss, logits = Teacher(dense, soft=1.0, match=1.0)(student, inputs, labels)
        >>> round(loss.item(), 6)
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        soft: float = SOFT,
        match: float = MATCH,
        temperature: float = TEMPERATURE,
        mirrored: bool = False,
    ) -> None:
        self.model = model.eval()
        self.soft, self.match, self.temperature = soft, match, temperature
        self.mirrored = mirrored
        self.blocks = blocks(model) if match else []

    def __call__(
        self,
        student: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        bare: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the student's logits.

        Args:
            student: what is called; may be wrapped.
            inputs: a batch.
            labels: classes [B].
            label_smoothing: of the labels' part.
            bare: the student without its wrappers, in which the blocks have their names.
        """
        with torch.no_grad(), _outputs(self.model, self.blocks) as theirs:
            answers = self.model(inputs)
        if self.mirrored:
            with torch.no_grad():
                answers = (answers + self.model(inputs.flip(-1))) / 2
        with _outputs(student if bare is None else bare, self.blocks) as ours:
            logits = student(inputs)
        hard = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        distance = match_logits(logits, answers, None, temperature=self.temperature)
        loss = (1 - self.soft) * hard + self.soft * distance
        if theirs:
            errors = [_relative_error(ours[name], theirs[name]) for name in theirs]
            loss = loss + self.match * torch.stack(errors).mean()
        return loss, logits


def blocks(model: nn.Module) -> list[str]:
    """Names of the innermost modules with two layers or more that can be factorised.

    The model itself is none: its output is its answers.
    """
    counts: Counter[str] = Counter()
    for site in survey(model):
        if site.spec is not None and not site.obstacle:
            parts = site.name.split(".")
            counts.update(".".join(parts[:end]) for end in range(1, len(parts)))
    several = [name for name, count in counts.items() if count > 1]
    return [name for name in several if not any(other.startswith(f"{name}.") for other in several)]


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    energy = norm(theirs).square().clamp_min(torch.finfo(torch.float32).tiny)
    return norm(ours - theirs).square() / energy


@contextlib.contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What some modules return, where that is a tensor."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    handles = [
        model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
