"""`rankprune report`, `bench` and `export`: what happens to a finished model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rankprune.cli.shared import Force, Json, app, err, output
from rankprune.errors import FileError


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

        if html is not None and html.exists() and not force:
            raise FileError(f"{html}: exists already; choose another name or add --force")
        documents = dict(zip(_run_names(runs), map(read_report, runs), strict=True))
        reports = {name: Report.from_dict(document) for name, document in documents.items()}
        if html is not None:
            from rankprune.files import write_atomically
            from rankprune.html import to_html

            write_atomically(html, to_html(list(reports.items())).encode())
            err.print(f"report written into {html}", markup=False, soft_wrap=True)
        if len(runs) == 1:
            show(*documents.values(), *reports.values())
        else:
            show({"runs": documents}, *(f"{name}\n\n{text}\n" for name, text in reports.items()))


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
