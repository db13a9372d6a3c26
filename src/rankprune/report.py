"""What compression did: per layer and in total, as text and JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from rankprune._version import __version__
from rankprune.errors import FileError
from rankprune.factorize import low_rank_layers, plan_of
from rankprune.plan import LayerPlan, Plan
from rankprune.profile import ExampleInputs, Profile, call, evaluating, profile
from rankprune.tables import format_change, format_count, format_matrix, format_table


@dataclass(frozen=True)
class Cost:
    """What a network costs; accuracy is a fraction, and None where it was not measured."""

    params: int
    flops: int
    bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer; all counts by torch on the real networks."""

    name: str
    type: str
    scheme: str | None
    matrix: str
    rank: int | None
    energy: float | None
    params: int
    dense_params: int
    flops: int
    dense_flops: int
    reason: str


@dataclass(frozen=True)
class Report:
    """A dense network against its compact form.

    Attributes:
        dense, compact: their costs.
        layers: every layer that a plan knows, or every factorised one where there is no plan.
        max_logit_error: largest absolute difference of their outputs on the example inputs,
            relative to the largest absolute output.
        projected_accuracy: accuracy of the dense network after its last projection.
        environment: versions and device.
    """

    dense: Cost
    compact: Cost
    layers: tuple[LayerReport, ...]
    max_logit_error: float | None
    projected_accuracy: float | None
    environment: dict[str, Any]

    @property
    def flops_reduction(self) -> float:
        """Dense FLOPs over compact FLOPs."""
        return self.dense.flops / self.compact.flops if self.compact.flops else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        keys = ("accuracy", "params", "flops", "bytes")
        return {
            "dense": {key: getattr(self.dense, key) for key in keys},
            "projected": {"accuracy": self.projected_accuracy},
            "compact": {key: getattr(self.compact, key) for key in keys},
            "layers": [asdict(layer) for layer in self.layers],
            "max_logit_error": self.max_logit_error,
            "environment": self.environment,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Report:
        """Read what `to_dict` wrote.

        Raises:
            FileError: a key is missing or unknown.
        """
        try:
            return cls(
                dense=Cost(**document["dense"]),
                compact=Cost(**document["compact"]),
                layers=tuple(LayerReport(**layer) for layer in document["layers"]),
                max_logit_error=document["max_logit_error"],
                projected_accuracy=document["projected"]["accuracy"],
                environment=document["environment"],
            )
        except (KeyError, TypeError) as error:
            raise FileError(f"not a rankprune report: {error}") from None

    def __str__(self) -> str:
        table = [("layer", "scheme", "matrix", "rank", "energy", "params", "FLOPs")]
        for layer in self.layers:
            table.append(
                (
                    layer.name,
                    layer.scheme or "dense",
                    layer.matrix,
                    "" if layer.rank is None else str(layer.rank),
                    "" if layer.energy is None else f"{layer.energy:.4f}",
                    format_change(layer.dense_params, layer.params),
                    format_change(layer.dense_flops, layer.flops),
                )
            )
        return "\n".join([format_table(table), "", *self.totals()])

    def totals(self) -> list[str]:
        """The summary's lines."""
        lines = [
            f"parameters  {format_change(self.dense.params, self.compact.params)}",
            f"FLOPs       {format_change(self.dense.flops, self.compact.flops)}",
            f"size        {_bytes(self.dense.bytes)} → {_bytes(self.compact.bytes)}",
        ]
        accuracies = [
            f"{label} {value:.2%}"
            for label, value in (
                ("dense", self.dense.accuracy),
                ("projected", self.projected_accuracy),
                ("compact", self.compact.accuracy),
            )
            if value is not None
        ]
        if accuracies:
            lines.append("accuracy    " + ", ".join(accuracies))
        if self.max_logit_error is not None:
            lines.append(f"difference  {self.max_logit_error:.2e} of the largest output")
        return lines


def report(
    dense: nn.Module,
    compact: nn.Module,
    *,
    example_inputs: ExampleInputs,
    plan: Plan | None = None,
    accuracies: dict[str, float | None] | None = None,
) -> Report:
    """Compare a dense network with its compact form by running both.

    Args:
        dense: the dense network; after TRP, the projected one.
        compact: what `factorize` made of it.
        example_inputs: what both are called with.
        plan: lists also the layers that stay dense, with the reason.
        accuracies: fractions measured elsewhere, under "dense", "projected" and "compact".

    Example:
        >>> import torch, rankprune as rp
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        >>> compact = rp.factorize(model, rp.make_plan(model, rp.FixedRank(8)))
        >>> round(report(model, compact, example_inputs=torch.zeros(1, 32)).flops_reduction, 2)
        2.0
    """
    measured = accuracies or {}
    before, after = profile(dense, example_inputs), profile(compact, example_inputs)
    source = plan if plan is not None else plan_of(compact)
    present = low_rank_layers(compact)
    layers = []
    for entry in source.layers:
        # what the compact network really has, not what the plan foresaw
        low_rank = present.get(entry.name)
        layers.append(_layer(entry, low_rank is not None, dense, compact, before, after))
    return Report(
        dense=Cost(before.params, before.flops, before.bytes, measured.get("dense")),
        compact=Cost(after.params, after.flops, after.bytes, measured.get("compact")),
        layers=tuple(layers),
        max_logit_error=_difference(dense, compact, example_inputs),
        projected_accuracy=measured.get("projected"),
        environment=environment(),
    )


def environment() -> dict[str, Any]:
    """Versions and device that a figure depends on."""
    return {
        "rankprune": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system() + " " + platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _layer(
    entry: LayerPlan,
    factorized: bool,
    dense: nn.Module,
    compact: nn.Module,
    before: Profile,
    after: Profile,
) -> LayerReport:
    names = (entry.name, *entry.tied)

    def params(model: nn.Module) -> int:
        unique = {
            id(parameter): parameter.numel()
            for name in names
            for parameter in model.get_submodule(name).parameters()
        }
        return sum(unique.values())

    def flops(cost: Profile) -> int:
        return sum(cost.layers[name].flops for name in names if name in cost.layers)

    return LayerReport(
        name=entry.name,
        type=entry.type,
        scheme=entry.scheme if factorized else None,
        matrix=format_matrix(entry.matrix),
        rank=entry.rank if factorized else None,
        energy=entry.energy if factorized else None,
        params=params(compact),
        dense_params=params(dense),
        flops=flops(after),
        dense_flops=flops(before),
        reason=entry.reason,
    )


@torch.no_grad()
def _difference(dense: nn.Module, compact: nn.Module, inputs: ExampleInputs) -> float | None:
    with evaluating(dense), evaluating(compact):
        expected, received = call(dense, inputs), call(compact, inputs)
    if not isinstance(expected, torch.Tensor) or not isinstance(received, torch.Tensor):
        return None
    largest = float(expected.abs().max())
    difference = float((expected - received).abs().max())
    return difference / largest if largest else difference


def _bytes(count: int) -> str:
    return format_count(count) + "B"
