"""A whole run in a folder: train, project, factorise, prove, save."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.errors import ConfigError, FileError
from rankprune.factorize import factorize
from rankprune.files import is_temporary, read_bytes, reporting, write_atomically
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.recipes.batches import Normalise, check_batch
from rankprune.recipes.config import TrainConfig, make_config, read_yaml, to_yaml
from rankprune.recipes.data import ImageData, load_data
from rankprune.recipes.evaluate import evaluate
from rankprune.recipes.models import build_model
from rankprune.recipes.process import effective_precision, process_state
from rankprune.recipes.randomness import seed_all
from rankprune.recipes.train import (
    CHECKPOINT,
    METRICS,
    Progress,
    Trained,
    example_inputs,
    fit,
)
from rankprune.recipes.weights import load_weights, require_dense
from rankprune.report import Report, report
from rankprune.serialize import save

_MAX_REPORT_BYTES = 64 * 2**20
CONFIG = "config.yaml"
REPORT = "report.json"
BASELINE = "baseline"
# All that a run writes beside its options, and so all that replacing one removes.
_FILES = (REPORT, CHECKPOINT, METRICS)
_FOLDERS = ("compact", "projected", "dense", BASELINE)
# Options that change how a run proceeds, and not what comes out.
_FREE = {"workers", "checkpoint_every", "data_root", "download", "stream"}


def run(
    config: TrainConfig,
    folder: Path,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    force: bool = False,
) -> Report:
    """Train as configured, and leave the result in a folder.

    It holds then `compact/` and `projected/` (or `dense/`), `report.json`, `config.yaml`,
    `metrics.jsonl` and `checkpoint.pt`. Options, data, model and target are checked before the
    folder is touched.

    Args:
        config: the options.
        folder: where the run goes.
        progress: told about every step and epoch.
        resume: go on with this run, if it lies there; a finished one is only reported.
        force: replace a run that lies there. Only a run's own files are removed.

    Returns:
        The report, in every process of a distributed run.

    Raises:
        FileError: the folder is in use, and neither resumed nor forced.
        ConfigError: resumed with other options, or options that cannot work.
        BudgetError: the budget cannot be met.
        Interrupted: by a signal, after a checkpoint.
    """
    _check_folder(folder, config, resume=resume, force=force)
    if resume and (folder / REPORT).exists():
        return Report.from_dict(read_report(folder))
    data = load(config)
    if not (resume and (folder / CHECKPOINT).exists()):
        preview(config, data)  # a budget in time must not be measured, and missed, half-way
    # every process checks the folder before the first one changes it, and trains after that
    state = process_state()
    state.wait_for_everyone()
    if is_main_process() and not (resume and (folder / CONFIG).exists()):
        _prepare_folder(folder, config)
    state.wait_for_everyone()
    baseline: nn.Module | None = None
    if config.baseline and config.method == "trp":
        dense = config.model_copy(update={"method": "dense", "baseline": False})
        if is_main_process():
            (folder / BASELINE).mkdir(exist_ok=True)
        state.wait_for_everyone()
        trained, before = _train(dense, folder / BASELINE, data, progress)
        baseline = trained.model
    result, accuracies = _train(config, folder, data, progress, baseline)
    if baseline is not None:
        accuracies["dense"] = before["dense"]
    return _finish(config, folder, data, result, accuracies)


def preview(config: TrainConfig, data: ImageData) -> Plan | None:
    """What the run would aim at, from its initial weights; None for a dense run.

    Raises:
        ConfigError: options that cannot work with this data, model or device.
        BudgetError: the budget cannot be met.
    """
    state = process_state()
    effective_precision(config.precision, state.device)
    check_batch(data, config.batch_size, state.num_processes)
    model = _model(config, data)
    _check_answers(config, data, model)
    if config.method == "dense":
        return None
    _check_runtime(config)
    return make_plan(
        model,
        config.target(),
        scheme=config.scheme,
        example_inputs=example_inputs(data, batch=config.batch),
        multiple_of=config.multiple_of,
        runtime=config.runtime(),
    )


def _check_answers(config: TrainConfig, data: ImageData, model: nn.Module) -> None:
    """Some networks return more than logits while they are trained."""
    model.train()
    try:
        with torch.no_grad():
            answers: Any = model(example_inputs(data, batch=2))
    except Exception as error:
        raise ConfigError(
            f"model {config.model!r} does not run on images of {data.shape}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(answers, torch.Tensor):
        raise ConfigError(
            f"model {config.model!r} returns a {type(answers).__name__} in training, not logits; "
            "give a function of yours that builds it without: --model package.module:function"
        )


def _check_runtime(config: TrainConfig) -> None:
    """Refuse to measure where the training cannot."""
    runtime, state = config.runtime(), process_state()
    if runtime is None:
        return
    if state.num_processes > 1:
        raise ConfigError(
            f"latency and backend measure in one process, and this run has {state.num_processes}; "
            "give flops or params, or train in one process"
        )
    if state.device.type != "cpu" and runtime.backend in ("eager", "compile"):
        raise ConfigError(
            f"backend={runtime.backend} would measure on the CPU while the run trains on "
            f"{state.device}; give backend=onnxruntime or openvino"
        )


def load(config: TrainConfig) -> ImageData:
    """The data set of a run.

    Raises:
        ConfigError: it has no part to test with.
        FileError: as in `load_data`.
    """
    state = process_state()
    # of several processes the first one fetches, and the others find it
    first = state.local_main_process_first() if config.download else contextlib.nullcontext()
    with first:
        data = _load(config)
    if data.train is data.test:
        raise ConfigError(
            f"{config.data}: training would be tested with the images it has seen; sort them into "
            "train/CLASS/IMAGE and test/CLASS/IMAGE"
        )
    return data


def _load(config: TrainConfig) -> ImageData:
    return load_data(
        config.data,
        root=config.data_root,
        download=config.download,
        image_size=config.image_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        stream=config.stream,
    )


def is_main_process() -> bool:
    """Whether this process writes and prints; without torchrun it is the only one."""
    return process_state().is_main_process


def _check_folder(folder: Path, config: TrainConfig, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds anything but this run, or another one that may be replaced."""
    with reporting(folder, "read"):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise FileError(f"{folder}: exists and is not a folder")
        if all(is_temporary(path) for path in folder.iterdir()):
            return  # empty, or killed before its options were written
    before = _config_of(folder)
    if before is None:
        raise FileError(f"{folder}: holds something else than a run; choose another folder")
    if resume:
        _check_same(folder, before, config)
    elif not force:
        raise FileError(
            f"{folder}: holds a run already; go on with it by --resume auto, or replace it by "
            "--force"
        )


