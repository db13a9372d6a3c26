"""ONNX files of a network, proven against torch before anyone sees them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rankprune.errors import (
    ConfigError,
    ExportError,
    MissingExtraError,
    RankPruneError,
    first_line,
    reason,
)
from rankprune.files import commit, reporting
from rankprune.fold import fold
from rankprune.multiplier import has_multipliers, without_multipliers
from rankprune.profile import ExampleInputs, arguments, call, evaluating

# Not the newest, so that runtimes of some age read it; it has every operator needed here.
OPSET = 20
# Batches on which a file is compared with torch, and how far the outputs may be apart.
CHECKED_BATCHES = (1, 2, 7)
TOLERANCE = 1e-4


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs,
    dynamic_batch: bool = True,
    opset: int = OPSET,
    check: bool = True,
    reference: nn.Module | None = None,
) -> float | None:
    """Write a network as ONNX, after comparing it with torch in ONNX Runtime.

    The network is exported in eval mode by `torch.onnx.export`, which folds BatchNorm into the
    convolution before it. Factors are ordinary `Conv`, `MatMul` and `Gemm` nodes, so no runtime
    needs custom code; of separable convolutions, depthwise ones with one kernel a channel, on the
    input several times over or summed up. Weights beyond protobuf's 2 GB lie beside the file, in
    `<name>.data`.

    Args:
        model: dense or factorised, in fp32; its modes are put back afterwards.
        path: the file; an older one is replaced as a whole or stays. (Beyond 2 GB it is two files,
            which are replaced one after the other.)
        example_inputs: what the model is called with, on its device: a tensor, a tuple of
            positional or a mapping of keyword arguments, with the batch in dimension 0.
        dynamic_batch: leave the batch open; False fixes it to the example's.
        opset: version of ONNX's operators.
        check: compare on batches of 1, 2 and 7, or on the example's alone where it is fixed.
        reference: what to compare with, such as the model before `fold`; None for the model itself.

    Returns:
        The largest difference from torch, relative to the largest output; None without check.

    Raises:
        ExportError: the network cannot be exported, or its answers differ by more than 1e-4.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        FileError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(model, f"{folder}/m.onnx", example_inputs=torch.randn(1, 8)) < 1e-5
        True
    """
    path = Path(path)
    program = onnx_program(model, example_inputs, dynamic_batch=dynamic_batch, opset=opset)
    with reporting(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder, and under its final name, which the weights beside it refer to
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as scratch:
            written = Path(scratch, path.name)
            program.save(written)
            difference = None
            if check:
                batches = CHECKED_BATCHES if dynamic_batch else (None,)
                difference = max(
                    onnx_difference(reference or model, written, example_inputs, n) for n in batches
                )
                if not difference <= TOLERANCE:
                    raise ExportError(
                        f"{path}: not written: ONNX Runtime's outputs differ from torch's by "
                        f"{difference:.1e} of the largest, more than {TOLERANCE:g}"
                    )
            for made in sorted(Path(scratch).iterdir(), key=lambda file: file.name == path.name):
                commit(made, path.with_name(made.name))
    return difference


def onnx_program(
    model: nn.Module, example_inputs: ExampleInputs, *, dynamic_batch: bool, opset: int = OPSET
) -> Any:
    """The network as torch's `ONNXProgram`.

    Raises:
        ExportError: torch cannot export it.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    _require("onnx", "onnxscript")
    # torch.export takes a batch of one for a constant
    inputs = with_batch(example_inputs, 2) if dynamic_batch else example_inputs
    args, kwargs = arguments(inputs)
    shapes = _dynamic(example_inputs) if dynamic_batch else None
    with evaluating(model), _quiet():
        model = _fast_form(model, inputs)
        try:
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(
                f"torch cannot export {type(model).__name__} to ONNX: {reason(error)}"
                + ("; try dynamic_batch=False" if dynamic_batch else "")
            ) from error
    assert program is not None
    return program


