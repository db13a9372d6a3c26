"""One file a method; `METHODS` has them by the names in results.json."""

from __future__ import annotations

from case import Method

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

#: Without training: their rows have 0 epochs.
UNTRAINED = set(one_shot.METHODS)
#: Whatever FLOPs come of them: their rows have no target.
UNTARGETED = {*dense.METHODS, *trp_paper.METHODS, *trp_authors.METHODS}
#: The dense network teaches: their rows say by how many views of an image.
TAUGHT = {
    name for name in METHODS if "distilled" in name or "matched" in name or name.startswith("ours")
} - {"ours-labels-only"}