def _config_of(folder: Path) -> TrainConfig | None:
    """The options of the run in a folder, or None where there is none."""
    if not (folder / CONFIG).exists():
        return None
    try:
        options = read_yaml(folder / CONFIG)
        return make_config(options)
    except FileError:
        return None  # config.yaml is a common name; this one is another program's
    except ConfigError as error:
        if not {"data", "model"} <= options.keys():
            return None
        raise ConfigError(
            f"{folder}: its config.yaml is not of this version: {error}; choose another folder"
        ) from None


def _prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Remove an earlier run's files and no others, and write the options.

    Wherever this is killed, the folder is still that of a run: of the earlier one without results,
    or of the new one without any yet.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise FileError(f"{folder}: cannot prepare it: {error.strerror}") from None
    write_atomically(folder / CONFIG, to_yaml(config))


def read_report(folder: Path) -> dict[str, Any]:
    """A finished run's report.

    Raises:
        FileError: there is none, it cannot be read, or it is not JSON.
    """
    path = folder / REPORT if folder.is_dir() else folder
    if not path.is_file():
        raise FileError(f"{path}: no report there; has the run finished?")
    try:
        document = json.loads(read_bytes(path, _MAX_REPORT_BYTES))
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
        "val_fraction": config.val_fraction,
        "seed": config.seed,
    }


def _model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The network with the weights that the run starts from."""
    seed_all(config.seed)
    model = build_model(
        config.model,
        classes=len(data.classes),
        channels=data.shape[0],
        pretrained=config.pretrained,
    )
    if config.weights is not None:
        model = load_weights(model, Path(config.weights))
        require_dense(model)
    return model


def _train(
    config: TrainConfig,
    folder: Path,
    data: ImageData,
    progress: Progress | None,
    baseline: nn.Module | None = None,
) -> tuple[Trained, dict[str, float | None]]:
    model = _model(config, data)
    teacher = None
    if config.soft():
        teacher = _model(config, data) if baseline is None else baseline
    accuracies: dict[str, float | None] = {"dense": None, "projected": None, "compact": None}
    if config.method == "trp" and not config.baseline and (config.pretrained or config.weights):
        # what there was to lose: the starting point's accuracy
        accuracies["dense"] = _test(config, data, model)
    result = fit(config, data, model, teacher=teacher, folder=folder, progress=progress)
    if config.method == "dense":
        accuracies["dense"] = _test(config, data, result.model)
    return result, accuracies


def _test(config: TrainConfig, data: ImageData, model: nn.Module) -> float:
    """Accuracy on the test part, measured by all processes together."""
    state = process_state()
    return evaluate(
        model.to(state.device),
        data.test,
        data,
        device=state.device,
        rank=state.process_index,
        world=state.num_processes,
        workers=config.workers,
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
        accuracies["projected"] = _test(config, data, dense)
        accuracies["compact"] = _test(config, data, compact)
    else:
        accuracies["compact"] = accuracies["dense"]
    summary = report(
        dense,
        compact,
        # a real image: the outputs are compared on it
        example_inputs=Normalise(data, result.device)(data.test.fetch(0, train=False).unsqueeze(0)),
        plan=plan,
        accuracies=accuracies,
    )
    summary.environment["processes"] = result.world
    if result.is_main:
        _write(config, folder, data, dense, compact, plan, summary)
    return summary


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


def _check_same(folder: Path, before: TrainConfig, config: TrainConfig) -> None:
    old, new = before.model_dump(), config.model_dump()
    changed = [
        f"{key}: {old[key]!r} → {new[key]!r}"
        for key in new
        if key not in _FREE and old[key] != new[key]
    ]
    if changed:
        raise ConfigError(
            f"{folder}: cannot resume with other options ({', '.join(changed)}); use the same, or "
            "another --out"
        )
