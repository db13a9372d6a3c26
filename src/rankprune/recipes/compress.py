"""From weights to a compact model without training, and a look at what could be gained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.budget import Budget
from rankprune.calibrate import calibrate, recalibrate_bn
from rankprune.errors import ConfigError, FileError
from rankprune.factorize import factorize
from rankprune.latency import LatencyTable
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.ranks import EVBMF, Energy, RankRule, StableRank
from rankprune.recipes.batches import Normalise, eval_batches
from rankprune.recipes.data import ImageData, Subset
from rankprune.recipes.evaluate import evaluate
from rankprune.recipes.models import build_model, is_trusted_name
from rankprune.recipes.weights import load_weights, read_state_dict, require_dense
from rankprune.report import Report, report
from rankprune.schemes import Scheme, applicable
from rankprune.serialize import read_plan
from rankprune.survey import survey
from rankprune.tables import format_matrix

_CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Source:
    """A model with weights, and what is known about its inputs.

    Attributes:
        model: in eval mode.
        shape: C, H, W of an input image.
        metadata: what a saved model needs in order to be built again.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    metadata: Mapping[str, Any]

    def example_inputs(self, batch: int = 1) -> torch.Tensor:
        """Random pixels, the same every time; blank ones would hide differences."""
        if batch < 1:
            raise ConfigError(f"batch {batch}: a whole number ≥ 1")
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.shape, generator=generator)


def open_source(
    weights: Path | None,
    *,
    model: str | None = None,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    data: ImageData | None = None,
) -> Source:
    """Build a model and load its weights.

    Args:
        weights: a folder that rankprune saved, a state dict, a training checkpoint, or None for
            the model library's pretrained weights.
        model: its name; a saved folder knows it, unless it is the user's own function.
        shape: C, H, W of an input image; a saved folder or the data set knows it.
        classes: number of outputs; a saved folder or the data set knows it, else it is read off
            the weights.
        data: the data set that goes with it, if any.

    Raises:
        ConfigError: the name or the shape is not known.
        FileError: the weights are missing, damaged, or another model's.
    """
    metadata = recorded(weights)
    name = model or _recorded_name(metadata, weights)
    if data is not None:
        _check_alike(data, metadata, shape, classes)
        shape, classes = data.shape, len(data.classes)
    shape = shape or _recorded_shape(metadata, weights)
    if classes is None and isinstance(metadata.get("classes"), list):
        classes = len(metadata["classes"])
    if classes is None and type(metadata.get("outputs")) is int:
        classes = metadata["outputs"]
    if classes is None and weights is not None and weights.is_file():
        classes = _outputs(name, shape[0], weights)
    network = build_model(name, classes=classes, channels=shape[0], pretrained=weights is None)
    if weights is not None:
        network = load_weights(network, weights)
    metadata |= {"model": name, "shape": list(shape)}
    if classes is not None:
        metadata["outputs"] = classes
    if data is not None:
        data = normalised_as(data, metadata)
        metadata |= {
            "classes": list(data.classes),
            "mean": list(data.mean),
            "std": list(data.std),
        }
    return Source(network.eval(), shape, metadata)


def recorded(weights: Path | None) -> dict[str, Any]:
    """What a saved folder tells of its model; nothing of other weights.

    Raises:
        FileError: there is no such file or folder, or its plan is damaged.
    """
    if weights is None:
        return {}
    if not weights.exists():
        raise FileError(f"{weights}: no such file or folder")
    return dict(read_plan(weights).metadata) if weights.is_dir() else {}


