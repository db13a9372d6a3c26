"""The recipe with one piece taken out, put in or turned: what each is worth."""

from __future__ import annotations

from functools import partial

import torch
from case import Case, Method
from torch import Tensor

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


class CutMix(Teacher):
    """Puts a piece of another image into each instead (Yun et al. 2019, arXiv 1905.04899)."""

    def mixed(self, inputs: Tensor, shares: Tensor) -> Tensor:
        count, _, height, width = inputs.shape
        numbers = torch.arange(count, device=inputs.device)
        size = shares.sqrt()  # of the piece's sides
        # places spread evenly (Roberts' sequence); the order of a batch is random as it is
        top, left = (
            numbers * 0.7548776662 % 1 * (1 - size),
            numbers * 0.5698402910 % 1 * (1 - size),
        )
        rows, columns = (
            ((torch.arange(n, device=inputs.device) + 0.5) / n - start[:, None]).div(size[:, None])
            for n, start in ((height, top), (width, left))
        )
        inside = [(x >= 0) & (x < 1) for x in (rows, columns)]
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
    "ours-mix-0.2": partial(ours, mix=0.2),
    "ours-mix-0.5": partial(ours, mix=0.5),
    "ours-mix-0.5-answers-1": partial(ours, mix=0.5, answers=1.0),
    "ours-cutmix-0.2": partial(ours, mix=0.2, teacher=CutMix),
    "ours-cutmix-0.5": partial(ours, mix=0.5, teacher=CutMix),
    "ours-cutmix-0.5-answers-1": partial(ours, mix=0.5, answers=1.0, teacher=CutMix),
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
