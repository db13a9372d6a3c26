"""The nuclear norm alone: no projection while training, one truncated SVD at the end."""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, train_low_rank

import rankprune as rp


def nuclear_only(case: Case, *, scheme: str, nuclear: float = 3e-4) -> Result:
    options = rp.TRP(
        # full rank: what is projected does not change
        rank=rp.Ratio(1.0),
        scheme=scheme,
        every=1,
        nuclear=nuclear,
        guard=False,
    )
    model, _ = train_low_rank(case, lambda steps: options)
    plan = rp.make_plan(model.eval(), case.budget, scheme=scheme, example_inputs=case.example)
    rp.project(model, plan)
    return Result(rp.factorize(model, plan), model)


METHODS: dict[str, Method] = {"nuclear-only-spatial": partial(nuclear_only, scheme="spatial")}
