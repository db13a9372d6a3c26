"""How often the dense network is right on images kept back, by the views that it answers to.

    .venv/bin/python benchmarks/cifar10/views.py --data DIR --weights FILE --model resnet20

Writes views.json beside itself. The weights should not have seen the images: those that
`run.py --method dense --out FILE` makes have not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _harness import conditions  # noqa: E402
from images import load, normalise  # noqa: E402
from networks import NETWORKS, build  # noqa: E402


def shifted(images: Tensor, pixels: int) -> Tensor:
    """Down and to the right, over black borders as in training."""
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    width = abs(pixels)
    padded = functional.pad(images - black, [width] * 4) + black
    start = width - pixels
    return padded[:, :, start : start + images.shape[2], start : start + images.shape[3]]


VIEWS = {
    "the image": lambda x: x,
    "its mirror image": lambda x: x.flip(3),
    "shifted": lambda x: shifted(x, 2),
    "mirrored and shifted": lambda x: shifted(x.flip(3), -2),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet20")
    args = parser.parse_args()
    part, model = load(args.data).validation, build(args.model, args.weights, 0).eval()
    answers: dict[str, list[Tensor]] = {name: [] for name in VIEWS}
    for images, _ in part.batches():
        for name, view in VIEWS.items():
            answers[name].append(model(view(images)))
    logits = {name: torch.cat(parts) for name, parts in answers.items()}
    names = list(VIEWS)
    found = {}
    for group in (names[:1], names[1:2], names[:2], [names[0], names[2]], names):
        right = sum(logits[name] for name in group).argmax(1) == part.labels  # type: ignore[union-attr]
        found[" + ".join(group)] = round(100 * right.double().mean().item(), 2)
    result = {"model": args.model, "start": args.weights.stem, "accuracy": found, **conditions()}
    (HERE / "views.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
