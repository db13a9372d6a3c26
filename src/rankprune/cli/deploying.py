"""`rankprune report`, `bench` and `export`: what happens to a finished model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.shared import (
    Batch,
    Classes,
    Force,
    InputSize,
    Json,
    Model,
    Threads,
    app,
    err,
    output,
    read_shape,
    require_new,
)
from rankprune.errors import FileError, RankPruneError


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
    with output(as_json) as show:
        from rankprune.recipes.run import read_report
        from rankprune.report import Report

        if html is not None:
            require_new(html, force=force)
        documents = dict(zip(_run_names(runs), map(read_report, runs), strict=True))
        reports: dict[str, Report] = {}
        for name, document in documents.items():
            try:
                reports[name] = Report.from_dict(document)
            except FileError as error:
                raise FileError(f"{name}: {error}") from None
        if html is not None:
            from rankprune.files import write_atomically
            from rankprune.html import to_html

            write_atomically(html, to_html(list(reports.items())).encode())
            err.print(f"report written into {html}", markup=False, soft_wrap=True)
        if len(runs) == 1:
            show(*documents.values(), *reports.values())
        else:
            show({"runs": documents}, *(f"{name}\n\n{text}\n" for name, text in reports.items()))


@app.command()
def bench(
    weights: Annotated[Path, typer.Argument(help="Folder of a compressed model.")],
    model: Model = None,
    input_size: InputSize = None,
    batch: Batch = 1,
    classes: Classes = None,
    threads: Threads = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime, openvino, compile, eager; none: all that are installed."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of timed calls, for each backend.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Time a compressed model against its dense self on every installed runtime."""
    with output(as_json) as show:
        from rankprune.recipes.bench import bench as measure
        from rankprune.recipes.bench import bench_table
        from rankprune.recipes.compress import open_source

        source = open_source(weights, model=model, shape=read_shape(input_size), classes=classes)
        result = measure(
            source.model,
            example_inputs=source.example_inputs(batch),
            backends=backend or (),
            threads=threads,
            seconds=seconds,
            note=lambda text: err.print(text, markup=False, soft_wrap=True),
        )
        if not result["backends"]:
            raise RankPruneError(
                "nothing was measured: every backend was left out, for the reasons above"
            )
        show(result, bench_table(result))


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="Saved folder or weights file.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")],
    model: Model = None,
    input_size: InputSize = None,
    classes: Classes = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Fix the batch to this; none leaves it open.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX, folded, and proven against torch in ONNX Runtime."""
    with output(as_json) as show:
        from rankprune.export import OPSET, export_onnx
        from rankprune.fold import fold
        from rankprune.recipes.compress import open_source

        require_new(out, force=force)
        source = open_source(weights, model=model, shape=read_shape(input_size), classes=classes)
        inputs = source.example_inputs(batch or 1)
        network = fold(source.model, example_inputs=inputs)
        difference = export_onnx(
            network,
            out,
            example_inputs=inputs,
            dynamic_batch=batch is None,
            opset=opset or OPSET,
            reference=source.model,
        )
        size = out.stat().st_size
        document = {
            "file": str(out),
            "bytes": size,
            "opset": opset or OPSET,
            "dynamic_batch": batch is None,
            "difference": difference,
        }
        show(
            document,
            f"{out}: {size:,} bytes, opset {opset or OPSET}, batch "
            f"{'open' if batch is None else batch}; ONNX Runtime and torch differ by "
            f"{difference:.1e} of the largest output",
        )


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
