"""Torch-Pruning's group magnitude pruning, one shot, to a FLOPs budget.

    .venv-torch-pruning/bin/python torch_pruning_magnitude.py resnet18 --out resnet18.onnx

Channels lost by one layer are lost by all that share them (DepGraph), widths are multiples of 8
unless told otherwise, the classifier's classes stay. The pruning ratio is found by bisection.
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from _common import SHAPE, arguments, build, finish, flops, quiet, search
from torch import nn


def prune(network: str, ratio: float, scope: str, round_to: int) -> nn.Module:
    """The network without `ratio` of its channels."""
    model = build(network)
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with quiet():
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(SHAPE),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=scope != "uniform",
            isomorphic=scope == "isomorphic",
            pruning_ratio=ratio,
            ignored_layers=[classifier],
            round_to=round_to,
        )
        pruner.step()
    return model.eval()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--scope",
        choices=("global", "isomorphic", "uniform"),
        default="global",
        help="channels compete in the whole network, among like layers, or within each layer",
    )
    args = parser.parse_args()
    dense = build(args.network)
    found = search(
        lambda kept: prune(args.network, 1 - kept, args.scope, args.round_to),
        flops(dense),
        args.flops,
        args.tolerance,
        low=0.0,
        high=1.0,
    )
    settings = {
        "pruner": "BasePruner",
        "importance": "GroupMagnitudeImportance(p=2)",
        "scope": args.scope,
        "round_to": args.round_to,
        "iterative_steps": 1,
        "ignored": "last linear layer",
        "pruning_ratio": round(1 - found.knob, 5),
    }
    finish("torch-pruning", args.network, dense, found, settings, args.out)


if __name__ == "__main__":
    main()