def _fast_form(model: nn.Module, inputs: ExampleInputs) -> nn.Module:
    """The model without channel multipliers, where that is to be had and answers alike."""
    if not has_multipliers(model):
        return model
    varied = with_batch(inputs, batch_of(inputs))  # blank ones would hide a difference
    try:
        # folded before, for the exporter sees no BatchNorm through a sum of parts
        made = fold(model, example_inputs=inputs)
        without_multipliers(made)
        with torch.no_grad():
            pairs = zip(tensors(call(made, varied)), tensors(call(model, varied)), strict=True)
            alike = all(_difference(ours, theirs) <= TOLERANCE for ours, theirs in pairs)
    except Exception:  # whatever a model does with its layers: it runs as it is
        return model
    return made if alike else model


def _difference(received: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    if received.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    wanted = expected.double().cpu()
    difference = float((received.double().cpu() - wanted).abs().max())
    return (
        difference / (float(wanted.abs().max()) or 1.0) if math.isfinite(difference) else math.inf
    )


def onnx_difference(
    model: nn.Module, path: Path, example_inputs: ExampleInputs, batch: int | None
) -> float:
    """Largest difference of ONNX Runtime from torch, relative to the largest output.

    Args:
        model: the network.
        path: its ONNX file.
        example_inputs: as in `export_onnx`.
        batch: number of examples, made by varying the given ones; None takes those.
    """
    inputs = example_inputs if batch is None else with_batch(example_inputs, batch)
    with evaluating(model), torch.no_grad():
        expected = tensors(call(model, inputs))
    try:
        session = onnx_session(path)
        received = session.run(None, feed(inputs, session))
    except RankPruneError:
        raise
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run what torch exported on a batch of {batch_of(inputs)}: "
            f"{first_line(error)}"
        ) from error
    if len(expected) != len(received):
        raise ExportError(f"{len(received)} outputs in ONNX, {len(expected)} in torch")
    worst = 0.0
    for ours, theirs in zip(expected, received, strict=True):
        if theirs.shape != ours.shape:
            raise ExportError(f"an output is {theirs.shape} in ONNX, {tuple(ours.shape)} in torch")
        worst = max(worst, _difference(torch.as_tensor(theirs), ours))
    return worst


def onnx_session(model: Path | bytes, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: a file, or its content.
        threads: that an operator may use; None for torch's number.
    """
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    # else the threads of a session that has just answered stay awake, and slow the next one down
    options.add_session_config_entry("session.force_spinning_stop", "1")
    content = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feed(inputs: ExampleInputs, session: Any) -> dict[str, Any]:
    """A session's inputs by name."""
    given = tensors(inputs)
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(given):
        raise ExportError(f"ONNX has the inputs {names}, the example has {len(given)} tensors")
    return {name: t.detach().cpu().numpy() for name, t in zip(names, given, strict=True)}


def with_batch(inputs: ExampleInputs, batch: int) -> Any:
    """The example inputs with another number of examples, all of them different.

    Floating-point inputs are varied by a tenth; whole numbers (tokens) are repeated as they are.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    size = batch_of(inputs)

    def resize(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() and len(value) == size):
            return value
        rows = value[torch.arange(batch, device=value.device) % size]
        if rows.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator, device="cpu")
            magnitude = rows.abs().mean()
            rows = rows + 0.1 * torch.where(magnitude > 0, magnitude, 1.0) * noise.to(rows)
        return rows

    return pytree.tree_map(resize, inputs if not isinstance(inputs, Mapping) else dict(inputs))


def batch_of(inputs: ExampleInputs) -> int:
    """Number of examples: dimension 0 of the first tensor."""
    tensor = next((t for t in tensors(inputs) if t.dim()), None)
    if tensor is None:
        raise ConfigError("example_inputs hold no tensor with a batch dimension")
    return len(tensor)


def _dynamic(inputs: ExampleInputs) -> Any:
    batch = torch.export.Dim("batch")
    size = batch_of(inputs)

    def shape(value: Any) -> Any:
        opened = isinstance(value, Tensor) and value.dim() and len(value) == size
        return {0: batch} if opened else None

    args, kwargs = arguments(inputs)
    return pytree.tree_map(shape, kwargs if kwargs else args)


def tensors(values: Any) -> list[Tensor]:
    """All tensors of a model's inputs or outputs, however they are nested."""
    if isinstance(values, Mapping):
        values = dict(values)
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError("ONNX export", package, "onnx") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress, and warns of what concerns its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
