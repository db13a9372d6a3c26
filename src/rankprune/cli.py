"""The command line: the only place that prints.

Results go to stdout, one JSON object and nothing else with --json; progress, tables beside JSON,
and errors go to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 bad input file, 4 target
missed, 130 / 143 interrupted after a checkpoint.

torch and everything that imports it is imported inside the commands, so that --help is quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
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
    from rankprune.ranks import RankRule
    from rankprune.recipes.train import Progress

app = typer.Typer(
    help="Train neural networks low-rank, then decompose them without loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_err = Console(stderr=True, highlight=False)

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
Scheme = Annotated[
    str | None, typer.Option(help="channel, spatial, decoupled, linear, or auto (the default).")
]
Multiple = Annotated[int, typer.Option(help="Round ranks up to a multiple of this.")]
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
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
InputSize = Annotated[str | None, typer.Option(help="Shape of an input, such as 3x224x224.")]
Classes = Annotated[int | None, typer.Option(help="Number of the model's outputs.")]
Weights = Annotated[
    Path | None,
    typer.Argument(
        help="Saved folder, .safetensors, state dict (.pt) or checkpoint; none: pretrained weights."
    ),
]


@app.command()
def demo(
    as_json: Json = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a small network on handwritten digits with and without TRP, decompose, compare."""
    with _output(as_json) as show:
        from rankprune.recipes.demo import demo as run_demo

        report = run_demo(seed, _progress())
        show(report.to_dict(), report)


@app.command()
def train(
    out: Out,
    data: Data = None,
    model: Model = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with options; flags go before it.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper: the set-up of Xu et al. 2019 for CIFAR-10.")
    ] = None,
    scheme: Scheme = None,
    flops: Flops = None,
    params: Params = None,
    rank: Rank = None,
    every: Annotated[int | None, typer.Option(help="Steps from projection to projection.")] = None,
    start: Annotated[
        float | None, typer.Option(help="First projection, as a share of the run.")
    ] = None,
    descent: Annotated[
        float | None, typer.Option(help="Share of the run in which a budget comes down.")
    ] = None,
    nuclear: Annotated[float | None, typer.Option(help="Weight of the nuclear norm.")] = None,
    nuclear_mode: Annotated[str | None, typer.Option(help="gradient or decoupled.")] = None,
    nuclear_when: Annotated[str | None, typer.Option(help="projection or step.")] = None,
    multiple_of: Annotated[
        int | None, typer.Option(help="Round ranks up to a multiple of this.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of one optimizer step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its highest.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimizer.")] = None,
    schedule: Annotated[str | None, typer.Option(help="onecycle, cosine or multistep.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of the loss.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share of the training images kept for validation.")
    ] = None,
    augment: Annotated[bool | None, typer.Option(help="Crop and flip training images.")] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained", help="Start from the library's weights.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Start from these weights.")] = None,
    method: Annotated[str | None, typer.Option(help="trp, or dense for a plain run.")] = None,
    baseline: Annotated[
        bool | None, typer.Option("--baseline", help="Train a dense network alike, to compare.")
    ] = None,
    data_root: Annotated[
        str | None, typer.Option(help="Where torchvision's data sets lie.")
    ] = None,
    download: Annotated[
        bool | None, typer.Option("--download", help="Fetch a missing data set.")
    ] = None,
    image_size: ImageSize = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare batches.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on with what lies in --out; never: refuse.")
    ] = "never",
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train with TRP to a budget or a rank rule, decompose, prove, save."""
    flags = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in locals().items()
        if value is not None
        and key not in ("out", "config", "preset", "resume", "dry_run", "force", "as_json")
    }
    with _output(as_json) as show:
        from rankprune.recipes import run as runs

        options = _options(flags, config, preset)
        if resume not in ("auto", "never"):
            raise ConfigError(f"--resume {resume!r}: auto or never")
        if dry_run:
            plan = runs.preview(options, runs.load(options))
            document = None if plan is None else json.loads(plan.to_json())
            show({"config": options.model_dump(), "plan": document}, plan or "a dense run")
            return
        main = runs.is_main_process()
        progress = _progress() if main else None
        report = runs.run(options, out, progress, resume=resume == "auto", force=force)
        if main:
            show(report.to_dict(), report)


@app.command()
def compress(
    out: Out,
    weights: Weights = None,
    model: Model = None,
    scheme: Scheme = None,
    flops: Flops = None,
    params: Params = None,
    rank: Rank = None,
    multiple_of: Multiple = 1,
    input_size: InputSize = None,
    classes: Classes = None,
    data: Data = None,
    data_root: DataRoot = "data",
    download: Download = False,
    image_size: ImageSize = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Decompose trained weights to a budget or by a rank rule, without training."""
    with _output(as_json) as show:
        from rankprune.recipes import compress as recipe
        from rankprune.serialize import save

        target = _target(flops, params, rank)
        if not dry_run:
            recipe.require_free(out, force=force)
        images = _images(data, data_root, download, image_size)
        source = recipe.open_source(
            weights, model=model, shape=_shape(input_size), classes=classes, data=images
        )
        compact, plan, report = recipe.compress(
            source, target, scheme=scheme or "auto", multiple_of=multiple_of, data=images
        )
        if not dry_run:
            save(compact, out, plan=plan, metadata=source.metadata, overwrite=force)
        show(report.to_dict(), f"{plan}\n\n" + "\n".join(report.totals()))


