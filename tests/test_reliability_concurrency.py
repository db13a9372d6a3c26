"""Several processes at one folder: nobody sees a half-written model, and none is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
from cases import mlp
from conftest import Trials
from rankprune.latency import LatencyTable, Request
from runs import FORKS, equal, exit_code, in_child

pytestmark = [pytest.mark.slow, *FORKS]


def _start(*calls: Callable[[], Any]) -> list[int]:
    return [in_child(call) for call in calls]


def _end(children: list[int]) -> None:
    assert [exit_code(child) for child in children] == [0] * len(children)


def _models() -> list[nn.Module]:
    """Of different ranks, so that one's weights do not fit the other's plan."""
    torch.manual_seed(0)
    model = mlp()
    plans = [rp.make_plan(model, rp.Ratio(share), guard=False) for share in (0.2, 0.35, 0.5)]
    return [rp.factorize(model, plan) for plan in plans]


def _which(folder: Path, states: list[dict[str, torch.Tensor]]) -> int:
    """Which of the models loads; all of it must be that model's."""
    state = rp.load(mlp(), folder).state_dict()
    (found,) = [index for index, other in enumerate(states) if equal(state, other)]
    return found


def test_readers_and_writers(tmp_path: Path, trials: Trials) -> None:
    """Three processes save to one folder, two load from it: always one whole model."""
    models = _models()
    states = [model.state_dict() for model in models]
    rp.save(models[0], tmp_path)
    rounds = 300 if trials.full else 60
    notes = tmp_path.parent / "notes"
    notes.mkdir()

    def write(model: nn.Module) -> None:
        for saves in range(100 * rounds):
            # as long as it takes for both readers to have met at least two of the models
            if saves >= rounds and len(list(notes.glob("met*"))) == 2:
                break
            rp.save(model, tmp_path, overwrite=True)

    def read(name: str) -> None:
        seen = [0] * len(models)
        while not (notes / "stop").exists():
            seen[_which(tmp_path, states)] += 1
            if sum(count > 0 for count in seen) == 2:
                (notes / f"met{name}").touch()
        (notes / f"loads{name}").write_text(str(sum(seen)))

    writers = _start(*(lambda model=model: write(model) for model in models))  # type: ignore[misc]
    readers = _start(lambda: read("0"), lambda: read("1"))
    try:
        _end(writers)
    finally:
        (notes / "stop").touch()
        _end(readers)
    assert len(list(notes.glob("met*"))) == 2
    loads = sum(int(path.read_text()) for path in notes.glob("loads*"))
    trials.tried = trials.held = loads + 3 * rounds
    assert _which(tmp_path, states) in range(3)
    assert len(list(tmp_path.iterdir())) == 2


def test_first_writers(tmp_path: Path, trials: Trials) -> None:
    """Two processes save to a new folder without overwriting: one does, the other is told."""
    models = _models()[:2]
    states = [model.state_dict() for model in models]
    for attempt in trials.count(50, 10):
        folder, start = tmp_path / f"model{attempt}", tmp_path / f"start{attempt}"

        def write(model: nn.Module, folder: Path = folder, start: Path = start) -> None:
            while not start.exists():
                time.sleep(0.0001)
            try:
                rp.save(model, folder)
            except rp.FileError as error:
                if "holds a saved model already" in str(error):
                    os._exit(3)
                raise

        with trials.one():
            children = _start(*(lambda model=model: write(model) for model in models))  # type: ignore[misc]
            start.touch()
            codes = [exit_code(child) for child in children]
            assert sorted(codes) == [0, 3]
            assert _which(folder, states) == codes.index(0)


def test_latency_cache(tmp_path: Path, trials: Trials) -> None:
    """Four processes fill one latency cache: every entry is whole, and is found again."""
    runtime = rp.Runtime(backend="eager", threads=1)
    specs = [rp.LayerSpec.of(nn.Linear(8, 8 + size)) for size in range(4)]
    requests = [Request(spec, (1, 8), {"linear": [2]}) for spec in specs if spec is not None]

    def fill() -> None:
        for _ in range(5):
            LatencyTable(runtime, cache=tmp_path).measure(requests)

    for _ in trials.count(5, 1):
        for path in tmp_path.rglob("*.json"):
            path.unlink()
        with trials.one():
            _end(_start(fill, fill, fill, fill))
            table = LatencyTable(runtime, cache=tmp_path)
            table.measure(requests)
            assert (table.measured, table.reused) == (0, 8)
            assert not list(tmp_path.rglob("*.tmp"))
