"""One file a method; `METHODS` has them by the names in results.json."""

from __future__ import annotations

from dataclasses import replace

from case import Case, Method, Result
from means import ONE_VIEW

from methods import (
    ablations,
    dense,
    fine_tuned,
    nuclear_only,
    one_shot,
    ours,
    peers,
    trp_authors,
    trp_paper,
)


def one_view(method: Method) -> Method:
    """The dense network that teaches answers to each image alone, not to its mirror image too."""

    def run(case: Case) -> Result:
        return method(replace(case, mirrored=False))

    return run


METHODS: dict[str, Method] = {
    **dense.METHODS,
    **one_shot.METHODS,
    **fine_tuned.METHODS,
    **nuclear_only.METHODS,
    **trp_paper.METHODS,
    **trp_authors.METHODS,
    **ours.METHODS,
    **ablations.METHODS,
    **peers.METHODS,
}
METHODS |= {
    name + ONE_VIEW: one_view(method)
    for module in (fine_tuned, ours, ablations)
    for name, method in module.METHODS.items()
}

#: Without training: their rows have 0 epochs.
UNTRAINED = set(one_shot.METHODS)
#: Whatever FLOPs come of them: their rows have no target.
UNTARGETED = {*dense.METHODS, *trp_paper.METHODS, *trp_authors.METHODS}
