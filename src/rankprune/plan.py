"""A plan: what happens to every layer, and what it costs. Immutable, JSON, no tensors.

A plan is the only thing that passes between choosing (planner, training) and doing (factorize,
serialize, report). Its JSON has a schema version; reading is strict and says what is wrong where.
"""

from __future__ import annotations

import json
import math
import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rankprune.errors import LayerError, PlanError
from rankprune.layers import LayerSpec
from rankprune.schemes import SCHEMES, MatrixShape
from rankprune.tables import format_change, format_matrix, format_table, format_times

SCHEMA_VERSION = 1
_MAX_SIDE = 2**31
_MAX_NAME = 1024


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What happens to one parametrised layer.

    Attributes:
        name: qualified name in the model.
        type: class of the dense module ("Conv2d").
        spec: its numbers; None where the type is not supported.
        scheme: name of the scheme; None leaves the layer dense.
        rank: rank of each of its matrices; None where dense.
        reason: why it is dense, or how the rank was chosen.
        energy: share of the weight's energy kept, 0 to 1; None where dense or unknown.
        dense_params: parameters of the dense layer, bias included.
        dense_flops: FLOPs of the dense layer for the example inputs; None where not measured.
        params: parameters after the plan.
        flops: FLOPs after the plan.
        dense_latency_ms: time of the dense layer alone, measured; None where not measured.
        latency_ms: time after the plan.
        tied: names of further layers that hold the same weight.
    """

    name: str
    type: str
    spec: LayerSpec | None
    scheme: str | None = None
    rank: int | None = None
    reason: str = ""
    energy: float | None = None
    dense_params: int = 0
    dense_flops: int | None = None
    params: int = 0
    flops: int | None = None
    dense_latency_ms: float | None = None
    latency_ms: float | None = None
    tied: tuple[str, ...] = ()

    @property
    def dense(self) -> bool:
        """True where the layer is left as it is."""
        return self.scheme is None

    @property
    def matrix(self) -> MatrixShape | None:
        """Shape of the scheme's matrices; None where dense."""
        if self.scheme is None or self.spec is None:
            return None
        return SCHEMES[self.scheme].matrix_shape(self.spec)

    def left_dense(self, reason: str) -> LayerPlan:
        """The same layer, left dense for this reason."""
        return replace(
            self,
            scheme=None,
            rank=None,
            energy=None,
            reason=reason,
            params=self.dense_params,
            flops=self.dense_flops,
            latency_ms=self.dense_latency_ms,
        )

    def factors(self) -> tuple[LayerSpec, LayerSpec]:
        """The two layers that a factorised layer becomes.

        Raises:
            PlanError: the layer is dense.
        """
        if self.scheme is None or self.spec is None or self.rank is None:
            raise PlanError(f"layer {self.name!r} is dense in this plan; it has no factors")
        return SCHEMES[self.scheme].factor_specs(self.spec, self.rank)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to every parametrised layer of a model.

    Attributes:
        layers: one entry a layer, in the model's order.
        dense_params: parameters of the whole dense model.
        dense_flops: FLOPs of the whole dense model for the example inputs, or None.
        metadata: free JSON values that travel with the plan (model's name, data set, versions).
    """

    layers: tuple[LayerPlan, ...]
    dense_params: int
    dense_flops: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", types.MappingProxyType(dict(self.metadata)))

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapping proxy cannot be pickled or deep-copied; the plan can
        return _rebuild, (self.layers, self.dense_params, self.dense_flops, dict(self.metadata))

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def factorized(self) -> tuple[LayerPlan, ...]:
        """The layers that are not left dense."""
        return tuple(layer for layer in self.layers if not layer.dense)

    @property
    def params(self) -> int:
        """Parameters of the whole model after the plan."""
        return self.dense_params - sum(layer.dense_params - layer.params for layer in self.layers)

    @property
    def flops(self) -> int | None:
        """FLOPs of the whole model after the plan, or None."""
        if self.dense_flops is None:
            return None
        saved = sum((layer.dense_flops or 0) - (layer.flops or 0) for layer in self.layers)
        return self.dense_flops - saved

    @property
    def measured(self) -> str | None:
        """The network's time dense and compact, where the plan was made by measuring it."""
        found: Any = self.metadata.get("latency")
        try:
            place = "{backend}, {precision}, {threads} threads, batch {batch}".format(**found)
            return f"latency {format_times(found['dense_ms'], found['compact_ms'])} on {place}"
        except (TypeError, KeyError, ValueError):
            return None  # metadata is free: it may hold something else under this name

    def with_metadata(self, **values: Any) -> Plan:
        """The same plan with further metadata."""
        return replace(self, metadata={**self.metadata, **values})

    def __str__(self) -> str:
        timed = any(layer.latency_ms is not None for layer in self.layers)
        times = ("ms alone",) if timed else ()
        head = ("layer", "type", "scheme", "matrix", "rank", "energy", "params", "FLOPs")
        rows: list[tuple[str, ...]] = [(*head, *times, "why")]
        for layer in self.layers:
            own = (format_times(layer.dense_latency_ms, layer.latency_ms),) if timed else ()
            rows.append(
                (
                    layer.name,
                    layer.type,
                    layer.scheme or "dense",
                    format_matrix(layer.matrix),
                    "" if layer.rank is None else str(layer.rank),
                    "" if layer.energy is None else f"{layer.energy:.4f}",
                    format_change(layer.dense_params, layer.params),
                    format_change(layer.dense_flops, layer.flops),
                    *own,
                    layer.reason,
                )
            )
        lines = [format_table(rows)]
        lines.append(
            f"{len(self.factorized)} of {len(self.layers)} layers factorised; "
            f"parameters {format_change(self.dense_params, self.params)}"
            + (
                ""
                if self.dense_flops is None
                else f"; FLOPs {format_change(self.dense_flops, self.flops)}"
            )
        )
        if self.measured is not None:
            lines.append(self.measured)
        return "\n".join(lines)

    def to_json(self) -> str:
        """Serialise; `from_json` reads the same plan back.

        Raises:
            PlanError: the metadata holds what JSON cannot.
        """
        document = {
            "schema_version": SCHEMA_VERSION,
            "dense_params": self.dense_params,
            "dense_flops": self.dense_flops,
            "metadata": dict(self.metadata),
            "layers": [asdict(layer) for layer in self.layers],
        }
        try:
            return json.dumps(document, indent=1, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the plan's metadata must be JSON values: {error}") from None

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read a plan.

        Args:
            text: JSON as `to_json` writes it.
            source: what to call it in messages, such as the file's name.

        Raises:
            PlanError: malformed, of a newer schema, or with impossible numbers.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{source}: not valid JSON: {error}") from None
        reader = _Reader(source, document)
        version = reader.integer("schema_version", 1)
        if version > SCHEMA_VERSION:
            raise PlanError(
                f"{source}: schema version {version} is newer than this rankprune reads "
                f"({SCHEMA_VERSION}); upgrade rankprune"
            )
        layers = tuple(
            _read_layer(_Reader(f"{source}: layer {index}", item))
            for index, item in enumerate(reader.array("layers"))
        )
        names = [name for layer in layers for name in (layer.name, *layer.tied)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise PlanError(f"{source}: layer {twice[0]!r} is listed twice")
        return cls(
            layers=layers,
            dense_params=reader.integer("dense_params", 0),
            dense_flops=reader.optional_integer("dense_flops"),
            metadata=reader.mapping("metadata"),
        )


def _rebuild(
    layers: tuple[LayerPlan, ...], params: int, flops: int | None, metadata: dict[str, Any]
) -> Plan:
    return Plan(layers=layers, dense_params=params, dense_flops=flops, metadata=metadata)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is out of range")
    return value


class _Reader:
    """Typed access to one JSON object; every complaint says where."""

    def __init__(self, where: str, document: object) -> None:
        if not isinstance(document, dict):
            raise PlanError(f"{where}: expected an object, got {type(document).__name__}")
        self.where = where
        self.document: dict[str, Any] = document

    def fail(self, key: str, wanted: str, received: object) -> PlanError:
        return PlanError(f"{self.where}: {key!r} must be {wanted}, got {str(received)[:80]!r}")

    def only(self, allowed: set[str]) -> None:
        unknown = sorted(set(self.document) - allowed)
        if unknown:
            raise PlanError(f"{self.where}: unknown key {unknown[0][:80]!r}")

    def value(self, key: str) -> Any:
        if key not in self.document:
            raise PlanError(f"{self.where}: {key!r} is missing")
        return self.document[key]

    def integer(self, key: str, least: int) -> int:
        value = self.value(key)
        if type(value) is not int or not least <= value < 2**63:
            raise self.fail(key, f"a whole number ≥ {least}", value)
        return value

    def optional_integer(self, key: str, least: int = 0) -> int | None:
        return None if self.value(key) is None else self.integer(key, least)

    def optional_number(self, key: str) -> float | None:
        value = self.value(key)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise self.fail(key, "a number", value)
        return float(value)

    def string(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or len(value) > _MAX_NAME:
            raise self.fail(key, "a string", value)
        return value

    def boolean(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false", value)
        return value

    def array(self, key: str) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.fail(key, "a list", value)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object", value)
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        value = self.array(key)
        if len(value) > 3 or any(type(v) is not int or not 0 <= v < _MAX_SIDE for v in value):
            raise self.fail(key, "at most three whole numbers", value)
        return tuple(value)


def _read_spec(reader: _Reader) -> LayerSpec:
    reader.only({item.name for item in fields(LayerSpec)})
    padding = reader.value("padding")
    return LayerSpec(
        kind=reader.string("kind"),
        in_channels=_side(reader, "in_channels"),
        out_channels=_side(reader, "out_channels"),
        bias=reader.boolean("bias"),
        kernel_size=reader.sizes("kernel_size"),
        stride=reader.sizes("stride"),
        padding=reader.string("padding") if isinstance(padding, str) else reader.sizes("padding"),
        dilation=reader.sizes("dilation"),
        output_padding=reader.sizes("output_padding"),
        groups=_side(reader, "groups"),
        padding_mode=reader.string("padding_mode"),
    )


def _side(reader: _Reader, key: str) -> int:
    value = reader.integer(key, 1)
    if value >= _MAX_SIDE:
        raise reader.fail(key, f"below {_MAX_SIDE}", value)
    return value


def _read_layer(reader: _Reader) -> LayerPlan:
    reader.only({item.name for item in fields(LayerPlan)})
    name = reader.string("name")
    spec = None
    if reader.value("spec") is not None:
        spec = _read_spec(_Reader(f"{reader.where} ({name!r})", reader.value("spec")))
        try:
            spec.validate(name)
        except LayerError as error:
            raise PlanError(f"{reader.where}: {error}") from None
    tied = reader.array("tied")
    if not all(isinstance(other, str) and len(other) <= _MAX_NAME for other in tied):
        raise reader.fail("tied", "a list of names", tied)
    layer = LayerPlan(
        name=name,
        type=reader.string("type"),
        spec=spec,
        scheme=None if reader.value("scheme") is None else reader.string("scheme"),
        rank=reader.optional_integer("rank", 1),
        reason=reader.string("reason"),
        energy=reader.optional_number("energy"),
        dense_params=reader.integer("dense_params", 0),
        dense_flops=reader.optional_integer("dense_flops"),
        params=reader.integer("params", 0),
        flops=reader.optional_integer("flops"),
        dense_latency_ms=reader.optional_number("dense_latency_ms"),
        latency_ms=reader.optional_number("latency_ms"),
        tied=tuple(tied),
    )
    _check_scheme(layer, reader.where)
    return layer


def _check_scheme(layer: LayerPlan, where: str) -> None:
    if (layer.scheme is None) != (layer.rank is None):
        raise PlanError(f"{where} ({layer.name!r}): scheme and rank go together")
    if layer.scheme is None or layer.rank is None:
        return
    if layer.scheme not in SCHEMES:
        raise PlanError(f"{where} ({layer.name!r}): unknown scheme {layer.scheme[:80]!r}")
    if layer.spec is None:
        raise PlanError(f"{where} ({layer.name!r}): a factorised layer needs its spec")
    scheme = SCHEMES[layer.scheme]
    refusal = scheme.refuses(layer.spec)
    if refusal:
        raise PlanError(f"{where} ({layer.name!r}): {refusal}")
    largest = scheme.matrix_shape(layer.spec).max_rank
    if layer.rank > largest:
        raise PlanError(
            f"{where} ({layer.name!r}): rank {layer.rank} exceeds the largest possible, {largest}"
        )