@app.command(name="eval")
def evaluate(
    weights: Annotated[Path, typer.Argument(help="Saved folder or weights file.")],
    data: Annotated[str, typer.Option(help="Data set to evaluate on.")],
    model: Model = None,
    data_root: DataRoot = "data",
    download: Download = False,
    image_size: ImageSize = None,
    part: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    as_json: Json = False,
) -> None:
    """Accuracy of saved weights on a data set, in fp32."""
    with _output(as_json) as show:
        import torch

        from rankprune.profile import count_bytes, profile
        from rankprune.recipes.compress import normalised_as, open_source
        from rankprune.recipes.evaluate import evaluate as measure

        if part not in ("test", "val", "train"):
            raise ConfigError(f"--part {part!r}: test, val or train")
        images = _images(data, data_root, download, image_size)
        assert images is not None
        source = open_source(weights, model=model, data=images)
        images = normalised_as(images, source.metadata)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = source.model.to(device)
        result: dict[str, Any] = dict(
            measure(network, getattr(images, part), images, device=device)
        )
        cost = profile(network, source.example_inputs().to(device))
        result |= {"params": cost.params, "flops": cost.flops, "bytes": count_bytes(network)}
        show(
            result,
            f"accuracy {result['accuracy']:.2%}, top-5 {result['top5']:.2%}, loss "
            f"{result['loss']:.4f} on {result['images']} images; {cost.params:,} parameters, "
            f"{cost.flops:,} FLOPs",
        )


