"""Truncated SVD of the trained network, without any training."""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, decompose

import rankprune as rp


def one_shot(case: Case, *, scheme: str, bn: bool = False, aware: bool = False) -> Result:
    """Ranks and factors by the weights alone, or by the errors of the layers' outputs."""
    stats = rp.calibrate(case.trained.eval(), case.images) if aware else None
    return Result(decompose(case, case.plan(scheme, stats), stats=stats, bn=bn))


METHODS: dict[str, Method] = {
    "one-shot-channel": partial(one_shot, scheme="channel"),
    "one-shot-spatial": partial(one_shot, scheme="spatial"),
    "one-shot-channel+bn": partial(one_shot, scheme="channel", bn=True),
    "one-shot-spatial+bn": partial(one_shot, scheme="spatial", bn=True),
    "one-shot-auto+bn": partial(one_shot, scheme="auto", bn=True),
    "aware-channel+bn": partial(one_shot, scheme="channel", bn=True, aware=True),
    "aware-spatial": partial(one_shot, scheme="spatial", aware=True),
    "aware-spatial+bn": partial(one_shot, scheme="spatial", bn=True, aware=True),
    "aware-auto+bn": partial(one_shot, scheme="auto", bn=True, aware=True),
}
