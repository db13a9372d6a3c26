"""Measured milliseconds: of single layers and what they may become, and of whole networks.

FLOPs do not tell how long a layer takes; a runtime does. `LatencyTable` measures every layer of a
network in the shape that it really runs, dense and factorised at several ranks, and interpolates
between them. A measurement is kept on disk and is good for every network with such a layer.

A layer alone is not a layer in its network: layouts change, memory is warm or cold. Sums over
layers therefore predict *differences*, which the whole network, measured dense and compact, scales.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rankprune.errors import ConfigError, FileError
from rankprune.export import batch_of
from rankprune.factorize import factor_skeleton
from rankprune.files import read_bytes, write_atomically
from rankprune.layers import LayerSpec
from rankprune.low_rank import low_rank_layers
from rankprune.plan import LayerPlan
from rankprune.profile import ExampleInputs
from rankprune.runtimes import Run, Runtime, alternate, fill_randomly
from rankprune.schemes import SCHEMES

DENSE = "dense"
# Changes with how runtimes are given a layer: times of another form are not this layer's.
_FOLDER = "latency-2"
# Ranks measured of one layer and scheme at most; those between are interpolated.
_RANKS = 10
_MAX_ENTRY_BYTES = 2**20
_LAYER_SECONDS, _NETWORK_SECONDS = 1.0, 6.0
# Another program's turn on the same core is many times as long as a layer, and stalls every thread
# of an operator: the quick calls tell what it takes.
_QUIET = 0.1


@dataclass(frozen=True)
class Request:
    """A layer to measure in one shape.

    Attributes:
        spec: the dense layer.
        shape: of its input.
        ranks: to measure, by scheme.
    """

    spec: LayerSpec
    shape: tuple[int, ...]
    ranks: Mapping[str, Sequence[int]]


class LatencyTable:
    """Milliseconds of layers on one runtime.

    Args:
        runtime: what to measure on.
        cache: folder of earlier measurements; None for `RANKPRUNE_CACHE` or the user's cache
            folder, "" to keep none.
        progress: called with the number of layer shapes done, their total, and what comes next.

    Attributes:
        measured, reused: layer variants that were timed, and that were found in the cache.

    Example:
        >>> table = LatencyTable(Runtime(backend="eager"), cache="")
        >>> spec = LayerSpec.of(nn.Linear(64, 64))
        >>> table.measure([Request(spec, (1, 64), {"linear": [8, 16]})])
        >>> table.dense(spec, [(1, 64)]) > 0, table.factorized(spec, "linear", 12, [(1, 64)]) > 0
        (True, True)
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        cache: str | os.PathLike[str] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self.runtime = runtime.resolved()
        self.measured = 0
        self.reused = 0
        self._progress = progress or (lambda done, total, what: None)
        self._folder = None
        if cache is None or str(cache):
            folder = default_cache() if cache is None else Path(cache)
            self._folder = folder / _FOLDER / self.runtime.fingerprint()
        self._entries: dict[tuple[LayerSpec, tuple[int, ...]], dict[str, float]] = {}

    def measure(self, requests: Iterable[Request]) -> None:
        """Measure what is asked for and is not known yet; equal layers once."""
        wanted: dict[tuple[LayerSpec, tuple[int, ...]], dict[str, None]] = {}
        for request in requests:
            key = _key(request.spec, request.shape)
            names = [_name(s, r) for s, ranks in request.ranks.items() for r in ranks]
            wanted.setdefault(key, {}).update(dict.fromkeys([DENSE, *names]))
        for done, (key, variants) in enumerate(wanted.items()):
            self._progress(done, len(wanted), _describe(*key))
            known = self._entries.setdefault(key, self._read(key))
            missing = [name for name in variants if name not in known]
            self.reused += len(variants) - len(missing)
            if missing:
                self._fill(key, known, missing)
        self._progress(len(wanted), len(wanted), "")

    def dense(self, spec: LayerSpec, shapes: Iterable[tuple[int, ...]]) -> float:
        """Milliseconds of all calls of a dense layer that `measure` has seen."""
        return sum(self._entries[_key(spec, shape)][DENSE] for shape in shapes)

    def factorized(
        self, spec: LayerSpec, scheme: str, rank: int, shapes: Iterable[tuple[int, ...]]
    ) -> float:
        """Milliseconds of all its calls once factorised; between measured ranks interpolated."""
        return sum(self._at(self._entries[_key(spec, shape)], scheme, rank) for shape in shapes)

    def knows(self, spec: LayerSpec, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether a layer was measured in all of these shapes."""
        return bool(shapes) and all(_key(spec, shape) in self._entries for shape in shapes)

    @staticmethod
    def sample(ranks: Sequence[int]) -> list[int]:
        """Those of the ascending ranks that are worth measuring, closer where they are small."""
        steps = np.geomspace(1, len(ranks), min(len(ranks), _RANKS)).round()
        return [ranks[int(step) - 1] for step in dict.fromkeys(steps)]

    # -- inside ----------------------------------------------------------------------------------

    def _at(self, entry: Mapping[str, float], scheme: str, rank: int) -> float:
        curve = sorted(
            (int(name.partition(":")[2]), value)
            for name, value in entry.items()
            if name.startswith(f"{scheme}:")
        )
        if not curve:
            raise ConfigError(f"no rank of scheme {scheme!r} was measured for this layer")
        measured = [rank for rank, _ in curve]
        # a rank can be padded to a larger one, so it is no slower than that: what is, was disturbed
        values = np.minimum.accumulate([value for _, value in reversed(curve)])[::-1]
        if rank > measured[-1]:
            return float(values[-1]) * rank / measured[-1]
        return float(np.interp(rank, measured, values))

    def _fill(
        self, key: tuple[LayerSpec, tuple[int, ...]], known: dict[str, float], missing: list[str]
    ) -> None:
        spec, shape = key
        calls: dict[str, Run] = {}
        # dense always takes part: it ties later measurements to the first ones
        for name in dict.fromkeys([DENSE, *missing]):
            calls[name] = self.runtime.prepare_chain(_specs(spec, name), shape)
        milliseconds = measure(calls, _LAYER_SECONDS)
        self.measured += len(missing)
        scale = known[DENSE] / milliseconds[DENSE] if DENSE in known else 1.0
        known.update({name: milliseconds[name] * scale for name in missing})
        self._write(key, known)

    def _path(self, key: tuple[LayerSpec, tuple[int, ...]]) -> Path | None:
        if self._folder is None:
            return None
        text = json.dumps([asdict(key[0]), key[1]])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def _read(self, key: tuple[LayerSpec, tuple[int, ...]]) -> dict[str, float]:
        """What the cache holds of a layer; nothing where it is damaged."""
        path = self._path(key)
        if path is None:
            return {}
        with contextlib.suppress(FileError, ValueError, RecursionError):
            document = json.loads(read_bytes(path, _MAX_ENTRY_BYTES))
            entry = document.get("milliseconds") if isinstance(document, dict) else None
            if isinstance(entry, dict) and DENSE in entry and all(map(_plausible, entry.items())):
                return entry
        return {}

    def _write(self, key: tuple[LayerSpec, tuple[int, ...]], entry: Mapping[str, float]) -> None:
        path = self._path(key)
        if path is None:
            return
        document = {
            "layer": asdict(key[0]),
            "shape": key[1],
            "environment": self.runtime.environment(),
            "milliseconds": entry,
        }
        # a cache that cannot be written costs time, not the result
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(document, indent=1).encode())


class Clock:
    """Times a network as it is, and as a plan would make it.

    Weights do not matter for that: the factors' are random.

    Args:
        model: the dense network.
        example_inputs: what it is called with.
        runtime: where.

    Attributes:
        dense_ms, compact_ms: of the last measurement, by turns; the 10th percentile of all calls.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, runtime: Runtime) -> None:
        self.runtime = runtime
        self._model = model
        self._inputs = example_inputs
        self._dense = runtime.prepare(model, example_inputs)
        self.dense_ms = self.compact_ms = measure({DENSE: self._dense})[DENSE]

    def result(self) -> dict[str, Any]:
        """The last measurement and what it depends on, as JSON values."""
        return {
            **self.runtime.environment(),
            "batch": batch_of(self._inputs),
            "dense_ms": self.dense_ms,
            "compact_ms": self.compact_ms,
        }

    def measure(self, layers: Sequence[LayerPlan]) -> None:
        """Time the network with these layers factorised, against the dense one."""
        planned = [layer for layer in layers if not layer.dense]
        if not planned:
            self.compact_ms = self.dense_ms
            return
        compact = copy.deepcopy(self._model)
        factor_skeleton(compact, planned)
        for layer in low_rank_layers(compact).values():
            fill_randomly(layer)
        run = self.runtime.prepare(compact, self._inputs)
        found = measure({DENSE: self._dense, "compact": run})
        self.dense_ms, self.compact_ms = found[DENSE], found["compact"]


