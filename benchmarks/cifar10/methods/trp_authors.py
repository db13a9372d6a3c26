"""TRP as the authors' code does it: 90 % of the energy at every step, whatever that leads to."""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, train_low_rank

import rankprune as rp


def authors(case: Case, *, scheme: str) -> Result:
    options = rp.TRP(rank=rp.Energy(0.9), scheme=scheme, every=1, nuclear=3e-4)
    model, plan = train_low_rank(case, lambda steps: options)
    return Result(rp.factorize(model, plan), model)


METHODS: dict[str, Method] = {
    f"trp-authors-{scheme}": partial(authors, scheme=scheme) for scheme in ("channel", "spatial")
}
