"""What compression did: per layer and in total, as text and JSON."""

from __future__ import annotations

import functools
import json
import math
import platform
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from rankprune._version import __version__
from rankprune.errors import FileError
from rankprune.linalg import check_finite, singular_values
from rankprune.low_rank import LowRank, low_rank_layers, plan_of
from rankprune.plan import LayerPlan, Plan
from rankprune.profile import ExampleInputs, Profile, call, evaluating, profile
from rankprune.schemes import SCHEMES
from rankprune.sharded import full_tensor
from rankprune.tables import format_change, format_count, format_matrix, format_table, format_times

# What a report that is read may hold; far above any real network's.
_MAX_ITEMS = 2**17
_MAX_TEXT = 4096
_MAX_NUMBER = 1e300


@dataclass(frozen=True)
class Cost:
    """What a network costs; accuracy is a fraction, and None where it was not measured."""

    params: int
    flops: int
    bytes: int
    accuracy: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer; all counts by torch on the real networks.

    Attributes:
        name, type: of the dense layer.
        scheme, rank, energy: as in the plan; None where the layer is dense.
        matrix: shape of the scheme's matrices, as text.
        params, dense_params, flops, dense_flops: of the layer and those tied to it.
        reason: why it is dense, or how the rank was chosen.
        error: ‖W − W_r‖ / ‖W‖ (Frobenius) of the compact weight against the dense one that the
            report was made with; None where dense.
        singular_values: of that dense weight's matrix, descending; of a batch of matrices the
            root of the sum of squares. Empty where dense.
        latency_ms, dense_latency_ms: what the plan predicts; None where it does not.
    """

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
    error: float | None = None
    singular_values: tuple[float, ...] = ()
    latency_ms: float | None = None
    dense_latency_ms: float | None = None


@dataclass(frozen=True)
class LatencyReport:
    """How long a forward pass takes, measured.

    Attributes:
        backend: what ran the networks, such as "onnxruntime".
        batch: inputs of one pass.
        threads: that the backend was given.
        dense_ms, compact_ms: measured.
        predicted_ms: of the compact network, by the plan; None where it predicts none.
        speedup: dense over compact time.
        realised: that speed-up over the reduction of FLOPs; 1 where all of it arrives.
    """

    backend: str
    batch: int
    threads: int
    dense_ms: float
    compact_ms: float
    predicted_ms: float | None
    speedup: float
    realised: float


@dataclass(frozen=True)
class Report:
    """A dense network against its compact form.

    Attributes:
        dense, compact: their costs.
        layers: every layer that a plan knows, or every factorised one where there is no plan.
        max_logit_error: largest absolute difference of their outputs on the example inputs,
            relative to the largest absolute output; None where they are no finite tensors.
        projected_accuracy: accuracy of the dense network after its last projection.
        environment: versions and device.
        latency: measured times, one entry a backend and batch size.
    """

    dense: Cost
    compact: Cost
    layers: tuple[LayerReport, ...]
    max_logit_error: float | None
    projected_accuracy: float | None
    environment: dict[str, Any]
    latency: tuple[LatencyReport, ...] = ()

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
            "layers": [
                asdict(layer) | {"singular_values": list(layer.singular_values)}
                for layer in self.layers
            ],
            "max_logit_error": self.max_logit_error,
            "environment": self.environment,
            "latency": [asdict(entry) for entry in self.latency],
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Report:
        """Read what `to_dict` wrote, here or in an earlier version.

        Raises:
            FileError: a key is missing or unknown, or its value is none that `to_dict` writes.
        """
        if not isinstance(document, dict):
            raise _no_report("the document", "an object", document)
        values = dict(document)
        projected = values.pop("projected", None)
        if not isinstance(projected, dict) or set(projected) != {"accuracy"}:
            raise _no_report("projected", "an object with 'accuracy'", projected)
        read: Report = _read(cls, values | {"projected_accuracy": projected["accuracy"]}, "")
        return read

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
        for entry in self.latency:
            times = format_times(entry.dense_ms, entry.compact_ms)
            lines.append(f"latency     {entry.backend} batch {entry.batch}: {times}")
        return lines


def report(
    dense: nn.Module,
    compact: nn.Module,
    *,
    example_inputs: ExampleInputs,
    plan: Plan | None = None,
    accuracies: dict[str, float | None] | None = None,
    latency: Sequence[LatencyReport] = (),
) -> Report:
    """Compare a dense network with its compact form by running both.

    Every factorised layer costs one decomposition of its dense weight, for the spectrum.

    Args:
        dense: the dense network; after TRP, the projected one.
        compact: what `factorize` made of it.
        example_inputs: what both are called with.
        plan: lists also the layers that stay dense, with the reason.
        accuracies: fractions measured elsewhere, under "dense", "projected" and "compact".
        latency: times measured elsewhere, after the one that the plan was made with.

    Raises:
        NumericsError: the weight of a factorised layer holds NaN or infinity.

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
        layers.append(_layer(entry, low_rank, dense, compact, before, after))
    reduction = before.flops / after.flops if after.flops else 1.0
    return Report(
        dense=Cost(before.params, before.flops, before.bytes, measured.get("dense")),
        compact=Cost(after.params, after.flops, after.bytes, measured.get("compact")),
        layers=tuple(layers),
        max_logit_error=_difference(dense, compact, example_inputs),
        projected_accuracy=measured.get("projected"),
        environment=environment(),
        latency=(*_planned(source, reduction), *latency),
    )


