"""Dense against compact on every runtime that is installed: what the fewer FLOPs really bring."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rankprune.errors import ConfigError, RankPruneError
from rankprune.export import batch_of, onnx_program
from rankprune.factorize import defactorize
from rankprune.fold import fold
from rankprune.latency import timings
from rankprune.layers import LayerSpec
from rankprune.low_rank import low_rank_layers
from rankprune.profile import ExampleInputs, count_bytes, profile
from rankprune.runtimes import BACKENDS, OnnxBackend, Run, Runtime
from rankprune.tables import format_count, format_ms, format_table

_SECONDS = 10.0
_KINDS = ("dense", "compact")
_TINY = LayerSpec(kind="linear", in_channels=1, out_channels=1, bias=False)


@dataclass(frozen=True)
class _Form:
    """A network in the form that a backend takes, and the size of its file."""

    source: nn.Module | Path
    bytes: int


def bench(
    compact: nn.Module,
    *,
    example_inputs: ExampleInputs,
    backends: Sequence[str] = (),
    threads: int | None = None,
    seconds: float = _SECONDS,
    memory: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time a factorised network against its dense self, by turns, on every backend.

    The dense network is the compact one with its factors multiplied out: the same answers, the
    dense network's cost. BatchNorm is folded in both, as whoever deploys them would do.

    Args:
        compact: a factorised network.
        example_inputs: what it is called with; their batch is what is measured.
        backends: names of `BACKENDS`; empty takes all that are installed.
        threads: of an operator; None for torch's number.
        seconds: of timed calls a backend, about.
        memory: also measure each network's peak memory, in a process of its own.
        note: told what comes next, and what could not be done.

    Returns:
        "batch", "threads", "flops_reduction", and "backends": for each "dense_ms", "compact_ms"
        (medians), "speedup", "realised" (speed-up over FLOPs reduction), "spread" (20th and 80th
        percentile of the speed-up of calls made one after the other), and for "dense" and "compact"
        percentiles in milliseconds, examples a second, "peak_bytes" and "file_bytes".

    Raises:
        ConfigError: nothing is factorised, or a backend is unknown or not installed.
    """
    if not low_rank_layers(compact):
        raise ConfigError("the model has no factorised layer; there is nothing to compare")
    names = list(backends) or [name for name, backend in BACKENDS.items() if backend.installed()]
    runtimes = [Runtime(backend=name, threads=threads).resolved() for name in names]
    for runtime in runtimes:
        runtime.environment()  # fails now where one is not installed
    networks = {"dense": defactorize(compact).eval(), "compact": compact.eval()}
    reduction = (
        profile(networks["dense"], example_inputs).flops / profile(compact, example_inputs).flops
    )
    results: dict[str, Any] = {}
    with _forms(networks, example_inputs) as form:
        for runtime in runtimes:
            note(f"{runtime.backend}: preparing")
            try:
                forms = {kind: form(kind, runtime) for kind in _KINDS}
                runs = {kind: _ready(runtime, forms[kind], example_inputs) for kind in _KINDS}
                note(f"{runtime.backend}: measuring")
                times = timings(runs, seconds, most=1000)
            except (RankPruneError, RuntimeError) as error:
                note(f"{runtime.backend}: left out: {error}")
                continue
            del runs
            results[runtime.backend] = _row(times, batch_of(example_inputs), reduction)
            for kind in _KINDS:
                row = results[runtime.backend][kind]
                row["file_bytes"] = forms[kind].bytes
                # compiling needs more than running, and would hide it
                counted = memory and runtime.backend != "compile"
                row["peak_bytes"] = (
                    _peak_bytes(runtime, forms[kind].source, example_inputs) if counted else None
                )
    return {
        "batch": batch_of(example_inputs),
        "threads": runtimes[0].threads,
        "flops_reduction": reduction,
        "environment": {r.backend: r.environment() for r in runtimes if r.backend in results},
        "backends": results,
    }


