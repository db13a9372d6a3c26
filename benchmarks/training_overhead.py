"""Whole training steps: plain, with TRP, and with the authors' algorithm as published.

Authors' (algorithm 1 of arXiv 1910.04576): a full SVD of every layer, one by one, at every step;
the truncated weight replaces the layer's, U Vᵀ is added to its gradient.

With --taught: a dense network as a teacher, without TRP, that answers to an image, or to its mirror
image too.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import add_device, arguments, finish, ratios, say, spread, suffix, wait
from _networks import NETWORKS, Network, Training

import rankprune as rp
from rankprune.recipes.teacher import Teacher
from rankprune.replay import BEFORE
from rankprune.schemes import SCHEMES

NUCLEAR = 3e-4
RATIO = 0.25
SCHEME = "channel"


def _with_trp(training: Training, every: int) -> Callable[[], None]:
    options = rp.TRP(rank=rp.Ratio(RATIO), scheme=SCHEME, guard=False, every=every, nuclear=NUCLEAR)
    rp.attach(training.model, training.optimizer, options)
    return training.step


def _authors(training: Training) -> Callable[[], None]:
    plan = rp.make_plan(training.model, rp.Ratio(RATIO), scheme=SCHEME, guard=False)
    modules = dict(training.model.named_modules())
    layers = [
        (modules[x.name].weight, SCHEMES[str(x.scheme)], x.spec, x.rank) for x in plan.factorized
    ]
    polars: list[torch.Tensor] = []

    @torch.no_grad()
    def truncate() -> None:
        polars.clear()
        for weight, scheme, spec, rank in layers:
            u, s, vh = torch.linalg.svd(scheme.to_matrix(spec, weight), full_matrices=False)
            u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
            weight.copy_(scheme.from_matrix(spec, (u * s[..., None, :]) @ vh))
            polars.append(scheme.from_matrix(spec, u @ vh))

    @torch.no_grad()
    def regularise(*_: Any) -> None:
        for (weight, *_rest), polar in zip(layers, polars, strict=True):
            weight.grad.add_(polar, alpha=NUCLEAR)

    training.optimizer.register_step_pre_hook(regularise)

    def step() -> None:
        truncate()
        training.step()

    return step


def _taught(training: Training, mirrored: bool) -> Callable[[], None]:
    teacher = Teacher(copy.deepcopy(training.model), mirrored=mirrored)
    training.loss = lambda inputs, labels: teacher(training.model, inputs, labels)[0]
    return training.step


def measure(network: Network, options: argparse.Namespace) -> dict[str, Any]:
    def fresh() -> Training:
        return Training(network, batch=options.batch, device=options.device)

    steps = {"plain": fresh().step}
    if options.taught:
        steps |= {"taught": _taught(fresh(), False), "taught_mirrored": _taught(fresh(), True)}
    else:
        steps |= {
            "m20": _with_trp(fresh(), 20),
            "m1": _with_trp(fresh(), 1),
            "authors": _authors(fresh()),
        }
    # one block is a period of m = 20, so that each holds one of its projections
    blocks = 1 if options.quick else options.blocks
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        # the first projection is a cold one, and on a GPU some more come before they are recorded
        for _ in range(2 if options.device == "cpu" or name == "authors" else 20 * (BEFORE + 1)):
            step()
    counts = {name: options.authors_steps if name == "authors" else 20 for name in steps}
    # step by step on a CPU; a GPU is not to be waited for within a block
    turns = 20 if options.device == "cpu" else 1
    for _ in range(blocks):
        block = dict.fromkeys(steps, 0.0)
        for turn in range(turns):
            for name, step in steps.items():
                wait(options.device)
                begin = time.perf_counter()
                for number in range(counts[name]):
                    if number % turns == turn:
                        step()
                wait(options.device)
                block[name] += time.perf_counter() - begin
        for name, total in block.items():
            seconds[name].append(total / counts[name])
    return {
        "seconds_a_step": {name: spread(values) for name, values in seconds.items()},
        **{name: ratios(seconds[name], seconds["plain"]) for name in steps if name != "plain"},
    }


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS)
    parser.add_argument("--blocks", type=int, default=5, help="of 20 steps each")
    parser.add_argument("--authors-steps", type=int, default=20, help="fewer in each block")
    parser.add_argument("--taught", action="store_true", help="a teacher instead of TRP")
    parser.add_argument("--batch", type=int, help="instead of the network's own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"ratio": RATIO, "nuclear": NUCLEAR, "scheme": SCHEME, "device": options.device}
    found: dict[str, Any] = {}
    names = ("resnet20",) if options.quick else ("resnet20", "resnet18")
    for name in options.networks or names:
        entry = measure(NETWORKS[name], options)
        ratio = {k: v["median"] for k, v in entry.items() if k != "seconds_a_step"}
        found[name] = ratio | {"spread": entry}
        if options.save:
            alone = {"settings": settings, name: found[name]}
            title = "teacher_overhead" if options.taught else "training_overhead"
            finish(f"{title}-{name}{suffix(options)}", alone, options)
        say(options, f"{name}: " + ", ".join(f"{k} {found[name][k]:.3f}" for k in list(entry)[1:]))
    if not options.save:
        finish("training_overhead", {"settings": settings, **found}, options)


if __name__ == "__main__":
    main()