def _planned(plan: Plan, flops_reduction: float) -> Iterator[LatencyReport]:
    """The network's time as it was measured for the plan, and as its layers alone foretold it."""
    found = plan.metadata.get("latency")
    if not isinstance(found, dict) or plan.measured is None:
        return
    dense, compact = float(found["dense_ms"]), float(found["compact_ms"])
    if not (dense and compact):
        return
    saved = sum((e.dense_latency_ms or 0.0) - (e.latency_ms or 0.0) for e in plan.layers)
    yield LatencyReport(
        backend=str(found["backend"]),
        batch=int(found["batch"]),
        threads=int(found["threads"]),
        dense_ms=dense,
        compact_ms=compact,
        predicted_ms=dense - saved,
        speedup=dense / compact,
        realised=dense / compact / flops_reduction,
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
    low_rank: LowRank | None,
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

    error: float | None = None
    spectrum: tuple[float, ...] = ()
    if low_rank is not None:
        error, spectrum = _compared(entry.name, dense.get_submodule(entry.name), low_rank)
    return LayerReport(
        name=entry.name,
        type=entry.type,
        scheme=entry.scheme if low_rank else None,
        matrix=format_matrix(entry.matrix),
        rank=entry.rank if low_rank else None,
        energy=entry.energy if low_rank else None,
        params=params(compact),
        dense_params=params(dense),
        flops=flops(after),
        dense_flops=flops(before),
        reason=entry.reason,
        error=error,
        singular_values=spectrum,
        latency_ms=entry.latency_ms,
        dense_latency_ms=entry.dense_latency_ms,
    )


@torch.no_grad()
def _compared(name: str, dense: nn.Module, low_rank: LowRank) -> tuple[float, tuple[float, ...]]:
    """Relative error of a factorised layer's weight, and the dense weight's spectrum."""
    spec, scheme = low_rank.layer.spec, SCHEMES[str(low_rank.layer.scheme)]
    assert spec is not None
    weight, compact = _weight(dense), low_rank.dense_weight()
    for tensor in (weight, compact):
        check_finite(tensor, name)
    working = weight.dtype if weight.dtype == torch.float64 else torch.float32
    difference = compact.to(weight.device, working) - weight.to(working)
    norm = float(torch.linalg.vector_norm(weight.to(working)))
    error = float(torch.linalg.vector_norm(difference))
    values = singular_values(scheme.to_matrix(spec, weight)).square().sum(0).sqrt()
    # seven digits: all that a weight in fp32 knows, and half of a report's length
    spectrum = tuple(float(f"{value:.7g}") for value in values.tolist())
    return error / norm if norm else error, spectrum


def _weight(module: nn.Module) -> Tensor:
    if isinstance(module, LowRank):
        return module.dense_weight()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return full_tensor(weight.detach())


@torch.no_grad()
def _difference(dense: nn.Module, compact: nn.Module, inputs: ExampleInputs) -> float | None:
    with evaluating(dense), evaluating(compact):
        expected, received = call(dense, inputs), call(compact, inputs)
    if not isinstance(expected, torch.Tensor) or not isinstance(received, torch.Tensor):
        return None
    largest = float(expected.abs().max())
    difference = float((expected - received).abs().max())
    relative = difference / largest if largest else difference
    return relative if math.isfinite(relative) else None


def _bytes(count: int) -> str:
    return format_count(count) + "B"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as what a field's annotation says; reports come from anywhere.

    Raises:
        FileError: it is none.
    """
    if get_origin(kind) is types.UnionType:  # X | None
        return None if value is None else _read(get_args(kind)[0], value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) > _MAX_ITEMS:
            raise _no_report(where, f"a list of at most {_MAX_ITEMS}", value)
        item = get_args(kind)[0]
        return tuple(_read(item, entry, f"{where}[{n}]") for n, entry in enumerate(value))
    if is_dataclass(kind):
        return _read_fields(kind, value, where)
    if kind is int and type(value) is int and 0 <= value < 2**63:
        return value
    # NaN fails every comparison
    if kind is float and type(value) in (int, float) and abs(value) < _MAX_NUMBER:
        return float(value)
    if kind is str and isinstance(value, str) and len(value) <= _MAX_TEXT and _is_text(value):
        return value
    if get_origin(kind) is dict and isinstance(value, dict) and _is_text(value):
        return value
    wanted = {int: "a whole number ≥ 0", float: "a finite number", str: "a short text"}
    raise _no_report(where, wanted.get(kind, "an object of JSON values"), value)


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _no_report(where, "an object", value)
    hints, prefix = _hints(kind), f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise _no_report(f"{prefix}{str(key)[:80]}", "left out: the key is unknown", value[key])
    for field in fields(kind):
        if field.name not in value and field.default is MISSING:
            raise FileError(f"not a rankprune report: {prefix}{field.name} is missing")
    return kind(**{key: _read(hints[key], item, prefix + key) for key, item in value.items()})


def _is_text(value: Any) -> bool:
    """Whether it can be written as JSON: no NaN, no halves of characters, no endless nesting."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _no_report(where: str, wanted: str, received: object) -> FileError:
    shown = type(received).__name__
    if isinstance(received, (str, bool, float)):
        shown = ascii(received[:80] if isinstance(received, str) else received)
    elif isinstance(received, int):
        shown = str(received) if abs(received) < 2**64 else "a larger number"
    return FileError(f"not a rankprune report: {where} must be {wanted}, got {shown}")
