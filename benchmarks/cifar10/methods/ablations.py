"""The recipe with one piece taken out, put in or turned: what each is worth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from case import Case, Method
from torch import Tensor, nn
from torch.nn import functional

import rankprune as rp
from methods.ours import by_outputs, ours
from rankprune.recipes.teacher import Teacher


def by_energy(case: Case, scheme: str) -> rp.Plan:
    """Ranks by the dense network's weights, kept through the run."""
    return case.plan(scheme)


def by_sensitivity(case: Case, scheme: str) -> rp.Plan:
    """... by what errors of its outputs do to the answers."""
    stats = rp.calibrate(case.trained.eval(), case.images, sensitivity=True)
    return case.plan(scheme, stats)


def transfer_energy(controller: rp.Controller) -> None:
    """Scale what a projection has kept to the energy that it had before (LRPET, arXiv 2109.05175).

    A multiple of a matrix has its rank, so the decomposition stays exact.
    """
    modules = dict(controller.model.named_modules())

    @torch.no_grad()
    def scale() -> None:
        for name, energy in controller.energies.items():
            modules[name].weight.mul_(energy**-0.5)

    projecting = controller.project

    def project() -> None:
        projecting()
        scale()

    controller.project = project  # type: ignore[method-assign]


class MixUp(Teacher):
    """Asks the dense network about mixtures of two images (Zhang et al. 2018, arXiv 1710.09412).

    Its answers to images that it knows by heart might teach less than those to mixtures (Beyer et
    al. 2022, arXiv 2106.05237).
    """

    def __call__(
        self, student: nn.Module, inputs: Tensor, labels: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        # a batch comes in random order, so that nothing needs to be drawn
        shares = 0.5 * (torch.arange(len(inputs), device=inputs.device) + 0.5) / len(inputs)
        classes = functional.one_hot(labels, 10).float()
        mixed = classes.lerp(classes.roll(1, 0), shares[:, None])
        return super().__call__(student, self.mixed(inputs, shares), mixed, **options)

    def mixed(self, inputs: Tensor, shares: Tensor) -> Tensor:
        """Inputs [B, ...], each with a share [B] of the one before it."""
        return inputs.lerp(inputs.roll(1, 0), shares.view(-1, 1, 1, 1))


class CutMix(MixUp):
    """Puts a piece of another image into each instead (Yun et al. 2019, arXiv 1905.04899)."""

    def mixed(self, inputs: Tensor, shares: Tensor) -> Tensor:
        sides, numbers = shares.sqrt(), torch.arange(len(inputs), device=inputs.device)
        inside = []
        # places spread evenly (Roberts' sequence)
        for length, step in zip(inputs.shape[2:], (0.7548776662, 0.5698402910), strict=True):
            start = numbers * step % 1 * (1 - sides)
            place = (torch.arange(length, device=inputs.device) + 0.5) / length - start[:, None]
            inside.append((place >= 0) & (place < sides[:, None]))
        piece = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(piece, inputs.roll(1, 0), inputs)


METHODS: dict[str, Method] = {
    "ours-without-tail": partial(ours, tail=0.0),
    "ours-tail-0.25": partial(ours, tail=0.25),
    "ours-tail-0.75": partial(ours, tail=0.75, descent=0.2),
    "ours-descent-0.1": partial(ours, descent=0.1),
    "ours-descent-0.5": partial(ours, descent=0.5),
    "ours-every-1": partial(ours, every=1),
    "ours-every-20": partial(ours, every=20),
    "ours-nuclear": partial(ours, nuclear=3e-4),
    "ours-nuclear-proximal": partial(ours, nuclear=3e-4, nuclear_mode="decoupled"),
    "ours-labels-only": partial(ours, answers=0.0, match=0.0),
    "ours-answers-only": partial(ours, match=0.0),
    "ours-answers-0.5": partial(ours, answers=0.5),
    "ours-answers-1": partial(ours, answers=1.0),
    "ours-temperature-2": partial(ours, temperature=2.0),
    "ours-decay-products": partial(ours, decay_products=True),
    "ours-mixup": partial(ours, teacher=MixUp),
    "ours-cutmix": partial(ours, teacher=CutMix),
    "ours-match-10": partial(ours, match=10.0),
    "ours-by-energy": partial(ours, plan=by_energy),
    "ours-by-outputs": partial(ours, plan=by_outputs),
    "ours-by-sensitivity": partial(ours, plan=by_sensitivity),
    "ours-energy-transfer": partial(ours, after_attach=transfer_energy),
    "ours-channel": partial(ours, scheme="channel"),
    "ours-spatial": partial(ours, scheme="spatial"),
    "ours-decoupled": partial(ours, scheme="decoupled"),
    "ours-depthwise": partial(ours, scheme="depthwise"),
    "ours-separable": partial(ours, scheme="separable"),
    "ours-separable-by-outputs": partial(ours, scheme="separable", plan=by_outputs),
}