def recorded_view(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How the data set was read that a saved model was trained on: arguments for `load_data`."""
    view: dict[str, Any] = {}
    shape = metadata.get("shape")
    if isinstance(shape, list) and len(shape) == 3 and type(shape[1]) is int and shape[1] > 0:
        view |= {"image_size": shape[1]} if shape[1] == shape[2] else {}
    fraction, seed = metadata.get("val_fraction"), metadata.get("seed")
    if isinstance(fraction, float) and 0 < fraction < 1 and type(seed) is int and seed >= 0:
        view |= {"val_fraction": fraction, "seed": seed}
    return view


def _check_alike(
    data: ImageData,
    metadata: Mapping[str, Any],
    shape: tuple[int, int, int] | None,
    classes: int | None,
) -> None:
    """Refuse a data set that contradicts what was asked for, or the classes trained on."""
    if shape is not None and shape != data.shape:
        raise ConfigError(f"inputs of {shape} were asked for, and the data set's are {data.shape}")
    if classes is not None and classes != len(data.classes):
        raise ConfigError(
            f"{classes} classes were asked for, and the data set has {len(data.classes)}"
        )
    known = metadata.get("classes")
    if isinstance(known, list) and known != list(data.classes):
        odd = next((str(name) for name in known if name not in data.classes), None)
        raise ConfigError(
            f"the model was trained on {len(known)} classes, the data set has {len(data.classes)}"
            + (f"; {odd!r} is not among them" if odd else "")
            + (", in another order" if sorted(map(str, known)) == sorted(data.classes) else "")
        )


def normalised_as(data: ImageData, metadata: Mapping[str, Any]) -> ImageData:
    """The data set with the normalisation that a saved model was trained with, if it is known."""
    mean, std = metadata.get("mean"), metadata.get("std")
    for values in (mean, std):
        known = isinstance(values, list) and len(values) == data.shape[0]
        if not known or not all(isinstance(value, float) for value in values or ()):
            return data
    return replace(data, mean=tuple(mean or ()), std=tuple(std or ()))


def compress(
    source: Source,
    target: RankRule | Budget,
    *,
    scheme: str = "auto",
    multiple_of: int | None = None,
    runtime: LatencyTable | None = None,
    batch: int = 1,
    data: ImageData | None = None,
    calib: ImageData | None = None,
    samples: int = 512,
) -> tuple[nn.Module, Plan, Report]:
    """Plan, factorise, and compare; with a data set also the accuracies on its test part.

    With a runtime the plan is measured there, on so many examples in a call. With a data set to
    calibrate with, so many of its training images decide by the error of the layers' outputs;
    BatchNorm's statistics are estimated anew on the same images.

    Raises:
        ConfigError: the source is factorised already.
        BudgetError: the budget cannot be met.
    """
    require_dense(source.model)
    inputs = source.example_inputs(batch)
    images = [] if calib is None else _some(normalised_as(calib, source.metadata), samples)
    stats = calibrate(source.model, images) if images else None
    # a budget weighs layers by what their errors do to the answers
    weighing = bool(images) and isinstance(target, Budget)
    by = calibrate(source.model, images, sensitivity=True) if weighing else stats
    plan = make_plan(
        source.model,
        target,
        scheme=scheme,
        example_inputs=inputs,
        stats=by,
        multiple_of=multiple_of,
        runtime=runtime,
    )
    compact = factorize(source.model, plan, stats=stats)
    if images:
        recalibrate_bn(compact, images)
    if data is not None:
        data = normalised_as(data, source.metadata)
    accuracies: dict[str, float | None] = {}
    if data is not None:
        for key, network in (("dense", source.model), ("compact", compact)):
            result = evaluate(network, data.test, data, device=torch.device("cpu"))
            accuracies[key] = result["accuracy"]
    summary = report(source.model, compact, example_inputs=inputs, plan=plan, accuracies=accuracies)
    return compact, plan, summary


def _some(data: ImageData, count: int) -> list[torch.Tensor]:
    """Training images as the model is called with them, the same every time."""
    if count < 1:
        raise ConfigError(f"{count} images to calibrate with: a whole number ≥ 1")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    normalise = Normalise(data, torch.device("cpu"))
    return [
        normalise(pixels)
        for pixels, _ in eval_batches(Subset(data.train, order[:count]), _CALIBRATION_BATCH)
    ]


def require_free(folder: Path, *, force: bool) -> None:
    """Refuse a folder that is in use.

    Raises:
        FileError: it is no folder, or not empty and not forced.
    """
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise FileError(f"{folder}: exists already; choose another --out or add --force")


def inspect_layers(source: Source, scheme: str = "auto") -> list[dict[str, Any]]:
    """Spectrum and effective ranks of every layer under every scheme that fits it.

    Returns:
        One mapping a layer and scheme: "name", "type", "scheme", "matrix", "max_rank",
        "break_even" (in parameters), "stable_rank", "effective_rank" (exponential of the spectrum's
        entropy; Roy and Vetterli 2007), "energy_90", "energy_98" and "evbmf" (ranks by these
        rules), and "values", the singular values. Layers that cannot be factorised have a "reason".
    """
    require_dense(source.model)
    rows: list[dict[str, Any]] = []
    for site in survey(source.model):
        row: dict[str, Any] = {"name": site.name, "type": type(site.module).__name__}
        schemes: list[Scheme] = []
        reason = site.obstacle
        if site.spec is not None and not site.obstacle:
            schemes, reason = applicable(site.spec, scheme)
        if not schemes:
            rows.append(row | {"reason": reason})
        for option in schemes:
            assert site.spec is not None
            spectrum = site.spectrum(option)
            rows.append(
                row
                | {
                    "scheme": option.name,
                    "matrix": format_matrix(spectrum.shape),
                    "max_rank": spectrum.shape.max_rank,
                    "break_even": math.ceil(site.spec.weight_numel / option.unit_params(site.spec)),
                    "stable_rank": StableRank().select(spectrum),
                    "effective_rank": round(_effective_rank(spectrum.values), 1),
                    "energy_90": Energy(0.9).select(spectrum),
                    "energy_98": Energy(0.98).select(spectrum),
                    "evbmf": EVBMF().select(spectrum),
                    "values": spectrum.values.square().sum(0).sqrt().tolist(),
                }
            )
    return rows


def plot_spectra(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every layer's singular values, relative to the largest, into a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileError: the picture cannot be written.
    """
    from rankprune.recipes.plots import spectra_figure

    figure = spectra_figure([row for row in rows if "values" in row])
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise FileError(f"{path}: cannot write: {error.strerror}") from None


def _effective_rank(values: torch.Tensor) -> float:
    share = values.square().sum(0)
    total = share.sum()
    if total == 0:
        return 1.0
    share = share.sqrt() / share.sqrt().sum()
    return float(torch.special.entr(share).sum().exp())


def _recorded_name(metadata: Mapping[str, Any], weights: Path | None) -> str:
    name = metadata.get("model")
    if not isinstance(name, str):
        raise ConfigError("give the model's name with --model; the weights do not tell it")
    if not is_trusted_name(name):
        raise ConfigError(
            f"{weights}: was saved from the function {name!r}; rankprune runs no code that a file "
            f"names: confirm it with --model {name}"
        )
    return name


def _recorded_shape(metadata: Mapping[str, Any], weights: Path | None) -> tuple[int, int, int]:
    shape = metadata.get("shape")
    if isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape):
        return shape[0], shape[1], shape[2]
    raise ConfigError(
        f"{weights or 'pretrained weights'}: the input's shape is not known; give --input-size, "
        "such as 3x224x224, or --data"
    )


def _outputs(name: str, channels: int, weights: Path) -> int | None:
    """Number of outputs by the weights, where it is not the model's own and all else fits."""
    usual = None
    try:
        model = build_model(name, classes=usual, channels=channels)
    except ConfigError:  # the user's own function may have to be told a number
        usual = 1000
        model = build_model(name, classes=usual, channels=channels)
    expected = model.state_dict()
    others = {
        len(value)
        for key, value in read_state_dict(weights).items()
        if value.dim() and key in expected and expected[key].shape != value.shape
    }
    return others.pop() if len(others) == 1 else usual
