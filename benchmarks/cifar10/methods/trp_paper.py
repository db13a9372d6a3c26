"""TRP as the paper has it: 98 % of the energy, every 20 steps, with and without the nuclear norm.

Source: Xu et al. 2019, arXiv 1910.04576, section 4.1 (e = 0.02, m = 20, λ = 3e-4). An energy has no
target in FLOPs: the reduction is what comes of it.
"""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, train_low_rank

import rankprune as rp


def paper(case: Case, *, scheme: str, nuclear: float, keep: float = 0.98) -> Result:
    options = rp.TRP(rank=rp.Energy(keep), scheme=scheme, every=20, nuclear=nuclear)
    model, plan = train_low_rank(case, lambda steps: options)
    return Result(rp.factorize(model, plan), model)


METHODS: dict[str, Method] = {
    f"trp-paper-{scheme}{suffix}": partial(paper, scheme=scheme, nuclear=nuclear)
    for scheme in ("channel", "spatial", "decoupled")
    for suffix, nuclear in (("", 0.0), ("+nuclear", 3e-4))
}
