"""A whole run in a folder: train, project, factorise, prove, save."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.errors import ConfigError, FileError, RankPruneError
from rankprune.factorize import factorize
from rankprune.plan import Plan
from rankprune.recipes.config import TrainConfig, make_config, read_yaml, to_yaml
from rankprune.recipes.data import ImageData, load_data
from rankprune.recipes.evaluate import evaluate
from rankprune.recipes.models import build_model
from rankprune.recipes.train import CHECKPOINT, Progress, Trained, fit
from rankprune.recipes.weights import load_weights
from rankprune.report import Report, report
from rankprune.serialize import save, write_atomically

CONFIG = "config.yaml"
REPORT = "report.json"
# Options that change how a run proceeds, and not what comes out.
_FREE = {"workers", "checkpoint_every", "data_root", "download"}


def prepare_folder(folder: Path, config: TrainConfig, *, resume: bool, force: bool) -> None:
    """Make the run's folder, with the resolved options in it.

    Args:
        folder: where the run goes.
        config: its options.
        resume: continue what lies there, if it is this run.
        force: remove what lies there.

    Raises:
        FileError: the folder is not empty, and neither resumed nor forced.
        ConfigError: resumed with other options.
    """
    if not is_main_process():
        return  # the others join once the training starts
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder}: exists and is not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / CONFIG).exists() and resume:
            _check_same(folder, config)
            return
        if not force:
            advice = "continue it with --resume auto, or " if (folder / CONFIG).exists() else ""
            raise FileError(f"{folder}: exists and is not empty; {advice}start anew with --force")
        if not (folder / CONFIG).exists():
            raise FileError(
                f"{folder}: holds no run, so --force does not remove it; choose another"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot create it: {error.strerror}") from None
    write_atomically(folder / CONFIG, to_yaml(config))


def is_main_process() -> bool:
    """Whether this is the process of a torchrun job that writes and prints; alone, it is."""
    return int(os.environ.get("RANK", "0")) == 0


def run(config: TrainConfig, folder: Path, progress: Progress | None = None) -> Report:
    """Train as configured, in a folder that `prepare_folder` has made.

    It leaves there

    `compact/` and `projected/` (or `dense/`), `report.json`, `config.yaml`, `metrics.jsonl` and
    `checkpoint.pt`. A run that lies there unfinished goes on from its checkpoint.

    Raises:
        Interrupted: by a signal, after a checkpoint.
    """
    progress = progress or Progress()
    try:
        return _run(config, folder, progress)
    except RankPruneError:
        # a run that could not begin leaves nothing that would stop the next one
        if is_main_process() and not any(folder.rglob(CHECKPOINT)):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(config: TrainConfig, folder: Path, progress: Progress) -> Report:
    data = _data(config)
    baseline = None
    if config.baseline and config.method == "trp":
        dense = config.model_copy(update={"method": "dense", "baseline": False})
        if is_main_process():
            (folder / "baseline").mkdir(exist_ok=True)
            write_atomically(folder / "baseline" / CONFIG, to_yaml(dense))
        _, accuracies = _train(dense, folder / "baseline", data, progress)
        baseline = accuracies["dense"]
    result, accuracies = _train(config, folder, data, progress)
    if baseline is not None:
        accuracies["dense"] = baseline
    return _finish(config, folder, data, result, accuracies)


def read_report(folder: Path) -> dict[str, Any]:
    """A finished run's report.

    Raises:
        FileError: there is none, or it is not JSON.
    """
    path = folder / REPORT if folder.is_dir() else folder
    if not path.is_file():
        raise FileError(f"{path}: no report there; has the run finished?")
    try:
        document = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(document, dict) or "compact" not in document:
        raise FileError(f"{path}: not a rankprune report")
    return document


def saved_metadata(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """What a saved model needs in order to be built and evaluated again."""
    return {
        "model": config.model,
        "classes": list(data.classes),
        "shape": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def _data(config: TrainConfig) -> ImageData:
    return load_data(
        config.data,
        root=config.data_root,
        download=config.download,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )


def _train(
    config: TrainConfig, folder: Path, data: ImageData, progress: Progress
) -> tuple[Trained, dict[str, float | None]]:
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    model = build_model(
        config.model,
        classes=len(data.classes),
        channels=data.shape[0],
        pretrained=config.pretrained,
    )
    if config.weights is not None:
        model = load_weights(model, Path(config.weights))
    accuracies: dict[str, float | None] = {"dense": None, "projected": None, "compact": None}
    if config.method == "trp" and not config.baseline and (config.pretrained or config.weights):
        # what there was to lose: the starting point's accuracy
        accuracies["dense"] = evaluate(model, data.test, data, device=torch.device("cpu"))[
            "accuracy"
        ]
    result = fit(config, data, model, folder=folder, progress=progress)
    if config.method == "dense":
        accuracies["dense"] = _test(result, result.model, data)
    return result, accuracies


def _test(result: Trained, model: nn.Module, data: ImageData) -> float:
    return evaluate(
        model, data.test, data, device=result.device, rank=result.rank, world=result.world
    )["accuracy"]


def _finish(
    config: TrainConfig,
    folder: Path,
    data: ImageData,
    result: Trained,
    accuracies: dict[str, float | None],
) -> Report:
    dense, plan = result.model.eval(), result.plan
    compact = dense if plan is None else factorize(dense, plan)
    if plan is not None:
        accuracies["projected"] = _test(result, dense, data)
        accuracies["compact"] = _test(result, compact, data)
    else:
        accuracies["compact"] = accuracies["dense"]
    summary = report(
        dense,
        compact,
        example_inputs=_probe(data).to(result.device),
        plan=plan,
        accuracies=accuracies,
    )
    if result.is_main:
        _write(config, folder, data, dense, compact, plan, summary)
    return summary


def _probe(data: ImageData) -> torch.Tensor:
    """One real test image: FLOPs are those of any, the outputs are compared on it."""
    image = torch.stack(data.test.fetch([0], train=False)).float() / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return (image - mean) / std


def _write(
    config: TrainConfig,
    folder: Path,
    data: ImageData,
    dense: nn.Module,
    compact: nn.Module,
    plan: Plan | None,
    summary: Report,
) -> None:
    metadata = saved_metadata(config, data)
    if plan is None:
        save(dense, folder / "dense", metadata=metadata, overwrite=True)
    else:
        save(dense, folder / "projected", metadata=metadata, overwrite=True)
        save(compact, folder / "compact", plan=plan, metadata=metadata, overwrite=True)
    write_atomically(folder / REPORT, json.dumps(summary.to_dict(), indent=1).encode())


def _check_same(folder: Path, config: TrainConfig) -> None:
    before = make_config(read_yaml(folder / CONFIG)).model_dump()
    now = config.model_dump()
    changed = [
        f"{key}: {before[key]!r} → {now[key]!r}"
        for key in now
        if key not in _FREE and before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"{folder}: cannot resume with other options ({', '.join(changed)}); use the same, or "
            "another --out"
        )
