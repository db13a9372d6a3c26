"""`rankprune compress`, `eval` and `inspect`: what needs no training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankprune.cli.shared import (
    Backend,
    Batch,
    Classes,
    Data,
    DataRoot,
    Download,
    DryRun,
    Flops,
    Force,
    ImageSize,
    InputSize,
    Json,
    Latency,
    Model,
    Multiple,
    Out,
    Params,
    Rank,
    Scheme,
    Threads,
    Weights,
    app,
    err,
    output,
    read_images,
    read_runtime,
    read_shape,
    read_target,
    require_new,
)
from rankprune.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from rankprune.report import Report

Calib = Annotated[
    str | None,
    typer.Option(
        help="Calibrate with a data set's training images, named as for --data; hf: models with "
        "text:FILE."
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Images (512) or windows of text (128) to calibrate with."),
]


@app.command()
def compress(
    out: Out,
    weights: Annotated[
        str | None,
        typer.Argument(
            help="Saved folder, .safetensors, state dict (.pt) or checkpoint; hf:DIR for a "
            "folder of transformers; none: pretrained weights."
        ),
    ] = None,
    model: Model = None,
    scheme: Scheme = None,
    flops: Flops = None,
    params: Params = None,
    latency: Latency = None,
    rank: Rank = None,
    backend: Backend = None,
    threads: Threads = None,
    batch: Batch = 1,
    multiple_of: Multiple = None,
    input_size: InputSize = None,
    classes: Classes = None,
    data: Data = None,
    data_root: DataRoot = "data",
    download: Download = False,
    image_size: ImageSize = None,
    calib: Calib = None,
    samples: Samples = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="hf: tokens in a window of text (1024).")
    ] = None,
    blockwise: Annotated[
        bool,
        typer.Option(
            "--blockwise", help="hf: fit each block to what the compressed ones before it return."
        ),
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="hf: block by block, for models larger than memory."),
    ] = False,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Decompose trained weights to a budget or by a rank rule, without training."""
    with output(as_json) as show:
        from rankprune.recipes import compress as recipe
        from rankprune.recipes import hf
        from rankprune.serialize import save

        target = read_target(flops, params, latency, rank)
        if not dry_run:
            recipe.require_free(out, force=force)
        if weights is not None and weights.startswith(hf.PREFIX):
            _refuse(
                "is not for hf: models",
                model=model,
                scheme=scheme,
                latency=latency,
                backend=backend,
                data=data,
                input_size=input_size,
                classes=classes,
                multiple_of=multiple_of,
                threads=threads,
                image_size=image_size,
                batch=None if batch == 1 else batch,
            )
            text = _read_text(calib)
            folder = Path(weights.removeprefix(hf.PREFIX))
            options: dict[str, Any] = {
                "text": text,
                "window": window or 1024,
                "windows": samples or 128,
            }
            if streaming:
                show(*_stream(folder, out, target, options, dry_run=dry_run))
                return
            language = hf.open_folder(folder)
            compact, plan, report = hf.compress(
                language, target, **options, blockwise=blockwise, progress=_count_windows
            )
            if not dry_run:
                from rankprune.integrations.huggingface import prepare

                hf.save(language, prepare(compact), out)
                _write_report(out, report)
            show(report.to_dict(), f"{plan}\n\n" + "\n".join(report.totals()))
            return
        _refuse(
            "is for hf: models",
            window=window,
            blockwise=blockwise or None,
            streaming=streaming or None,
        )
        file = None if weights is None else Path(weights)
        view = recipe.recorded(file)
        images = read_images(data, data_root, download, image_size, view)
        source = recipe.open_source(
            file,
            model=model,
            shape=read_shape(input_size),
            classes=classes,
            data=images,
        )
        table = read_runtime(backend, threads, needed=latency is not None)
        compact, plan, report = recipe.compress(
            source,
            target,
            scheme=scheme or "auto",
            multiple_of=multiple_of,
            runtime=table,
            batch=batch,
            data=images,
            calib=images
            if calib == data
            else read_images(calib, data_root, download, image_size, view),
            samples=samples or 512,
        )
        if not dry_run:
            save(compact, out, plan=plan, metadata=source.metadata, overwrite=force)
            _write_report(out, report)
        show(report.to_dict(), f"{plan}\n\n" + "\n".join(report.totals()))


