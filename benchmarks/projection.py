"""Projecting all layers of a network: one `torch.linalg.svd` a layer against rankprune.

Cold is the first projection of random weights, whose spectra are flat. Steady is a projection that
starts from the last one's subspaces, after the training has moved the weights in between.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from _harness import add_device, alternate, arguments, finish, ratios, say, spread, suffix, wait
from _networks import NETWORKS, Network, Training
from torch import Tensor

import rankprune as rp
from rankprune import lockstep
from rankprune.linalg import Decomposition
from rankprune.replay import BEFORE
from rankprune.schemes import SCHEMES, Scheme

RATIO = 0.25
EVERY = 20  # optimizer steps between projections
QUICK = ("resnet20", "resnet18", "resnet50")


class Projection:
    """One network's projections to a quarter of the rank, in the two ways."""

    def __init__(self, training: Training, scheme: str) -> None:
        self.training = training
        rule = rp.Ratio(RATIO)
        options = rp.TRP(rank=rule, scheme=scheme, guard=False, every=EVERY)
        self.controller = rp.Controller(training.model, options)
        self.plan = rp.make_plan(training.model, rule, scheme=scheme, guard=False)
        self.keep()

    def train(self, periods: int) -> None:
        """Projections and the steps after them, as in `attach`."""
        for _ in range(periods):
            self.controller.project()
            for _ in range(EVERY):
                self.training.step()
                self.controller.after_step()
        self.keep()

    def keep(self) -> None:
        """Remember the weights and the controller's state, for `restore`."""
        self.state = self.controller.state_dict()
        self.weights = {name: w.detach().clone() for name, w in self._weights().items()}

    @torch.no_grad()
    def restore(self) -> None:
        for name, weight in self._weights().items():
            weight.copy_(self.weights[name])
        self.controller.load_state_dict(self.state)

    @torch.no_grad()
    def by_svd(self) -> None:
        """The plain way."""
        for name, scheme, spec, rank in self._layers():
            matrices = scheme.to_matrix(spec, self._weights()[name])
            u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
            nearest = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
            self._weights()[name].copy_(scheme.from_matrix(spec, nearest))

    @torch.no_grad()
    def by_gram(self) -> None:
        """Eigenvectors of the Gram matrix in fp64, layer by layer."""
        for name, scheme, spec, rank in self._layers():
            matrices = scheme.to_matrix(spec, self._weights()[name])
            nearest = Decomposition(matrices).project(rank)
            self._weights()[name].copy_(scheme.from_matrix(spec, nearest))

    def without_starts(self) -> None:
        """rankprune, as if for the first time."""
        rp.project(self.training.model, self.plan)

    def without_replays(self) -> None:
        """rankprune on a GPU, with a call for each of its operations."""
        with mock.patch.object(lockstep, "_REPLAYED", -1):
            self.controller.project()

    @torch.no_grad()
    def residual_ratios(self) -> list[float]:
        """‖M − P‖ of the weights as they are by the optimum, in fp64, where it is not rounding."""
        found = []
        for name, scheme, spec, rank in self._layers():
            before = scheme.to_matrix(spec, self.weights[name]).double()
            after = scheme.to_matrix(spec, self._weights()[name]).double()
            gram = (
                before @ before.mT if before.shape[-2] <= before.shape[-1] else before.mT @ before
            )
            squares = torch.linalg.eigvalsh(gram).flip(-1)  # fp64: ample for what counts below
            optimum = squares[..., rank:].clamp_min(0).sum(-1).sqrt()
            residual = torch.linalg.matrix_norm(before - after)
            known = optimum > 1e-5 * torch.linalg.matrix_norm(before)
            found += (residual / optimum)[known].tolist()
        return found

    def _weights(self) -> dict[str, Tensor]:
        modules = dict(self.training.model.named_modules())
        return {layer.name: modules[layer.name].weight for layer in self.plan.factorized}

    def _layers(self) -> list[tuple[str, Scheme, Any, int]]:
        return [
            (layer.name, SCHEMES[str(layer.scheme)], layer.spec, int(layer.rank or 0))
            for layer in self.plan.factorized
        ]


