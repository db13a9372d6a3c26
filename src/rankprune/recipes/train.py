"""The training loop: Accelerate, TRP, checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from rankprune.attach import attach
from rankprune.budget import Budget
from rankprune.errors import FileError, RankPruneError
from rankprune.factorize import defactorize, factor_skeleton, factorize
from rankprune.files import remove_stale, write_atomically
from rankprune.options import TRP
from rankprune.plan import Plan
from rankprune.recipes.batches import Normalise, check_batch, train_batches
from rankprune.recipes.checkpoint import read_checkpoint, write_checkpoint
from rankprune.recipes.config import MATCH, TrainConfig
from rankprune.recipes.data import ImageData
from rankprune.recipes.evaluate import evaluate
from rankprune.recipes.interrupt import Interrupted, catching_signals
from rankprune.recipes.optim import make_optimizer, make_scheduler
from rankprune.recipes.process import effective_precision, on_cpu, process_state
from rankprune.recipes.randomness import random_state, set_random_state
from rankprune.recipes.teacher import Teacher
from rankprune.serialize import compare_shapes, shapes
from rankprune.training import Controller

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
_STATE = {"total", "step", "model", "optimizer", "scheduler", "scaler", "trp", "plan", "sums"}
_STATE |= {"records", "random"}


class Progress:
    """What a caller may want to show; the base class shows nothing."""

    def start(self, title: str, total: int, done: int) -> None:
        """A loop of `total` steps begins, of which `done` lie behind."""

    def step(self, loss: float, rate: float) -> None:
        """One step is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done and validated."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def end(self) -> None:
        """The loop is over."""


@dataclass(frozen=True)
class Trained:
    """A trained model, with the realised plan where TRP was on, and the device it is on."""

    model: nn.Module
    plan: Plan | None
    device: torch.device
    is_main: bool
    world: int


