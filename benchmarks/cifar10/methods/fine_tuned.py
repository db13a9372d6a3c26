"""Truncated SVD of the trained network, then its factors are trained: what TRP claims to spare."""

from __future__ import annotations

from functools import partial

from case import Case, Method, Result, decompose
from loop import labels_only, train

from methods.ours import by_outputs
from rankprune.recipes.config import MATCH


def fine_tuned(
    case: Case, *, scheme: str, soft: bool = False, match: float = 0.0, aware: bool = False
) -> Result:
    """`soft` learns from the dense network's answers too, `match` from its blocks' outputs.

    `aware` chooses ranks by the errors of the layers' outputs.
    """
    compact = decompose(case, by_outputs(case, scheme) if aware else case.plan(scheme), bn=True)
    loss = case.taught(match) if soft else labels_only
    train(compact, case.data, case.training, loss=loss)
    return Result(compact)


METHODS: dict[str, Method] = {
    "svd-fine-tuned-channel": partial(fine_tuned, scheme="channel"),
    "svd-fine-tuned-spatial": partial(fine_tuned, scheme="spatial"),
    "svd-distilled-spatial": partial(fine_tuned, scheme="spatial", soft=True),
    "svd-matched-spatial": partial(fine_tuned, scheme="spatial", soft=True, match=MATCH),
    "svd-fine-tuned-auto": partial(fine_tuned, scheme="auto"),
    "svd-distilled-auto": partial(fine_tuned, scheme="auto", soft=True),
    "svd-matched-auto": partial(fine_tuned, scheme="auto", soft=True, match=MATCH),
    "svd-fine-tuned-separable": partial(fine_tuned, scheme="separable"),
    "svd-distilled-separable": partial(fine_tuned, scheme="separable", soft=True),
    "svd-matched-separable": partial(fine_tuned, scheme="separable", soft=True, match=MATCH),
    **{
        f"svd-matched-aware-{scheme}": partial(
            fine_tuned, scheme=scheme, soft=True, match=MATCH, aware=True
        )
        for scheme in ("auto", "separable", "depthwise")
    },
    "svd-matched-depthwise": partial(fine_tuned, scheme="depthwise", soft=True, match=MATCH),
    "svd-matched-decoupled": partial(fine_tuned, scheme="decoupled", soft=True, match=MATCH),
}