def measure(network: Network, scheme: str, options: argparse.Namespace) -> dict[str, Any]:
    size = network.size
    if len(size) == 3 and size[-1] == 224 and scheme != "linear":
        size = (3, 64, 64)  # the weights are the same, the steps cheaper
    training = Training(
        network,
        batch=min(network.batch, 16),
        size=size,
        learning_rate=options.learning_rate,
        device=options.device,
    )
    projection = Projection(training, scheme)
    result: dict[str, Any] = {"layers": len(projection.plan.factorized)}
    weights = sum(weight.numel() for weight in projection.weights.values())
    large = weights > 1e8  # svd takes minutes
    once = options.quick or large

    def waited(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            call()
            wait(options.device)

        return run

    for phase in ("cold", "steady"):
        if phase == "steady":
            projection.train(2 if once else options.periods)
        variants = {"svd": projection.by_svd, "rankprune": projection.controller.project}
        if not once:
            variants["gram_fp64"] = projection.by_gram
            if phase == "steady":
                variants["rankprune_without_starts"] = projection.without_starts
                if options.device != "cpu":
                    variants["rankprune_without_replays"] = projection.without_replays
        if not large:  # the first call of anything is slower, and a GPU's next ones are recorded
            for _ in range(1 if options.device == "cpu" else BEFORE + 1):
                projection.controller.project()
                projection.restore()
        timed = {name: waited(call) for name, call in variants.items()}
        seconds = alternate(timed, 1 if once else options.repeats, waited(projection.restore))
        entry: dict[str, Any] = {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "speedup": ratios(seconds["svd"], seconds["rankprune"]),
        }
        if phase == "steady" or not once:
            projection.restore()
            projection.controller.project()
            entry["residual_ratio_max"] = max(projection.residual_ratios(), default=1.0)
        result[phase] = entry
        say(options, f"  {scheme:8} {phase:6} {entry['speedup']['median']:6.1f} x svd")
        projection.restore()
    return result


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS)
    parser.add_argument("--schemes", nargs="*", choices=("channel", "spatial", "linear"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--periods", type=int, default=5, help="projections before the steady one")
    parser.add_argument("--learning-rate", type=float, help="instead of the network's own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {
        "ratio": RATIO,
        "every": EVERY,
        "learning_rate": options.learning_rate,
        "device": options.device,
        "periods": 2 if options.quick else options.periods,
        "repeats": 1 if options.quick else options.repeats,
    }
    # a GPU's libraries start with their first call
    torch.linalg.svd(torch.randn(8, 8, device=options.device))
    found: dict[str, Any] = {}
    for name in options.networks or (QUICK if options.quick else NETWORKS):
        say(options, name)
        network = NETWORKS[name]
        schemes = network.schemes[:1] if options.quick else network.schemes
        if options.schemes:
            schemes = tuple(scheme for scheme in schemes if scheme in options.schemes)
        by_scheme = {scheme: measure(network, scheme, options) for scheme in schemes}
        first = by_scheme[schemes[0]]
        found[name] = {
            "scheme": schemes[0],
            "speedup_vs_svd": first["steady"]["speedup"]["median"],
            "speedup_cold": first["cold"]["speedup"]["median"],
            "residual_ratio_max": max(
                phase["residual_ratio_max"]
                for entry in by_scheme.values()
                for phase in (entry["cold"], entry["steady"])
                if "residual_ratio_max" in phase
            ),
            "schemes": by_scheme,
        }
        if options.save:
            alone = {"settings": settings, "networks": {name: found[name]}}
            finish(f"projection-{name}{suffix(options)}", alone, options)
    if not options.save:
        finish("projection", {"settings": settings, "networks": found}, options)


if __name__ == "__main__":
    main()
