"""What the commands share: the app, their common options, how results are shown."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from rankprune.errors import (
    BudgetError,
    ConfigError,
    FileError,
    MissingExtraError,
    PlanError,
    RankPruneError,
)

try:
    import typer
    from rich.console import Console
except ImportError:
    raise SystemExit(str(MissingExtraError("the command line", "typer", "cli"))) from None

if TYPE_CHECKING:
    from rankprune.budget import Budget
    from rankprune.latency import LatencyTable
    from rankprune.ranks import RankRule
    from rankprune.recipes.progress import RichProgress

app = typer.Typer(
    help="Train neural networks low-rank, then decompose them without loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and plan; write nothing.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the result.")]
Flops = Annotated[
    float | None, typer.Option(help="Budget: FLOPs as a fraction of the dense network's.")
]
Params = Annotated[
    float | None, typer.Option(help="Budget: parameters as a fraction of the dense network's.")
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="Rank rule instead of a budget: energy:0.98, ratio:0.5, fixed:8, threshold:0.1, "
        "relative:0.1, evbmf, stable:2."
    ),
]
Latency = Annotated[
    str | None,
    typer.Option(
        help="Budget: time as a fraction of the dense network's (0.5), or milliseconds (12ms)."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(help="Measure layers there: onnxruntime, openvino, compile or eager."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of an operator when measuring.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples in a call when measuring.")]
Scheme = Annotated[
    str | None,
    typer.Option(
        help="channel, spatial, decoupled, depthwise or linear for all layers; separable "
        "(decoupled or depthwise) or auto (the default): the best for each."
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(help="Round ranks up to a multiple of this; measured plans suit the kernels."),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="pytorchcv name (resnet20_cifar10), torchvision:NAME, timm:NAME, digits_cnn, or "
        "package.module:function."
    ),
]
Data = Annotated[
    str | None, typer.Option(help="digits, cifar10, cifar100, fake, or imagefolder:DIR.")
]
DataRoot = Annotated[str, typer.Option(help="Where torchvision's data sets lie.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a missing data set.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels.")]
InputSize = Annotated[str | None, typer.Option(help="Shape of an input, such as 3x224x224.")]
Classes = Annotated[int | None, typer.Option(min=1, help="Number of the model's outputs.")]
Weights = Annotated[
    Path | None,
    typer.Argument(
        help="Saved folder, .safetensors, state dict (.pt) or checkpoint; none: pretrained weights."
    ),
]


def fail(error: RankPruneError) -> NoReturn:
    err.print(f"error: {error}", markup=False, soft_wrap=True, style="red")
    signal = getattr(error, "signal", None)
    if signal is not None:
        raise SystemExit(128 + signal)
    codes = ((FileError, 3), (PlanError, 3), (BudgetError, 4), (ConfigError, 2))
    raise SystemExit(next((code for kind, code in codes if isinstance(error, kind)), 1))


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Any]:
    """Give a function that shows a result: JSON, or text and tables.

    Until then stdout leads to stderr, at the level of the operating system: libraries, also those
    in C++, print what they like, and stdout still holds nothing but the result.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)

    def restore() -> None:
        sys.stdout.flush()
        os.dup2(real, 1)

    def show(document: dict[str, Any], *parts: Any) -> None:
        restore()
        if as_json:
            print(json.dumps(document, allow_nan=False))
            return
        for part in parts:
            print(part)

    try:
        yield show
    finally:
        restore()
        os.close(real)


def read_target(
    flops: float | None, params: float | None, latency: str | None, rank: str | None
) -> RankRule | Budget:
    from rankprune.budget import Budget
    from rankprune.recipes.config import parse_latency, parse_rule

    budget = any(bound is not None for bound in (flops, params, latency))
    if budget == (rank is not None):
        raise ConfigError(
            "give a target: --flops, --params and/or --latency, or --rank, and not both"
        )
    if rank is not None:
        return parse_rule(rank)
    return Budget(flops=flops, params=params, **parse_latency(latency))


def read_runtime(backend: str | None, threads: int | None, *, needed: bool) -> LatencyTable | None:
    """The table that measures where the options say; ONNX Runtime where it must be somewhere."""
    if backend is None and not needed:
        return None
    from rankprune.latency import LatencyTable
    from rankprune.runtimes import Runtime

    def tell(done: int, total: int, what: str) -> None:
        if what:
            err.print(f"measuring layer {done + 1} of {total}: {what}", markup=False)

    runtime = Runtime(backend=backend or "onnxruntime", threads=threads)
    return LatencyTable(runtime, progress=tell)


def require_new(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file.

    Raises:
        FileError: it is there, and not forced.
    """
    if path.exists() and not force:
        raise FileError(f"{path}: exists already; choose another name or add --force")


def read_images(
    name: str | None,
    root: str,
    download: bool,
    size: int | None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """A data set, as the one that a saved model was trained on where its metadata tell."""
    from rankprune.recipes.compress import recorded_view
    from rankprune.recipes.data import load_data

    if name is None:
        return None
    view = recorded_view(metadata or {})
    if name.partition(":")[0] not in ("imagefolder", "fake"):
        view.pop("image_size", None)  # others are as they are
    if size is not None:
        view["image_size"] = size
    return load_data(name, root=root, download=download, **view)


def read_shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--input-size {text!r}: channels, height, width, such as 3x224x224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def make_progress() -> RichProgress:
    from rankprune.recipes.progress import RichProgress

    return RichProgress(err)