def _write_report(out: Path, report: Report) -> None:
    from rankprune.files import write_atomically

    write_atomically(out / "report.json", json.dumps(report.to_dict(), indent=1).encode())


def _stream(
    folder: Path, out: Path, target: Any, options: dict[str, Any], *, dry_run: bool
) -> tuple[dict[str, Any], str]:
    """Compress block by block; what to show of it."""
    from rankprune.integrations.streaming import compress_streaming

    if dry_run or options["text"] is None:
        raise ConfigError("--streaming needs --calib text:FILE, and plans only as it writes")
    plan = compress_streaming(
        folder,
        out,
        target,
        **options,
        progress=lambda name: err.print(f"{name} is done", markup=False),
    )
    return json.loads(plan.to_json()), str(plan)


def _count_windows(done: int) -> None:
    if err.is_terminal:
        err.print(f"calibrated with {done} windows", end="\r")


def _refuse(why: str, **options: Any) -> None:
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ConfigError(f"--{given.replace('_', '-')} {why}")


def _read_text(calib: str | None) -> Path | None:
    if calib is None:
        return None
    kind, _, path = calib.partition(":")
    if kind != "text" or not path:
        raise ConfigError(f"--calib {calib!r}: hf: models are calibrated with text:FILE")
    return Path(path)


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
    with output(as_json) as show:
        import torch

        from rankprune.profile import count_bytes, profile
        from rankprune.recipes.compress import normalised_as, open_source, recorded
        from rankprune.recipes.evaluate import evaluate as measure

        if part not in ("test", "val", "train"):
            raise ConfigError(f"--part {part!r}: test, val or train")
        metadata = recorded(weights)
        images = read_images(data, data_root, download, image_size, metadata)
        if part != "test" and "val_fraction" not in metadata:
            err.print(
                "which images were kept back from training is not recorded; of a data set without "
                "such a part a tenth is taken"
            )
        source = open_source(weights, model=model, data=images)
        images = normalised_as(images, source.metadata)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = source.model.to(device)
        result: dict[str, Any] = dict(
            measure(network, getattr(images, part), images, device=device)
        )
        if not math.isfinite(result["loss"]):
            raise NumericsError(f"{weights}: the loss is {result['loss']}; the weights are no use")
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
    latency: Latency = None,
    rank: Rank = None,
    backend: Backend = None,
    threads: Threads = None,
    batch: Batch = 1,
    multiple_of: Multiple = None,
    input_size: InputSize = None,
    classes: Classes = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra into this PNG.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Each layer's spectrum and effective ranks, and what a budget or rule would do."""
    with output(as_json) as show:
        from rankprune.planner import make_plan
        from rankprune.recipes import compress as recipe

        if plot is not None:
            require_new(plot, force=force)
        source = recipe.open_source(
            weights, model=model, shape=read_shape(input_size), classes=classes
        )
        rows = recipe.inspect_layers(source, scheme or "auto")
        document: dict[str, Any] = {"layers": rows}
        parts: list[Any] = [_spectra_table(rows)]
        if any(bound is not None for bound in (flops, params, latency, rank)):
            plan = make_plan(
                source.model,
                read_target(flops, params, latency, rank),
                scheme=scheme or "auto",
                example_inputs=source.example_inputs(batch),
                multiple_of=multiple_of,
                runtime=read_runtime(backend, threads, needed=latency is not None),
            )
            document["plan"] = json.loads(plan.to_json())
            parts.append(str(plan))
        if plot is not None:
            recipe.plot_spectra(rows, plot)
            err.print(f"spectra drawn into {plot}", markup=False, soft_wrap=True)
        show(document, *parts)


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
