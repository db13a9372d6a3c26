"""Runs that their framework resumes end bit for bit as the whole run does (floor 6).

Everything goes through the framework's own checkpoints on disk.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import mlp
from rankprune import TRP, Budget, ConfigError, Controller, FileError, FixedRank

pl = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState  # noqa: E402

from rankprune.integrations import lightning as on_lightning  # noqa: E402
from rankprune.integrations import transformers as on_transformers  # noqa: E402

STEPS = 10
STOPS = [3, 4, 5, 6, 7]

pytestmark = [
    # Lightning would have worker processes for eight samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning's own walk through a batch
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # the resumed run saves nothing
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

OPTIONS = {
    # a period of 2: half of the stops are where the next step is projected already
    "rule": TRP(rank=FixedRank(3), every=2, nuclear=0.1),
    "every step": TRP(rank=FixedRank(3), every=3, nuclear=0.1, nuclear_when="step"),
    "descending budget": TRP(rank=Budget(params=0.4), every=1, descent=8, nuclear=0.1),
}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the settings of the process's first Accelerator."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def _samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(16, generator=generator)} for _ in range(8 * STEPS)]


class HFModel(nn.Module):
    """For the Trainer; dropout, so that the random state matters as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(torch.nn.functional.dropout(x, 0.1, self.training))
        loss = y.square().mean()
        self.losses.append(loss.item())
        return {"loss": loss, "logits": y}


class Sampler(torch.utils.data.Sampler):
    """Eight other samples in each epoch: Lightning starts a broken off epoch's data anew."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch % STEPS * 8
        return iter(range(start, start + 8))

    def __len__(self) -> int:
        return 8


def _loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(_samples(), batch_size=8, sampler=Sampler())


class Module(pl.LightningModule):
    """For Lightning, which does not restore the random state: no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.net(batch["x"]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _equal(one: nn.Module, weights: list[Tensor]) -> bool:
    return all(map(torch.equal, _weights(one), weights))


# -- Lightning -------------------------------------------------------------------------------------


def _lightning(
    options: TRP,
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    steps: int = STEPS,
    keep: bool = False,
) -> tuple[Any, Module, on_lightning.RankPruneCallback]:
    prune = on_lightning.RankPruneCallback(options)
    callbacks: list[Any] = [prune]
    if keep:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                folder,
                filename="{step}",
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                save_top_k=-1,
            )
        )
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=keep,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    loader = _loader()
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module, prune


@pytest.mark.parametrize("name", OPTIONS)
def test_lightning_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    _, whole, callback = _lightning(options, tmp_path, keep=True)
    plan = callback.plan
    assert plan is not None
    assert plan.factorized
    # 10 is the last step's: the state from before the end, and no step is left
    for stop in [*STOPS, STEPS]:
        path = tmp_path / f"step={stop}.ckpt"
        _, module, resumed = _lightning(options, tmp_path / "resumed", ckpt_path=path)
        assert _equal(module, _weights(whole)), stop
        assert resumed.plan == plan
        assert resumed.controller is None


def test_lightnings_resuming_needs_the_state(tmp_path: Path) -> None:
    """Without it the schedule starts anew, and the run ends elsewhere."""
    options = OPTIONS["rule"]
    _, whole, _ = _lightning(options, tmp_path, keep=True)
    path = tmp_path / "step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"].pop("rankprune.RankPruneCallback")
    assert state["controller"]["step"] == 5
    torch.save(checkpoint, path)
    _, module, callback = _lightning(options, tmp_path, ckpt_path=path)
    assert callback.plan is not None
    assert not _equal(module, _weights(whole))


def test_a_lightning_checkpoint_of_a_finished_run(tmp_path: Path) -> None:
    """It holds the projected module and its plan, and more steps may follow."""
    options = OPTIONS["rule"]
    trainer, module, callback = _lightning(options, tmp_path)
    path = tmp_path / "finished.ckpt"
    trainer.save_checkpoint(path)
    _, same, again = _lightning(options, tmp_path, ckpt_path=path)
    assert _equal(same, _weights(module))
    assert again.plan == callback.plan
    trainer, _, more = _lightning(options, tmp_path, ckpt_path=path, steps=STEPS + 3)
    assert trainer.global_step == STEPS + 3
    assert more.plan is not None
    assert more.state_dict()["controller"]["step"] == STEPS + 3


