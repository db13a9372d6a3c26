"""A run that is resumed from every fifth of its 60 steps ends as the whole run does, to the bit.

The schedule has all its phases in these steps: before its start, the descent of the budget, the
budget reached, and after its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rankprune as rp
import test_integrations_resume as frameworks
from conftest import Trials
from rankprune.recipes.config import TrainConfig
from rankprune.recipes.run import load, run
from rankprune.recipes.train import Progress
from runs import equal, records
from test_integrations_resume import HFModel, fresh_accelerate, transformers

__all__ = ["fresh_accelerate"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), *frameworks.pytestmark]

STEPS, SPACING = 60, 5
OPTIONS = rp.TRP(rank=rp.Budget(params=0.4), every=4, start=10, descent=25, end=50, nuclear=0.1)


@pytest.fixture(autouse=True)
def sixty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "STEPS", STEPS)


def _stops(trials: Trials) -> list[int]:
    stops = range(0, STEPS, SPACING)
    return list(stops) if trials.full else [15, 35, 55]


def _copy(state: Any, folder: Path) -> Any:
    """By way of a file."""
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def _data(first: int) -> Iterator[Tensor]:
    samples = torch.stack([sample["x"] for sample in frameworks._samples()])
    return iter(samples.split(8)[first:])


def _plain(folder: Path, first: int, state: Any) -> tuple[Any, list[float], dict[int, Any]]:
    model = HFModel()
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    trp = rp.attach(model, optimizer, OPTIONS, state=None if state is None else state["trp"])
    if state is not None:
        torch.set_rng_state(state["rng"])
    states = {}
    for step, x in enumerate(_data(first), first):
        if step % SPACING == 0:
            whole = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "trp": trp.state_dict(),
                "rng": torch.get_rng_state(),
            }
            states[step] = _copy(whole, folder)
        optimizer.zero_grad()
        model(x)["loss"].backward()
        optimizer.step()
    plan = trp.finish()
    return (model.state_dict(), optimizer.state_dict(), plan), model.losses, states


def test_plain(tmp_path: Path, trials: Trials) -> None:
    """Plain torch, by state dicts: resumed from every 5th of 60 steps."""
    end, losses, states = _plain(tmp_path, 0, None)
    assert end[2].factorized
    for stop in _stops(trials):
        with trials.one():
            found, tail, _ = _plain(tmp_path, stop, states[stop])
            assert equal(found, end), stop
            assert tail == losses[stop:]


def _accelerate(folder: Path, first: int, save: bool) -> tuple[Any, list[float]]:
    """By Accelerate's own save_state and load_state."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    bare = HFModel()
    optimizer: Any = torch.optim.AdamW(bare.parameters(), lr=0.01)
    samples: Any = [sample["x"] for sample in frameworks._samples()]
    # with a generator of its own, so that a new iterator draws no random number of the model's
    loader: Any = DataLoader(samples, batch_size=8, generator=torch.Generator())
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader)
    state = None
    if first:
        accelerator.load_state(str(folder / str(first)))
        state = torch.load(folder / f"{first}.pt", weights_only=True)
        loader = accelerator.skip_first_batches(loader, first)
    trp = rp.attach(model, optimizer, OPTIONS, state=state)
    for step, x in enumerate(loader, first):
        if save and step % SPACING == 0:
            accelerator.save_state(str(folder / str(step)))
            torch.save(trp.state_dict(), folder / f"{step}.pt")
        accelerator.backward(model(x)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    plan = trp.finish()
    return (bare.state_dict(), optimizer.state_dict(), plan), bare.losses


def test_accelerate(tmp_path: Path, trials: Trials) -> None:
    """Accelerate, by its save_state: resumed from every 5th of 60 steps."""
    end, losses = _accelerate(tmp_path, 0, save=True)
    assert end[2].factorized
    for stop in _stops(trials):
        with trials.one():
            torch.manual_seed(0)
            found, tail = _accelerate(tmp_path, stop, save=False)
            assert equal(found, end), stop
            assert tail == losses[stop:]


def test_lightning(tmp_path: Path, trials: Trials) -> None:
    """Lightning, by its checkpoints: resumed from every 5th of 60 steps."""
    trainer, whole, callback = frameworks._lightning(OPTIONS, tmp_path, keep=True, steps=STEPS)
    assert callback.plan is not None
    assert callback.plan.factorized
    end = (whole.state_dict(), trainer.optimizers[0].state_dict(), callback.plan)
    for stop in _stops(trials):
        path = None if stop == 0 else tmp_path / f"step={stop}.ckpt"
        with trials.one():
            torch.manual_seed(0)
            trainer, module, resumed = frameworks._lightning(
                OPTIONS, tmp_path / "resumed", ckpt_path=path, steps=STEPS
            )
            found = (module.state_dict(), trainer.optimizers[0].state_dict(), resumed.plan)
            assert equal(found, end), stop
            assert module.losses == whole.losses[stop:]


class Witness(transformers.TrainerCallback):
    """Sees the optimizer at the end."""

    optimizer: Any = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"].state_dict()


def test_transformers(tmp_path: Path, trials: Trials) -> None:
    """Hugging Face's Trainer, by its checkpoints: resumed from every 5th of 60 steps."""
    witness = Witness()
    whole, callback = frameworks._transformers(OPTIONS, tmp_path, save=True, more=[witness])
    assert callback.plan is not None
    assert callback.plan.factorized
    end = (whole.state_dict(), witness.optimizer, callback.plan)
    for stop in _stops(trials):
        folder = None if stop == 0 else tmp_path / f"checkpoint-{stop}"
        with trials.one():
            torch.manual_seed(0)
            witness = Witness()
            model, resumed = frameworks._transformers(
                OPTIONS, tmp_path, resume=folder, more=[witness]
            )
            assert equal((model.state_dict(), witness.optimizer, resumed.plan), end), stop
            assert model.losses == whole.losses[stop:]


# -- rankprune train -------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 - stands for no error
    """Stands for whatever ends a process."""


class StopAt(Progress):
    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, loss: float, rate: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped


def _result(folder: Path) -> tuple[Any, ...]:
    checkpoint = torch.load(folder / "final.pt", weights_only=True)
    return records(folder), json.loads((folder / "report.json").read_text()), checkpoint


def _trained(config: TrainConfig, folder: Path, **how: Any) -> None:
    from rankprune.recipes.checkpoint import read_checkpoint

    run(config, folder, **how)
    state = read_checkpoint(folder / "checkpoint.pt")
    torch.save(
        {key: state[key] for key in ("model", "optimizer", "scheduler")}, folder / "final.pt"
    )


def test_command(tmp_path: Path, trials: Trials) -> None:
    """`rankprune train`: stopped at every 5th of 60 steps, resumed with other workers."""
    options = TrainConfig(
        data="fake",
        image_size=8,
        model="digits_cnn",
        flops=0.4,
        every=4,
        start=0.2,
        descent=0.4,
        tail=0.3,
        batch_size=45,
        epochs=6,
        checkpoint_every=5,
    )
    steps = len(load(options).train) // options.batch_size * options.epochs
    assert steps == STEPS
    _trained(options, tmp_path / "whole")
    end = _result(tmp_path / "whole")
    # one before the factors are trained, one after
    for stop in _stops(trials)[1:] if trials.full else [35, 50]:
        folder = tmp_path / str(stop)
        with trials.one():
            with pytest.raises(Stopped):
                run(options, folder, StopAt(stop))
            workers = 1 if stop % 2 else 2
            _trained(options.model_copy(update={"workers": workers}), folder, resume=True)
            assert equal(_result(folder), end), stop


def test_the_phases_are_there() -> None:
    """Nothing is projected before the start or after the end, and the budget comes down between."""
    model = HFModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trp = rp.attach(model, optimizer, OPTIONS)
    ranks = []
    for x in _data(0):
        optimizer.zero_grad()
        model(x)["loss"].backward()
        optimizer.step()
        ranks.append(sum(trp.ranks.values()))
    assert isinstance(model, nn.Module)
    assert not any(ranks[:8])
    assert len(set(ranks[10:40])) > 3
    assert len(set(ranks[40:])) == 1
