"""The training loop: its precision, its signals, its random numbers, and what it refuses."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankprune import ConfigError
from rankprune.recipes import process, run, train
from rankprune.recipes.config import TrainConfig, make_config
from rankprune.recipes.data import load_data
from rankprune.recipes.interrupt import Interrupted
from rankprune.recipes.models import build_model
from rankprune.recipes.randomness import random_state, seed_all, set_random_state
from rankprune.recipes.train import Progress, fit

DATA = load_data("fake", image_size=8)


def _config(**options: Any) -> TrainConfig:
    base = {"data": "fake", "image_size": 8, "model": "digits_cnn", "flops": 0.4, "epochs": 1}
    return make_config({**base, "batch_size": 128, **options})


def _model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("digits_cnn", classes=10, channels=3)


def test_validation_is_in_fp32_where_training_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "effective_precision", lambda asked, device: ("bf16", ""))
    model, seen = _model(), []

    def note(module: nn.Module, _: Any) -> None:
        seen.append((module.training, torch.is_autocast_enabled("cpu")))

    model[0].register_forward_pre_hook(note)
    fit(_config(method="dense", flops=None, precision="bf16"), DATA, model)
    assert set(seen) == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("options", "flip", "mirrored"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"augment": False}, True, False),
        ({"mirrored": False}, True, False),
        ({"mirrored": True}, False, True),
    ],
)
def test_the_teacher_sees_mirror_images_where_the_student_does(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], flip: bool, mirrored: bool
) -> None:
    made: list[bool] = []

    class Spy(train.Teacher):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(options["mirrored"])
            super().__init__(*args, **options)

    monkeypatch.setattr(train, "Teacher", Spy)
    fit(_config(baseline=True, **options), replace(DATA, flip=flip), _model(), teacher=_model())
    assert made == [mirrored]


def test_a_signal_in_the_last_validation_ends_the_run(tmp_path: Path) -> None:
    class Signalled(Progress):
        def epoch(self, record: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    config = _config()
    with pytest.raises(Interrupted):
        fit(config, DATA, _model(), folder=tmp_path, progress=Signalled())
    resumed = fit(config, DATA, _model(), folder=tmp_path)
    whole = fit(config, DATA, _model())
    states = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_random_numbers_go_on(tmp_path: Path) -> None:
    seed_all(3)
    random.gauss(0, 1)  # which keeps a second one for the next call
    np.random.standard_normal(3)
    torch.save(random_state(), tmp_path / "state.pt")

    def draw() -> list[float]:
        own = [random.gauss(0, 1), random.random(), *np.random.standard_normal(4)]
        return [*own, *torch.randn(3).tolist()]

    drawn = draw()
    seed_all(4)
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == drawn


@pytest.mark.parametrize(
    ("state", "backend", "complaint"),
    [
        ({"num_processes": 2, "device": torch.device("cpu")}, "onnxruntime", "this run has 2"),
        ({"num_processes": 1, "device": torch.device("cuda")}, "eager", "while the run trains on"),
    ],
)
def test_runtimes_that_cannot_measure_are_refused(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], backend: str, complaint: str
) -> None:
    monkeypatch.setattr(run, "process_state", lambda: SimpleNamespace(**state))
    with pytest.raises(ConfigError, match=complaint):
        run.preview(_config(flops=None, latency=0.5, backend=backend), DATA)


def test_a_model_that_cannot_take_the_images_is_refused(tmp_path: Path) -> None:
    config = _config(model="torchvision:alexnet")
    with pytest.raises(ConfigError, match=r"does not run on images of \(3, 8, 8\)"):
        run.preview(config, DATA)


@pytest.mark.parametrize(("found", "cpu"), [(None, True), ("mps", True), ("cuda", False)])
def test_accelerators_without_fp64_are_left_aside(
    monkeypatch: pytest.MonkeyPatch, found: str | None, cpu: bool
) -> None:
    device = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert process.on_cpu() is cpu