def bench_table(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = [("backend", "", "median", "p20", "p80", "p95", "examples/s", "file", "peak memory")]
    lines = []
    for name, row in result["backends"].items():
        for kind in _KINDS:
            entry = row[kind]
            peak = entry["peak_bytes"]
            rows.append(
                (
                    name,
                    kind,
                    format_ms(row[f"{kind}_ms"]),
                    *(format_ms(entry[key]) for key in ("p20_ms", "p80_ms", "p95_ms")),
                    f"{entry['examples_per_second']:.1f}",
                    format_count(entry["file_bytes"]) + "B",
                    "" if peak is None else format_count(peak) + "B",
                )
            )
        low, high = row["spread"]["p20"], row["spread"]["p80"]
        lines.append(
            f"{name}: {row['speedup']:.2f}× faster ({low:.2f} to {high:.2f}), "
            f"{row['realised']:.2f} of the {result['flops_reduction']:.2f}× fewer FLOPs realised"
        )
    where = f"batch {result['batch']}, {result['threads']} threads, fp32"
    return "\n".join([where, "", format_table(rows), "", *lines])


def _row(times: dict[str, list[float]], batch: int, reduction: float) -> dict[str, Any]:
    milliseconds = {kind: np.array(values) * 1e3 for kind, values in times.items()}
    medians = {kind: float(np.median(values)) for kind, values in milliseconds.items()}
    pairs = milliseconds["dense"] / milliseconds["compact"]
    speedup = statistics.median(pairs.tolist())
    row: dict[str, Any] = {
        "dense_ms": medians["dense"],
        "compact_ms": medians["compact"],
        "speedup": speedup,
        "realised": speedup / reduction,
        "spread": {f"p{p}": float(np.percentile(pairs, p)) for p in (20, 80)},
        "rounds": len(pairs),
    }
    for kind, values in milliseconds.items():
        row[kind] = {f"p{p}_ms": float(np.percentile(values, p)) for p in (20, 50, 80, 95)}
        row[kind]["examples_per_second"] = batch * 1e3 / medians[kind]
    return row


@contextmanager
def _forms(
    networks: dict[str, nn.Module], inputs: ExampleInputs
) -> Iterator[Callable[[str, Runtime], _Form]]:
    """Networks as the backends take them, each made once."""
    files: dict[str, Path] = {}
    folded: dict[str, nn.Module] = {}
    with tempfile.TemporaryDirectory(prefix="rankprune-") as folder:

        def form(kind: str, runtime: Runtime) -> _Form:
            if isinstance(BACKENDS[runtime.backend], OnnxBackend):
                if kind not in files:
                    path = Path(folder, f"{kind}.onnx")
                    onnx_program(networks[kind], inputs, dynamic_batch=False).save(path)
                    files[kind] = path
                found = Path(folder).glob(f"{kind}.onnx*")
                return _Form(files[kind], sum(file.stat().st_size for file in found))
            if kind not in folded:
                folded[kind] = fold(networks[kind], example_inputs=inputs)
            return _Form(folded[kind], count_bytes(networks[kind]))

        yield form


def _ready(runtime: Runtime, form: _Form, inputs: ExampleInputs) -> Run:
    backend = BACKENDS[runtime.backend]
    if isinstance(form.source, Path):
        assert isinstance(backend, OnnxBackend)
        return backend.load(form.source, inputs, runtime)
    return runtime.prepare(form.source, inputs)


def _peak_bytes(runtime: Runtime, source: nn.Module | Path, inputs: ExampleInputs) -> int | None:
    """Memory that loading and running a network takes, in a fresh process; None if it fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_watch, args=(sender, runtime, source, inputs))
    child.start()
    sender.close()
    try:
        found: int | None = receiver.recv()
    except EOFError:
        found = None
    child.join()
    return found


def _watch(sender: Any, runtime: Runtime, source: nn.Module | Path, inputs: ExampleInputs) -> None:
    # a module has arrived in memory already: its own size is added
    own = count_bytes(source) if isinstance(source, nn.Module) else 0
    # what a runtime needs for itself is not the network's
    runtime.prepare_chain([_TINY], (1, 1))()
    before = _forget_peak()
    run = _ready(runtime, _Form(source, 0), inputs)
    for _ in range(3):
        run()
    after = _status_bytes("VmHWM")
    sender.send(after - before + own if before is not None and after is not None else None)
    sender.close()


def _forget_peak() -> int | None:
    """Make Linux count this process's peak anew; memory now, or None elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), None)
