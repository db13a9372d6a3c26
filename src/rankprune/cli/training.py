"""`rankprune demo` and `rankprune train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rankprune.cli.shared import (
    Backend,
    Data,
    DryRun,
    Flops,
    Force,
    ImageSize,
    Json,
    Latency,
    Model,
    Out,
    Params,
    Rank,
    Scheme,
    Threads,
    app,
    make_progress,
    output,
)
from rankprune.errors import ConfigError


@app.command()
def demo(
    as_json: Json = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a small network on handwritten digits with and without TRP, decompose, compare."""
    with output(as_json) as show:
        from rankprune.recipes.demo import demo as run_demo

        report = run_demo(seed, make_progress())
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
        str | None,
        typer.Option(help="The set-up of Xu et al. 2019: paper (CIFAR-10) or paper-imagenet."),
    ] = None,
    scheme: Scheme = None,
    flops: Flops = None,
    params: Params = None,
    latency: Latency = None,
    rank: Rank = None,
    backend: Backend = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(help="Examples in a call when measuring.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps from projection to projection.")] = None,
    start: Annotated[
        float | None, typer.Option(help="First projection, as a share of the run.")
    ] = None,
    descent: Annotated[
        float | None, typer.Option(help="Share of the run in which a budget comes down.")
    ] = None,
    tail: Annotated[
        float | None, typer.Option(help="Share of the run, at its end, that trains the factors.")
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="Weight of the dense network's answers in the loss.")
    ] = None,
    match: Annotated[
        float | None, typer.Option(help="Weight of the blocks' errors against the dense network's.")
    ] = None,
    mirrored: Annotated[
        bool | None,
        typer.Option(help="Ask the dense network about mirror images too, for better answers."),
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
    schedule: Annotated[
        str | None, typer.Option(help="onecycle, cosine, multistep or constant.")
    ] = None,
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
    stream: Annotated[
        bool | None, typer.Option("--stream", help="Decode image files batch by batch.")
    ] = None,
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
    with output(as_json) as show:
        from rankprune.recipes import run as runs

        options = _options(flags, config, preset)
        if resume not in ("auto", "never"):
            raise ConfigError(f"--resume {resume!r}: auto or never")
        main = runs.is_main_process()
        if dry_run:
            plan = runs.preview(options, runs.load(options))
            document = None if plan is None else json.loads(plan.to_json())
            if main:
                show({"config": options.model_dump(), "plan": document}, plan or "a dense run")
            return
        progress = make_progress() if main else None
        report = runs.run(options, out, progress, resume=resume == "auto", force=force)
        if main:
            show(report.to_dict(), report)


def _options(flags: dict[str, Any], config: Path | None, preset: str | None) -> Any:
    """Flags, then the file, then the preset, then the defaults."""
    from rankprune.errors import near
    from rankprune.recipes.config import PRESETS, make_config, read_yaml
    from rankprune.recipes.models import is_trusted_name

    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; {near(preset, PRESETS)}")
    # typed by the user, who may have linked it
    file = read_yaml(config.resolve()) if config is not None else {}
    name = file.get("model")
    if "model" not in flags and isinstance(name, str) and not is_trusted_name(name):
        raise ConfigError(
            f"{config}: the model is the function {name!r}; rankprune runs no code that a file "
            f"names: confirm it with --model {name}"
        )
    layers = [dict(PRESETS[preset]) if preset else {}, file, flags]
    # a target of a higher layer replaces that of a lower one, whatever its kind
    targets = ("flops", "params", "latency", "rank")
    merged: dict[str, Any] = {}
    for layer in layers:
        if any(layer.get(key) is not None for key in targets):
            merged = {key: value for key, value in merged.items() if key not in targets}
        merged |= layer
    for key in ("data", "model"):
        if key not in merged:
            raise ConfigError(f"give --{key}, or {key} in the --config file")
    return make_config(merged)