def test_a_lightning_callback_serves_several_runs(tmp_path: Path) -> None:
    callback = on_lightning.RankPruneCallback(OPTIONS["rule"])
    assert callback.state_dict() == {}
    plans = []
    for _ in range(2):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            devices=1,
            max_epochs=4,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), _loader())
        plans.append(callback.plan)
    assert plans[0] == plans[1]
    with pytest.raises(ConfigError, match="not a RankPruneCallback's state"):
        callback.load_state_dict({"step": 3})


# -- Hugging Face ----------------------------------------------------------------------------------


def _transformers(
    options: TRP,
    folder: Path,
    *,
    resume: Path | None = None,
    resume_from: Path | None = None,
    save: bool = False,
    callback: bool = True,
    more: Sequence[Any] = (),
) -> tuple[HFModel, on_transformers.RankPruneCallback]:
    prune = on_transformers.RankPruneCallback(options, resume_from=resume_from)
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps" if save else "no",
        save_steps=1,
        logging_strategy="no",
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=0.01,
        dataloader_pin_memory=False,
    )
    model = HFModel()
    trainer = transformers.Trainer(
        model, args, train_dataset=_samples(), callbacks=[*([prune] if callback else []), *more]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, prune


@pytest.mark.parametrize("name", OPTIONS)
def test_transformers_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    whole, callback = _transformers(options, tmp_path, save=True)
    assert callback.plan is not None
    assert callback.plan.factorized
    for stop in [*STOPS, STEPS]:
        folder = tmp_path / f"checkpoint-{stop}"
        assert (folder / "rankprune.pt").is_file()
        model, resumed = _transformers(options, tmp_path, resume=folder)
        assert _equal(model, _weights(whole)), stop
        assert resumed.plan == callback.plan
        assert resumed.controller is None


def test_transformers_resumes_from_another_folder(tmp_path: Path) -> None:
    options = OPTIONS["rule"]
    whole, _ = _transformers(options, tmp_path / "first", save=True)
    folder = tmp_path / "first" / "checkpoint-5"
    output = tmp_path / "second"
    with pytest.raises(
        FileError, match=r"checkpoint-5.rankprune\.pt: no such file; .*resume_from="
    ):
        _transformers(options, output, resume=folder)
    model, _ = _transformers(options, output, resume=folder, resume_from=folder)
    assert _equal(model, _weights(whole))


def test_transformers_refuses_a_missing_or_damaged_state(tmp_path: Path) -> None:
    options = OPTIONS["rule"]
    _transformers(options, tmp_path, save=True, callback=False)
    folder = tmp_path / "checkpoint-5"
    assert not (folder / "rankprune.pt").exists()
    with pytest.raises(FileError, match="or start anew if it was saved without this callback"):
        _transformers(options, tmp_path, resume=folder)
    shutil.rmtree(tmp_path)
    _transformers(options, tmp_path, save=True)
    content = bytearray((folder / "rankprune.pt").read_bytes())
    content[-100] ^= 1
    (folder / "rankprune.pt").write_bytes(content)
    with pytest.raises(FileError, match="damaged"):
        _transformers(options, tmp_path, resume=folder)


def test_only_the_process_that_saves_writes(tmp_path: Path) -> None:
    """All processes are asked for the state, which a sharded model needs."""
    asked = []

    class Asked(Controller):
        def state_dict(self) -> dict[str, Any]:
            asked.append(self.step)
            return super().state_dict()

    class Args:
        output_dir, should_save = str(tmp_path), False

    class State:
        global_step, is_hyper_param_search = 1, False

    callback = on_transformers.RankPruneCallback(OPTIONS["rule"])
    callback.on_save(Args(), State(), None)  # before it is attached there is nothing to save
    callback.controller = Asked(mlp(), OPTIONS["rule"])
    callback.on_save(Args(), State(), None)
    assert asked == [0]
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoint-1").mkdir()
    Args.should_save = True
    callback.on_save(Args(), State(), None)
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == ["rankprune.pt"]