@app.command()
def inspect(
    weights: Weights = None,
    model: Model = None,
    scheme: Scheme = None,
    flops: Flops = None,
    params: Params = None,
    rank: Rank = None,
    multiple_of: Multiple = 1,
    input_size: InputSize = None,
    classes: Classes = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra into this PNG.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Each layer's spectrum and effective ranks, and what a budget or rule would do."""
    with _output(as_json) as show:
        from rankprune.planner import make_plan
        from rankprune.recipes import compress as recipe

        if plot is not None and plot.exists() and not force:
            raise FileError(f"{plot}: exists already; choose another name or add --force")
        source = recipe.open_source(weights, model=model, shape=_shape(input_size), classes=classes)
        rows = recipe.inspect_layers(source, scheme or "auto")
        document: dict[str, Any] = {"layers": rows}
        parts: list[Any] = [_spectra_table(rows)]
        if flops is not None or params is not None or rank is not None:
            plan = make_plan(
                source.model,
                _target(flops, params, rank),
                scheme=scheme or "auto",
                example_inputs=source.example_inputs(),
                multiple_of=multiple_of,
            )
            document["plan"] = json.loads(plan.to_json())
            parts.append(str(plan))
        if plot is not None:
            recipe.plot_spectra(rows, plot)
            _err.print(f"spectra drawn into {plot}")
        show(document, *parts)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of finished runs, or their report.json."),
    ],
    html: Annotated[
        Path | None, typer.Option(help="Write one page with tables and drawings into this file.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show the reports of finished runs; as HTML also compared with each other."""
    with _output(as_json) as show:
        from rankprune.recipes.run import read_report
        from rankprune.report import Report

        if html is not None and html.exists() and not force:
            raise FileError(f"{html}: exists already; choose another name or add --force")
        documents = dict(zip(_run_names(runs), map(read_report, runs), strict=True))
        reports = {name: Report.from_dict(document) for name, document in documents.items()}
        if html is not None:
            from rankprune.files import write_atomically
            from rankprune.html import to_html

            write_atomically(html, to_html(list(reports.items())).encode())
            _err.print(f"report written into {html}", markup=False, soft_wrap=True)
        if len(runs) == 1:
            show(*documents.values(), *reports.values())
        else:
            show({"runs": documents}, *(f"{name}\n\n{text}\n" for name, text in reports.items()))


def main() -> None:
    """Entry point; every error on purpose ends in one line and an exit code."""
    try:
        app()
    except RankPruneError as error:
        _fail(error)
    except KeyboardInterrupt:
        _err.print("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:
        # the reader of our output has gone, as in `rankprune … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


# -- inside --------------------------------------------------------------------------------------


def _fail(error: RankPruneError) -> NoReturn:
    _err.print(f"error: {error}", markup=False, soft_wrap=True, style="red")
    signal = getattr(error, "signal", None)
    if signal is not None:
        raise SystemExit(128 + signal)
    codes = ((FileError, 3), (PlanError, 3), (BudgetError, 4), (ConfigError, 2))
    raise SystemExit(next((code for kind, code in codes if isinstance(error, kind)), 1))


@contextlib.contextmanager
def _output(as_json: bool) -> Iterator[Any]:
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


def _options(flags: dict[str, Any], config: Path | None, preset: str | None) -> Any:
    """Flags, then the file, then the preset, then the defaults."""
    from rankprune.errors import near
    from rankprune.recipes.config import PRESETS, make_config, read_yaml

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; {near(preset, PRESETS)}")
    layers = [
        dict(PRESETS[preset]) if preset else {},
        read_yaml(config) if config is not None else {},
        flags,
    ]
    # a target of a higher layer replaces that of a lower one, whatever its kind
    targets = ("flops", "params", "rank")
    merged: dict[str, Any] = {}
    for layer in layers:
        if any(layer.get(key) is not None for key in targets):
            merged = {key: value for key, value in merged.items() if key not in targets}
        merged |= layer
    for key in ("data", "model"):
        if key not in merged:
            raise ConfigError(f"give --{key}, or {key} in the --config file")
    return make_config(merged)


def _target(flops: float | None, params: float | None, rank: str | None) -> RankRule | Budget:
    from rankprune.budget import Budget
    from rankprune.recipes.config import parse_rule

    budget = flops is not None or params is not None
    if budget == (rank is not None):
        raise ConfigError("give a target: --flops and/or --params, or --rank, and not both")
    return parse_rule(rank) if rank is not None else Budget(flops=flops, params=params)


def _images(name: str | None, root: str, download: bool, size: int | None) -> Any:
    from rankprune.recipes.data import load_data

    if name is None:
        return None
    return load_data(name, root=root, download=download, image_size=size)


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--input-size {text!r}: channels, height, width, such as 3x224x224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _run_names(runs: list[Path]) -> list[str]:
    """What to call each run: its folder or file, or its path where two of them have one name."""
    paths = [Path(os.path.abspath(run)) for run in runs]
    homes = [path.parent if path.name == "report.json" else path for path in paths]
    short = [home.stem if home.suffix == ".json" else home.name for home in homes]
    names: list[str] = []
    for run, name in zip(runs, short, strict=True):
        unique = whole = name if name and short.count(name) == 1 else str(run)
        number = 1
        while unique in names:
            number += 1
            unique = f"{whole} ({number})"
        names.append(unique)
    return names


def _spectra_table(rows: list[dict[str, Any]]) -> str:
    from rankprune.tables import format_table

    columns = {
        "layer": "name",
        "type": "type",
        "scheme": "scheme",
        "matrix": "matrix",
        "max rank": "max_rank",
        "break-even": "break_even",
        "stable": "stable_rank",
        "effective": "effective_rank",
        "90 %": "energy_90",
        "98 %": "energy_98",
        "EVBMF": "evbmf",
        "dense because": "reason",
    }
    cells = [[str(row.get(key, "")) for key in columns.values()] for row in rows]
    return format_table([list(columns), *cells])


def _progress() -> Progress:
    from rankprune.recipes.progress import RichProgress

    return RichProgress(_err)


if __name__ == "__main__":
    main()
