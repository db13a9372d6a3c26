"""TRP to a budget, as `rankprune train` does it."""

from __future__ import annotations

from collections.abc import Callable

from case import Case, Method, Result, train_low_rank
from loop import labels_only, train

import rankprune as rp
from rankprune.recipes.config import MATCH, SOFT, TrainConfig
from rankprune.recipes.teacher import TEMPERATURE, Teacher

DEFAULT = TrainConfig.model_fields


def by_outputs(case: Case, scheme: str) -> rp.Plan:
    """Ranks by the errors of the dense network's layers' outputs."""
    return case.plan(scheme, rp.calibrate(case.trained.eval(), case.images))


def ours(
    case: Case,
    *,
    scheme: str = DEFAULT["scheme"].default,
    descent: float = DEFAULT["descent"].default,
    tail: float = DEFAULT["tail"].default,
    every: int = DEFAULT["every"].default,
    nuclear: float = DEFAULT["nuclear"].default,
    nuclear_mode: str = DEFAULT["nuclear_mode"].default,
    match: float = MATCH,
    plan: Callable[[Case, str], rp.Plan] | None = None,
    after_attach: Callable[[rp.Controller], None] | None = None,
    answers: float = SOFT,
    temperature: float = TEMPERATURE,
    teacher: type[Teacher] = Teacher,
    decay_products: bool = False,
) -> Result:
    """The budget comes down from the dense network's over the first part of the run.

    Args:
        case: the task.
        scheme: as in `make_plan`.
        descent: share of the run over which the budget comes down.
        tail: share of the run, at its end, in which the factors are trained.
        every: period of the projections before.
        nuclear: weight of the nuclear norm before.
        nuclear_mode: as in `TRP`.
        match: weight of its blocks' outputs.
        plan: fixed ranks to come down to, instead of a budget that is spent anew on the way.
        after_attach: gets the controller.
        answers: weight of the dense network's answers beside the labels'; without them and `match`
            there is no teacher.
        temperature: of those answers.
        teacher: what makes the loss of them.
        decay_products: weight decay of the factors' products at the end, not of the factors.
    """
    loss = case.taught(match, answers, temperature, teacher) if answers or match else labels_only
    fixed = None if plan is None else plan(case, scheme)

    def options(steps: int) -> rp.TRP:
        return rp.TRP(
            rank=case.budget if fixed is None else None,
            plan=fixed,
            scheme=scheme if fixed is None else "auto",
            every=every,
            nuclear=nuclear,
            nuclear_mode=nuclear_mode,
            descent=round(steps * descent / (1 - tail)),
        )

    model, reached = train_low_rank(
        case, options, span=(0.0, 1 - tail), loss=loss, after_attach=after_attach
    )
    compact = rp.factorize(model, reached)
    if not tail:
        return Result(compact, model)
    train(
        compact,
        case.data,
        case.training,
        span=(1 - tail, 1.0),
        loss=loss,
        decay_products=decay_products,
    )
    return Result(compact, rp.defactorize(compact))


METHODS: dict[str, Method] = {"ours": ours}
