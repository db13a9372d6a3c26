"""TRP to a budget, as `rankprune train` does it: the recipe, and what it is without each piece."""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, train_low_rank
from loop import labels_only, train

import rankprune as rp
from rankprune.recipes.config import TrainConfig

DEFAULT = TrainConfig.model_fields


def ours(
    case: Case,
    *,
    scheme: str = "spatial",
    descent: float = DEFAULT["descent"].default,
    tail: float = DEFAULT["tail"].default,
    every: int = DEFAULT["every"].default,
    nuclear: float = DEFAULT["nuclear"].default,
    soft: bool = True,
    match: float = DEFAULT["match"].default,
) -> Result:
    """The budget comes down from the dense network's over the first part of the run.

    Args:
        case: the task.
        scheme: of all layers.
        descent: share of the run over which the budget comes down.
        tail: share of the run, at its end, in which the factors are trained.
        every: period of the projections before.
        nuclear: weight of the nuclear norm before.
        soft: learn from the dense network's answers.
        match: weight of its blocks' outputs.
    """
    loss = case.taught(match) if soft else labels_only

    def options(steps: int) -> rp.TRP:
        return rp.TRP(
            rank=case.budget,
            scheme=scheme,
            every=every,
            nuclear=nuclear,
            descent=round(steps * descent / (1 - tail)),
        )

    model, plan = train_low_rank(case, options, span=(0.0, 1 - tail), loss=loss)
    compact = rp.factorize(model, plan)
    if not tail:
        return Result(compact, model)
    train(compact, case.data, case.training, span=(1 - tail, 1.0), loss=loss)
    return Result(compact, rp.defactorize(compact))


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours-without-tail": partial(ours, tail=0.0),
}
