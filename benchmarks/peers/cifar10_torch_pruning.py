"""Torch-Pruning's group magnitude pruning, to FLOPs targets, for the CIFAR-10 comparison.

    .venv-torch-pruning/bin/python cifar10_torch_pruning.py --weights DENSE.safetensors \\
        --model resnet20 --target 2 2.84 3.6 --data FOLDER

About a channel a step, scored anew at every step, until the target is reached. In ResNets only the
channels within blocks are pruned: DepGraph takes a shortcut that pads channels for an operation
that leaves them where they are, and would remove other channels behind it than before it.
"""

from __future__ import annotations

import sys
import time

import torch
import torch_pruning as tp
from _cifar10 import SHAPE, Task, flops, options, task
from _common import quiet
from networks import ResNet
from torch import nn

#: As in the library's own CIFAR experiments; more where a step would be several channels.
STEPS = 400
#: Where channels compete. In a plain network, competition across layers empties the first ones.
SCOPES = {"vgg": "uniform"}


def kept(model: nn.Module) -> list[nn.Module]:
    """The classifier, and in a ResNet the layers that write to the shortcuts."""
    if isinstance(model, ResNet):
        stream = [m for name, m in model.named_modules() if name.endswith("conv2")]
        return [model.conv1, *stream, model.linear]
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def pruned(job: Task, target: float, scope: str) -> tuple[nn.Module, int, int]:
    """The first network on the way that reaches the target, the steps taken, and those of a run."""
    model = job.dense()
    dense = flops(model)
    ignored = kept(model)
    channels = sum(
        m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m not in ignored
    )
    steps = max(STEPS, channels)
    with quiet():
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(SHAPE),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=scope == "isomorphic",
            isomorphic=scope == "isomorphic",
            pruning_ratio=1.0,
            iterative_steps=steps,
            ignored_layers=ignored,
        )
        for step in range(1, steps + 1):
            # layer by layer: in a step of uniform pruning, layers of one width lose a channel each
            for group in pruner.step(interactive=True):
                group.prune()
                if dense / flops(model) >= target:
                    return model, step, steps
    raise SystemExit(f"no ratio gives {target} times fewer FLOPs")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--scope",
        choices=("isomorphic", "uniform"),
        help="channels compete among like layers, or within each (default: for vgg within)",
    )
    args = parser.parse_args()
    job = task("torch-pruning", "torch-pruning", args)
    scope = args.scope or SCOPES.get(job.network, "isomorphic")
    for target in job.targets:
        started = time.perf_counter()
        compact, step, steps = pruned(job, target, scope)
        widths = [m.out_channels for m in compact.modules() if isinstance(m, nn.Conv2d)]
        print(f"target {target}: {step} of {steps} steps, widths {widths}", file=sys.stderr)
        settings = {
            "pruner": "BasePruner",
            "importance": "GroupMagnitudeImportance(p=2)",
            "global_pruning": scope == "isomorphic",
            "isomorphic": scope == "isomorphic",
            "round_to": None,
            "iterative_steps": steps,
            "pruning_ratio": round(step / steps, 5),
            "ignored": "classifier; in a ResNet also what writes to the shortcuts",
            "seconds": round(time.perf_counter() - started, 1),
        }
        job.finish(compact, target, settings)


if __name__ == "__main__":
    main()