def fit(
    config: TrainConfig,
    data: ImageData,
    model: nn.Module,
    *,
    teacher: nn.Module | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a model.

    Args:
        config: the options.
        data: the data set.
        model: with the weights to start from.
        teacher: the dense network to learn from, where `config.soft()` is not 0.
        folder: where checkpoint and metrics go; a checkpoint that lies there is continued.
        progress: told about every step and epoch.

    Returns:
        The dense model, of low rank where TRP is on.

    Raises:
        Interrupted: by SIGINT or SIGTERM, after a checkpoint.
    """
    return _Run(config, data, model, teacher, folder, progress or Progress()).train()


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        model: nn.Module,
        teacher: nn.Module | None,
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self.config, self.data, self.folder, self.progress = config, data, folder, progress
        # a process may train more than once, each time with its own precision
        AcceleratorState._reset_state(reset_partial_state=False)
        device = process_state().device
        precision, note = effective_precision(config.precision, device)
        if note:
            progress.note(f"precision={config.precision}: {note}")
        self.accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision, cpu=on_cpu()
        )
        self.steps = check_batch(data, config.batch_size, self.accelerator.num_processes)
        self.total = self.steps * config.epochs
        tail = round(config.tail * self.total)
        self.switch = max(1, self.total - tail) if tail else None
        if folder is not None and folder.is_dir() and self.accelerator.is_main_process:
            remove_stale(folder)
        checkpoint = self._checkpoint(model)
        self.plan: Plan | None = None  # of the factors, once they are trained
        if checkpoint is not None:
            if checkpoint["plan"] is not None:
                self.plan = Plan.from_json(checkpoint["plan"])
            model.load_state_dict(checkpoint["model"])
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bare = model
        self.raw = make_optimizer(config, model)
        self.scheduler = make_scheduler(config, self.raw, self.total)
        if checkpoint is not None:
            # after the scheduler, which sets the learning rate back when it is made
            self.raw.load_state_dict(checkpoint["optimizer"])
        self.trp = None if self.plan is not None else self._attach(checkpoint)
        self.model, self.optimizer = self.accelerator.prepare(model, self.raw)
        self.teacher = None
        if config.soft():
            assert teacher is not None
            teacher = teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            mirrored = data.flip and config.augment
            self.teacher = Teacher(
                teacher,
                soft=config.soft(),
                match=MATCH if config.match is None else config.match,
                mirrored=mirrored if config.mirrored is None else config.mirrored,
            )
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        if self.accelerator.num_processes > 1:
            self._order_buckets()
        if checkpoint is not None:
            self._continue(checkpoint)

    def train(self) -> Trained:
        self.progress.start(self.config.method, self.total, self.step)
        try:
            with catching_signals() as caught:
                for epoch in range(self.step // self.steps, self.config.epochs):
                    self._epoch(epoch, caught)
                if stop := self._agreed(caught):  # while the last epoch was validated
                    raise Interrupted(stop)
        finally:
            self.progress.end()
        plan = self.plan if self.trp is None else self.trp.finish()
        self.accelerator.wait_for_everyone()
        return Trained(
            defactorize(self._unwrapped(), inplace=True),
            plan,
            self.accelerator.device,
            self.accelerator.is_main_process,
            self.accelerator.num_processes,
        )

    def _unwrapped(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return model

    def _train_factors(self) -> None:
        """Go on with the factors of the model in its place, in fresh momentum."""
        assert self.trp is not None
        self.plan, self.trp = self.trp.finish(), None
        # a copy: hooks of DistributedDataParallel stay with the parameters that it was made for
        model = factorize(self._unwrapped(), self.plan)
        self.bare = model.to(memory_format=torch.channels_last)
        self.accelerator.free_memory()
        self.raw = make_optimizer(self.config, self.bare)
        before, self.scheduler = self.scheduler, make_scheduler(self.config, self.raw, self.total)
        self.scheduler.load_state_dict(before.state_dict())
        for group, rate in zip(self.raw.param_groups, before.get_last_lr(), strict=True):
            group["lr"] = rate
        self.model, self.optimizer = self.accelerator.prepare(self.bare, self.raw)
        if self.accelerator.num_processes > 1:
            self._order_buckets()
        self.model.train()

    def _order_buckets(self) -> None:
        """Have DistributedDataParallel order its gradients before the first step.

        It orders them anew after the first backward pass. From three processes on, the order in
        which they are added up depends on that, and so do the last bits: the first step of a
        resumed run must not be the first pass.
        """
        before = [buffer.clone() for buffer in self.bare.buffers()]
        self.model.train()
        with self.accelerator.autocast():
            # two images: BatchNorm refuses one where nothing but channels is left of it
            logits = self.model(example_inputs(self.data, self.accelerator.device, batch=2))
        logits.float().sum().backward()
        self.raw.zero_grad()
        for buffer, value in zip(self.bare.buffers(), before, strict=True):
            buffer.copy_(value)

    def _epoch(self, epoch: int, caught: list[int]) -> None:
        normalise = Normalise(self.data, self.accelerator.device)
        started, before = time.perf_counter(), self.step
        self.model.train()
        batches = train_batches(
            self.data,
            batch=self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            first=self.step % self.steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.workers,
            augment=self.config.augment,
        )
        for pixels, labels in batches:
            self._one_step(normalise(pixels), labels.to(self.accelerator.device))
            ended = self.step % self.steps == 0
            stop = self._agreed(caught)
            if not ended and (stop or self.step % self.config.checkpoint_every == 0):
                self._save()
            if stop:
                if ended:
                    self._validate(epoch, started, before)
                raise Interrupted(stop)
        self._validate(epoch, started, before)

    def _one_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with self.accelerator.autocast():
            loss, logits = self._loss(images, labels)
        self.accelerator.backward(loss)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        count = len(labels)
        hits = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach() * count, hits, hits.new_tensor(count)]).to(
            self.sums
        )
        if not torch.isfinite(loss):
            raise RankPruneError(
                f"step {self.step}: the loss is {loss.item()}; lower lr or nuclear"
            )
        self.progress.step(loss.item(), self.raw.param_groups[0]["lr"])
        if self.trp is not None and self.step == self.switch:
            self._train_factors()

    def _loss(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        smoothing = self.config.label_smoothing
        if self.teacher is not None:
            return self.teacher(
                self.model, images, labels, label_smoothing=smoothing, bare=self.bare
            )
        logits = self.model(images)
        return nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=smoothing
        ), logits

    def _agreed(self, caught: list[int]) -> int:
        """The signal that any process has caught, so that all stop after the same step; or 0."""
        number = torch.tensor(caught[0] if caught else 0, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def _share_buffers(self) -> None:
        """Give every process the first one's running statistics, which are the ones saved."""
        if self.accelerator.num_processes > 1:
            for buffer in self.bare.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _validate(self, epoch: int, started: float, before: int) -> None:
        self._share_buffers()
        sums = self.accelerator.reduce(self.sums, reduction="sum")
        loss, hits, count = sums.tolist()
        with _without_accelerate(self.bare):
            result = evaluate(
                self.bare,
                self.data.val,
                self.data,
                device=self.accelerator.device,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                workers=self.config.workers,
            )
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.raw.param_groups[0]["lr"],
            "images": int(count),
            "train_loss": loss / count,
            "train_accuracy": hits / count,
            "val_loss": result["loss"],
            "val_accuracy": result["accuracy"],
            "val_top5": result["top5"],
            "seconds": round(seconds, 2),
            "images_per_second": round((self.step - before) * self.config.batch_size / seconds, 1),
        }
        if self.trp is not None:
            record["ranks"] = self.trp.ranks
        elif self.plan is not None:
            record["ranks"] = {layer.name: layer.rank for layer in self.plan.factorized}
        self.records.append(record)
        self.sums.zero_()
        self._save()
        self.progress.epoch(record)

    # -- checkpoints -----------------------------------------------------------------------------

    def _checkpoint(self, model: nn.Module) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return None
        path = self.folder / CHECKPOINT
        state = read_checkpoint(path)
        missing = _STATE - state.keys()
        if missing:
            raise FileError(
                f"{path}: not a checkpoint of a run of this version: {min(missing)!r} is missing; "
                "start anew, in another folder"
            )
        if state["total"] != self.total:
            raise FileError(
                f"{path}: a checkpoint of another run ({state['total']} steps, this one has "
                f"{self.total})"
            )
        if state["plan"] is not None:
            factor_skeleton(model, Plan.from_json(state["plan"]).factorized)
        compare_shapes(shapes(model.state_dict()), shapes(state["model"]), str(path))
        return state

    def _save(self) -> None:
        if self.folder is None:
            return
        sums = self.accelerator.gather(self.sums.unsqueeze(0))
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "total": self.total,
                "step": self.step,
                "model": self.bare.state_dict(),
                "optimizer": self.raw.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "trp": None if self.trp is None else self.trp.state_dict(),
                "plan": None if self.plan is None else self.plan.to_json(),
                # alike in every process: all are seeded alike, and draw as much
                "random": random_state(),
                "sums": sums,
                "records": self.records,
            }
            write_checkpoint(self.folder / CHECKPOINT, state)
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_atomically(self.folder / METRICS, lines.encode())
        self.accelerator.wait_for_everyone()

    def _continue(self, state: dict[str, Any]) -> None:
        self.step, self.records = state["step"], state["records"]
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        # every process its own; where there are fewer now, one takes those of several
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.sums.copy_(state["sums"][rank::world].sum(0))
        set_random_state(state["random"])

    def _attach(self, checkpoint: dict[str, Any] | None) -> Controller | None:
        if self.config.method != "trp":
            return None
        return attach(
            self.bare,
            self.raw,
            trp_options(self.config, self.total),
            example_inputs=example_inputs(
                self.data, self.accelerator.device, batch=self.config.batch
            ),
            process_group=torch.distributed.group.WORLD
            if self.accelerator.num_processes > 1
            else None,
            state=None if checkpoint is None else checkpoint["trp"],
        )


@contextlib.contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[None]:
    """Accelerate replaces the forward pass by one in half precision, on the very model."""
    original = vars(model).get("_original_forward")
    if original is None:
        yield
        return
    replaced = model.forward
    model.forward = original
    try:
        yield
    finally:
        model.forward = replaced


def trp_options(config: TrainConfig, total: int) -> TRP:
    """The TRP options of a run of this many steps."""
    target = config.target()
    return TRP(
        rank=target,
        scheme=config.scheme,
        multiple_of=config.multiple_of,
        runtime=config.runtime(),
        every=config.every,
        start=round(config.start * total),
        descent=round(config.descent * total) if isinstance(target, Budget) else 0,
        nuclear=config.nuclear,
        nuclear_mode=config.nuclear_mode,
        nuclear_when=config.nuclear_when,
    )


def example_inputs(
    data: ImageData, device: torch.device | str = "cpu", batch: int = 1
) -> torch.Tensor:
    """Blank images, to count FLOPs and to measure with."""
    return torch.zeros(batch, *data.shape, device=device)
