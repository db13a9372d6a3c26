"""Killed at any moment, on a full disk, without permission: nothing is lost."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rankprune as rp
from cases import mlp
from conftest import Trials
from rankprune.files import is_temporary
from rankprune.recipes.checkpoint import read_checkpoint, write_checkpoint
from rankprune.recipes.config import TrainConfig
from rankprune.recipes.run import load, preview, run
from runs import FORKS, command_line, equal, exit_code, in_child, records, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), *FORKS]


def _killed(child: int, after: float) -> bool:
    """Send SIGKILL after so many seconds; False if it had ended by itself, as it should."""
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    code = exit_code(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if is_temporary(path)]


def _model(share: float) -> torch.nn.Module:
    torch.manual_seed(0)
    model = mlp()
    return rp.factorize(model, rp.make_plan(model, rp.Ratio(share), guard=False))


def test_save(tmp_path: Path, trials: Trials) -> None:
    """SIGKILL while `save` replaces a model: the old or the new loads, temporaries go."""
    models = [_model(0.2), _model(0.5)]
    states = [model.state_dict() for model in models]
    rp.save(models[0], tmp_path)

    def save_by_turns() -> None:
        for turn in range(10**6):
            rp.save(models[turn % 2], tmp_path, overwrite=True)

    chance, left_behind, wanted = random.Random(0), False, len(trials.count(100, 20))
    while trials.tried < wanted or not left_behind:  # until a kill has hit a save that was writing
        with trials.one():
            assert _killed(in_child(save_by_turns), chance.uniform(0, 0.05))
            left_behind |= bool(_temporaries(tmp_path))
            state = rp.load(mlp(), tmp_path).state_dict()
            assert any(equal(state, saved) for saved in states)
            rp.save(models[0], tmp_path, overwrite=True)
            assert equal(rp.load(mlp(), tmp_path).state_dict(), states[0])
            assert len(list(tmp_path.iterdir())) == 2


def test_checkpoint(tmp_path: Path, trials: Trials) -> None:
    """SIGKILL while a checkpoint is replaced: the latest or the one before loads."""
    path, done = tmp_path / "checkpoint.pt", tmp_path / "done"
    chance, outcomes = random.Random(1), set()

    def write_many() -> None:
        for step in range(1, 10**6):
            write_checkpoint(path, {"step": step, "weights": torch.full((200_000,), step)})
            done.write_text(str(step))

    for _ in trials.count(100, 20):
        with trials.one():
            write_checkpoint(path, {"step": 0, "weights": torch.zeros(200_000)})
            done.write_text("0")
            assert _killed(in_child(write_many), chance.uniform(0, 0.05))
            state = read_checkpoint(path)
            assert (state["weights"] == state["step"]).all()
            finished = int(done.read_text() or -1)  # killed while it was written
            if finished >= 0:
                assert state["step"] in (finished, finished + 1)
                outcomes.add(state["step"] - finished)
    assert 0 in outcomes


OPTIONS: dict[str, Any] = {
    "data": "fake",
    "image_size": 16,
    "model": "digits_cnn",
    "scheme": "spatial",
    "flops": 0.4,
    "every": 3,
    "epochs": 2,
    "batch_size": 64,
    "checkpoint_every": 1,
    "baseline": True,
}


def _result(folder: Path, builder: Callable[[], torch.nn.Module]) -> tuple[Any, ...]:
    report = json.loads((folder / "report.json").read_text())
    return rp.load(builder(), folder / "compact").state_dict(), records(folder), report


def test_training(tmp_path: Path, trials: Trials) -> None:
    """SIGKILL in a training run, again and again: it ends with the bits of an undisturbed one."""
    from rankprune.recipes.models import build_model

    config = TrainConfig(**OPTIONS)

    def builder() -> torch.nn.Module:
        return build_model("digits_cnn", classes=10, channels=3)

    begin = time.monotonic()
    child = in_child(lambda: run(config, tmp_path / "straight"))
    assert exit_code(child) == 0
    seconds = time.monotonic() - begin
    state, metrics, report = _result(tmp_path / "straight", builder)

    chance, wanted = random.Random(2), len(trials.count(100, 6))
    kills = finished = 0
    while kills < wanted or not finished:
        folder = tmp_path / f"run{finished}"
        with trials.one():
            child = in_child(lambda folder=folder: run(config, folder, resume=True))  # type: ignore[misc]
            # the end as well: a run of many kills makes little way in each of its lives
            share = 0.25 if kills < wanted else 3
            if _killed(child, seconds * chance.uniform(0, share)):
                kills += 1
                continue
            found, told, summary = _result(folder, builder)
            assert equal(found, state)
            assert told == metrics
            assert summary == report
            assert not _temporaries(folder)
            finished += 1
    assert finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, tmp_path: Path, trials: Trials) -> None:
    """SIGINT and SIGTERM in a training run: a checkpoint, exit 130 or 143."""
    options = OPTIONS | {"epochs": 100, "checkpoint_every": 1000, "baseline": False}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value]

    chance = random.Random(3)
    for attempt in trials.count(10, 2):
        out = tmp_path / str(attempt)
        with trials.one():
            child = in_child(lambda out=out: command_line("train", *words, "--out", out))  # type: ignore[misc]
            alive = functools.partial(os.waitpid, child, os.WNOHANG)
            wait_for(out / "checkpoint.pt", lambda alive=alive: alive() == (0, 0))  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.5))
            before = read_checkpoint(out / "checkpoint.pt")["step"]
            os.kill(child, number)
            assert exit_code(child) == 128 + number
            assert read_checkpoint(out / "checkpoint.pt")["step"] >= before
            assert not _temporaries(out)


# -- disks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tmp_path: Path, trials: Trials) -> None:
    """A full disk during `save` or a checkpoint: a clear error, the old file intact."""
    small, large = _model(0.2), rp.factorize(*_wide())
    state = small.state_dict()
    with _small_disk(tmp_path / "disk", 2**20):
        for attempt in trials.count(50, 10):
            folder = tmp_path / "disk" / "model"
            path, filler = tmp_path / "disk" / "checkpoint.pt", tmp_path / "disk" / "filler"
            rp.save(small, folder, overwrite=True)
            write_checkpoint(path, {"step": attempt})
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            # from nothing to almost what is needed
            filler.write_bytes(b"x" * max(0, free - attempt * 8192))
            with trials.one():
                with pytest.raises(rp.FileError, match=r"disk.*No space left on device"):
                    rp.save(large, folder, overwrite=True)
                assert equal(rp.load(mlp(), folder).state_dict(), state)
                assert not _temporaries(folder)
            with trials.one():
                with pytest.raises(rp.FileError, match=r"checkpoint\.pt.*No space left on device"):
                    write_checkpoint(path, {"step": -1, "weights": torch.zeros(2**18)})
                assert read_checkpoint(path) == {"step": attempt}
                assert not _temporaries(path.parent)
            filler.unlink()


def _wide() -> tuple[torch.nn.Module, rp.Plan]:
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    return model, rp.make_plan(model, rp.FixedRank(240), guard=False)


def test_file_size_limit(tmp_path: Path, trials: Trials) -> None:
    """A file may not grow beyond a limit (as with quotas): a clear error, the old file intact."""
    small = _model(0.2)
    rp.save(small, tmp_path / "model")
    write_checkpoint(tmp_path / "checkpoint.pt", {"step": 0})
    state, large = small.state_dict(), rp.factorize(*_wide())

    def fail(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(rp.FileError, match="File too large"):
            rp.save(large, tmp_path / "model", overwrite=True)
        with pytest.raises(rp.FileError, match=r"checkpoint\.pt.*File too large"):
            write_checkpoint(tmp_path / "checkpoint.pt", {"weights": torch.zeros(2**18)})

    for attempt in trials.count(50, 10):
        with trials.one():
            child = in_child(lambda limit=attempt * 18_000: fail(limit))  # type: ignore[misc]
            assert exit_code(child) == 0
            assert equal(rp.load(mlp(), tmp_path / "model").state_dict(), state)
            assert read_checkpoint(tmp_path / "checkpoint.pt") == {"step": 0}
            assert not _temporaries(tmp_path)


def test_read_only(tmp_path: Path, trials: Trials) -> None:
    """A folder without permission to write: a clear error, the old file intact."""
    folder, model = tmp_path / "model", _model(0.5)
    rp.save(_model(0.2), folder)
    write_checkpoint(folder / "checkpoint.pt", {"step": 0})
    config = TrainConfig(**OPTIONS)
    preview(config, load(config))  # imports what another user may not read
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in (folder, tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o555 if path == folder else 0o755)

    def denied(call: Callable[[], Any]) -> None:
        if os.geteuid() == 0:  # root may write anywhere
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(rp.FileError, match="Permission denied"):
            call()

    calls: list[Callable[[], Any]] = [
        lambda: rp.save(model, folder, overwrite=True),
        lambda: rp.save(model, folder / "new"),
        lambda: write_checkpoint(folder / "checkpoint.pt", {"step": 1}),
        lambda: run(config, folder / "run"),
    ]
    for call in calls:
        with trials.one():
            child = in_child(lambda call=call: denied(call))  # type: ignore[misc]
            assert exit_code(child) == 0
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