def measure(calls: Mapping[str, Run], seconds: float = _NETWORK_SECONDS) -> dict[str, float]:
    """Milliseconds of every call on a quiet machine, measured by turns in about so many seconds."""
    found = timings(calls, seconds)
    return {name: float(np.quantile(values, _QUIET)) * 1e3 for name, values in found.items()}


def timings(
    calls: Mapping[str, Run], seconds: float, *, least: int = 5, most: int = 101
) -> dict[str, list[float]]:
    """Seconds of every call, by turns; the number of rounds follows from their duration."""
    for _ in range(2):  # the first round warms up, or compiles: it does not tell how long one takes
        begin = time.perf_counter()
        for run in calls.values():
            run()
        one_round = time.perf_counter() - begin
    rounds = math.ceil(seconds / one_round) if one_round > 0 else most
    return alternate(calls, min(max(rounds, least), most))


def default_cache() -> Path:
    """`RANKPRUNE_CACHE`, or `rankprune` in the user's cache folder."""
    own = os.environ.get("RANKPRUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankprune"


def _key(spec: LayerSpec, shape: Iterable[int]) -> tuple[LayerSpec, tuple[int, ...]]:
    # the BatchNorm after a layer becomes its bias; Conv1D computes what Linear does
    kind = "linear" if spec.kind == "hf_conv1d" else spec.kind
    return replace(spec, bias=True, kind=kind), tuple(shape)


def _name(scheme: str, rank: int) -> str:
    return f"{scheme}:{rank}"


def _specs(spec: LayerSpec, name: str) -> tuple[LayerSpec, ...]:
    if name == DENSE:
        return (spec,)
    scheme, _, rank = name.partition(":")
    return SCHEMES[scheme].factor_specs(spec, int(rank))


def _describe(spec: LayerSpec, shape: tuple[int, ...]) -> str:
    kernel = "×".join(map(str, spec.kernel_size))
    size = f"{spec.in_channels} → {spec.out_channels}"
    return " ".join(filter(None, [spec.kind, size, kernel, "on", "×".join(map(str, shape))]))


def _plausible(item: tuple[str, object]) -> bool:
    name, value = item
    known = name == DENSE or re.fullmatch(r"\w+:[1-9]\d{0,8}", name)
    return bool(known) and isinstance(value, float) and math.isfinite(value) and value > 0
