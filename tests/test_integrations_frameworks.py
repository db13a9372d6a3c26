"""One contract for every framework: the same steps project and regularise (floor 4).

Each row trains one network on the same batches in the same order, and is compared with the method
written out in a plain loop.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import mlp, relative_error
from rankprune import (
    TRP,
    ConfigError,
    Controller,
    FixedRank,
    MissingExtraError,
    Plan,
    Ratio,
    attach,
    factorize,
    project,
)
from runs import apart

accelerate = pytest.importorskip("accelerate")
pl = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402

from rankprune.integrations import lightning as on_lightning  # noqa: E402
from rankprune.integrations import transformers as on_transformers  # noqa: E402

STEPS = 6
RANK = 3
CLIP = 0.05  # smaller than every step's gradient norm

pytestmark = [
    # Lightning would have worker processes for eight samples
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning's own walk through a batch
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of the process's first Accelerator."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@dataclass(frozen=True)
class Setting:
    """How a network is trained."""

    precision: str = "fp32"
    accumulation: int = 1
    clip: bool = False
    nuclear_when: str = "projection"
    overflow: int | None = None  # micro-batch whose gradient is infinite

    @property
    def options(self) -> TRP:
        return TRP(
            rank=FixedRank(RANK),
            every=2,
            nuclear=0.1,
            nuclear_when=self.nuclear_when,
        )

    def scaler(self) -> torch.amp.GradScaler | None:
        if self.precision != "fp16":
            return None
        return torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        return [torch.randn(8, 16, generator=generator) for _ in range(STEPS * self.accumulation)]

    def samples(self) -> list[dict[str, Tensor]]:
        return [{"x": row} for batch in self.batches() for row in batch]


@dataclass
class Trace:
    """What happened, by step: observed from outside, not told by the controller."""

    forward_ranks: list[tuple[int, int]] = field(default_factory=list)  # of each micro-batch
    projected: list[int] = field(default_factory=list)
    regularised: list[int] = field(default_factory=list)
    steps: int = 0
    weights: list[Tensor] = field(default_factory=list)
    plan: Plan | None = None


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Spies on every controller from now on."""
    seen = Trace()
    real_project, real_regularise, real_after = (
        Controller.project,
        Controller.regularise,
        Controller.after_step,
    )

    def spied_project(self: Controller) -> None:
        real_project(self)
        seen.projected.append(self.step)

    def spied_regularise(self: Controller, *args: Any) -> None:
        before = [t.weight.grad.clone() for t in self._targets]
        real_regularise(self, *args)
        if all(
            not torch.equal(t.weight.grad, g) for t, g in zip(self._targets, before, strict=True)
        ):
            seen.regularised.append(self.step)

    def spied_after(self: Controller, *args: Any) -> None:
        real_after(self, *args)
        seen.steps = self.step

    monkeypatch.setattr(Controller, "project", spied_project)
    monkeypatch.setattr(Controller, "regularise", spied_regularise)
    monkeypatch.setattr(Controller, "after_step", spied_after)
    return seen


def _rank(weight: Tensor) -> int:
    values = torch.linalg.svdvals(weight.detach().double())
    return int((values > 1e-5 * values[0]).sum())


def _net(setting: Setting, trace: Trace) -> nn.Sequential:
    """The network, which notes the rank that each forward pass sees and can overflow."""
    net = mlp()
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        trace.forward_ranks.append((trace.steps, _rank(net[0].weight)))
        count += 1

    def overflow(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if count - 1 == setting.overflow else gradient

    net.register_forward_pre_hook(note)
    net[0].weight.register_hook(overflow)
    return net


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _autocast(setting: Setting) -> contextlib.AbstractContextManager[Any]:
    if setting.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if setting.precision == "bf16" else torch.float16)


# -- the frameworks --------------------------------------------------------------------------------


def _plain(
    net: nn.Module, setting: Setting, folder: Path, wrap: Callable[[Any], Any] = lambda model: model
) -> Plan:
    model = wrap(net)
    optimizer, scaler = _sgd(net), setting.scaler()
    trp = attach(model, optimizer, setting.options)
    batches = setting.batches()
    for start in range(0, len(batches), setting.accumulation):
        optimizer.zero_grad()
        for batch in batches[start : start + setting.accumulation]:
            with _autocast(setting):
                loss = model(batch).square().mean() / setting.accumulation
            (loss if scaler is None else scaler.scale(loss)).backward()
        if setting.clip:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return trp.finish()


def _fp16_on_cpu(accelerator: Any, setting: Setting) -> None:
    """Accelerate ignores fp16 on a CPU; this is what it sets on a GPU."""
    if setting.precision == "fp16":
        assert accelerator.mixed_precision == "fp16"
        accelerator.native_amp = True
        accelerator.scaler = setting.scaler()


def _with_accelerate(net: nn.Module, setting: Setting, folder: Path) -> Plan:
    accelerator = accelerate.Accelerator(
        cpu=True,
        mixed_precision="no" if setting.precision == "fp32" else setting.precision,
        gradient_accumulation_steps=setting.accumulation,
    )
    _fp16_on_cpu(accelerator, setting)
    model, optimizer = accelerator.prepare(net, _sgd(net))
    trp = attach(model, optimizer, setting.options)
    for batch in setting.batches():
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            if setting.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return trp.finish()


class Module(pl.LightningModule):
    """The network for Lightning."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self(batch["x"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _sgd(self.net)


class ManualModule(Module):
    """As the other, with manual optimisation."""

    def __init__(self, net: nn.Module, setting: Setting) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.setting = setting

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        optimizer, many = self.optimizers(), self.setting.accumulation
        self.manual_backward(super().training_step(batch, index) / many)
        if (index + 1) % many == 0:
            optimizer.step()
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # not in training_step, where Lightning has not unscaled the gradients yet
        if self.setting.clip:
            self.clip_gradients(optimizer, CLIP, "norm")


def _trainer(folder: Path, callbacks: list[Any], **options: Any) -> Any:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 1, **options},
    )


def _with_lightning(
    net: nn.Module, setting: Setting, folder: Path, manual: bool = False
) -> Plan | None:
    options: dict[str, Any] = {}
    if setting.precision == "bf16":
        options["precision"] = "bf16-mixed"
    elif setting.precision == "fp16":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=setting.scaler())]
    if not manual:
        options["accumulate_grad_batches"] = setting.accumulation
        options["gradient_clip_val"] = CLIP if setting.clip else None
    callback = on_lightning.RankPruneCallback(setting.options)
    loader = torch.utils.data.DataLoader(setting.samples(), batch_size=8)
    module = ManualModule(net, setting) if manual else Module(net)
    _trainer(folder, [callback], **options).fit(module, loader)
    assert callback.controller is None
    return callback.plan


def _with_manual_lightning(net: nn.Module, setting: Setting, folder: Path) -> Plan | None:
    return _with_lightning(net, setting, folder, manual=True)


class HFModel(nn.Module):
    """The network for the Trainer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": y.square().mean(), "logits": y}


def _with_transformers(net: nn.Module, setting: Setting, folder: Path) -> Plan | None:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=setting.accumulation,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP if setting.clip else 0.0,
        dataloader_pin_memory=False,
        bf16=setting.precision == "bf16",
        fp16=setting.precision == "fp16",
    )
    callback = on_transformers.RankPruneCallback(setting.options)
    trainer = transformers.Trainer(
        HFModel(net),
        args,
        train_dataset=setting.samples(),
        optimizers=(_sgd(net), None),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    _fp16_on_cpu(trainer.accelerator, setting)
    trainer.train()
    assert callback.controller is None
    return callback.plan


FRAMEWORKS: dict[str, Callable[[nn.Module, Setting, Path], Plan | None]] = {
    "plain": _plain,
    "accelerate": _with_accelerate,
    "lightning": _with_lightning,
    "lightning, manual": _with_manual_lightning,
    "transformers": _with_transformers,
}


def _run(framework: str, setting: Setting, trace: Trace, folder: Path) -> Trace:
    net = _net(setting, trace)
    trace.plan = FRAMEWORKS[framework](net, setting, folder)
    trace.weights = [parameter.detach().clone() for parameter in net.parameters()]
    return trace


# -- what they must do -----------------------------------------------------------------------------


def _expected(setting: Setting) -> list[Tensor]:
    """The method written out: no hooks, no controller, exact decompositions, no scaler."""
    net = mlp()
    optimizer, batches = _sgd(net), setting.batches()
    layers = [net[0], net[2]]

    def decompose(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        return u, s, vh

    def truncate() -> list[Tensor]:
        polars = []
        for layer in layers:
            u, s, vh = decompose(layer)
            layer.weight.data = ((u[:, :RANK] * s[:RANK]) @ vh[:RANK]).float()
            polars.append((u[:, :RANK] @ vh[:RANK]).float())
        return polars

    step = 0
    for start in range(0, len(batches), setting.accumulation):
        micro = range(start, start + setting.accumulation)
        if setting.overflow in micro:
            continue
        polars = truncate() if step % 2 == 0 else None
        optimizer.zero_grad()
        for index in micro:
            with _autocast(setting):
                loss = net(batches[index]).square().mean() / setting.accumulation
            loss.backward()
        if setting.clip:
            assert nn.utils.clip_grad_norm_(net.parameters(), CLIP) > CLIP
        if setting.nuclear_when == "step":
            polars = []
            for layer in layers:
                u, s, vh = decompose(layer)
                polars.append(((u * (s > 1e-6 * s[0])) @ vh).float())
        for layer, polar in zip(layers, polars or [], strict=False):
            layer.weight.grad += 0.1 * polar
        optimizer.step()
        step += 1
    truncate()
    return [parameter.detach().clone() for parameter in net.parameters()]


SETTINGS = [
    Setting(precision, accumulation, clip)
    for precision in ("fp32", "bf16", "fp16")
    for accumulation in (1, 4)
    for clip in (False, True)
]
SETTINGS += [Setting(nuclear_when="step"), Setting(nuclear_when="step", accumulation=4, clip=True)]
# half precision rounds the gradients, and those of weights that differ in the last bit differently
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 1e-3}


def _name(setting: Setting) -> str:
    return (
        f"{setting.precision} x{setting.accumulation}{' clipped' if setting.clip else ''}"
        f" {setting.nuclear_when}"
    )


def _close(received: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(received, expected, strict=True):
        assert relative_error(one, other) <= tolerance


@pytest.mark.parametrize("setting", SETTINGS, ids=_name)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_same_steps_project_and_regularise(
    framework: str, setting: Setting, trace: Trace, tmp_path: Path
) -> None:
    _run(framework, setting, trace, tmp_path)
    assert trace.steps == STEPS
    assert trace.projected == [0, 2, 4, 6]  # 6 is due after the last step
    every = setting.nuclear_when == "step"
    assert trace.regularised == ([0, 1, 2, 3, 4, 5] if every else [0, 2, 4])
    # the micro-batches of a step see one weight, of low rank exactly where the step is due
    assert [step for step, _ in trace.forward_ranks] == [
        step for step in range(STEPS) for _ in range(setting.accumulation)
    ]
    for step, rank in trace.forward_ranks:
        assert (rank == RANK) == (step % 2 == 0), step
    assert trace.plan is not None
    assert {layer.rank for layer in trace.plan.layers} == {RANK}
    _close(trace.weights, _expected(setting), TOLERANCE[setting.precision])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_that_the_scaler_skips_is_none(
    framework: str, clip: bool, accumulation: int, trace: Trace, tmp_path: Path
) -> None:
    """Skipped in the middle of what would be step 2, which is projected: it is done again."""
    overflow = 2 * accumulation + accumulation // 2
    setting = Setting("fp16", accumulation, clip, overflow=overflow)
    _run(framework, setting, trace, tmp_path)
    assert trace.steps == STEPS - 1
    assert trace.projected == [0, 2, 4]
    assert trace.regularised == [0, 2, 4]
    assert [step for step, _ in trace.forward_ranks[::accumulation]] == [0, 1, 2, 2, 3, 4]
    for step, rank in trace.forward_ranks:
        assert (rank == RANK) == (step % 2 == 0), step
    assert all(weight.isfinite().all() for weight in trace.weights)
    _close(trace.weights, _expected(setting), TOLERANCE["fp16"])


def test_what_is_compared_tells_methods_apart() -> None:
    """Clipping, accumulation and the nuclear norm change more than the tolerance."""
    base = _expected(Setting())
    others = [
        Setting(clip=True),
        Setting(accumulation=4),
        Setting(nuclear_when="step"),
        Setting(overflow=2),
        Setting("fp16", clip=True),
        Setting("bf16", clip=True),
    ]
    for setting in others:
        weights = _expected(setting)
        assert relative_error(weights[0], base[0]) > 2 * TOLERANCE[setting.precision], setting


# -- the callbacks themselves ----------------------------------------------------------------------


class Failing(pl.Callback):
    """Stops the training by an exception."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            raise RuntimeError("stop")


def _hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_lightning_takes_the_hooks_off_after_an_exception(tmp_path: Path) -> None:
    setting = Setting()
    callback = on_lightning.RankPruneCallback(setting.options)
    module = Module(mlp())
    loader = torch.utils.data.DataLoader(setting.samples(), batch_size=8)
    trainer = _trainer(tmp_path, [callback, Failing()])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader)
    assert callback.plan is None
    assert callback.controller is not None
    assert callback.controller.step == 3
    assert _rank(module.net[0].weight) > RANK
    assert _hooks(trainer.optimizers[0]) == 0


def test_transformers_takes_a_broken_runs_hooks_off_before_the_next(tmp_path: Path) -> None:
    setting = Setting()
    net, failing = mlp(), True

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if failing and state.global_step == 3:
                raise RuntimeError("stop")

    callback = on_transformers.RankPruneCallback(setting.options)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        num_train_epochs=1,
        dataloader_pin_memory=False,
    )
    optimizer = _sgd(net)
    trainer = transformers.Trainer(
        HFModel(net),
        args,
        train_dataset=setting.samples(),
        optimizers=(optimizer, None),
        callbacks=[callback, Stop()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert callback.controller is not None
    assert callback.controller.step == 3
    failing = False
    trainer.train()
    assert callback.plan is not None
    assert callback.controller is None
    assert _hooks(optimizer) == 0
    failing = True
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    hooked = _hooks(optimizer)
    callback.detach()
    assert hooked > _hooks(optimizer) == 0
    assert callback.controller is None


class Adversaries(pl.LightningModule):
    """Two networks with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(), mlp()

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        for optimizer, net in zip(
            self.optimizers(), (self.generator, self.discriminator), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(net(batch["x"]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [_sgd(self.generator), _sgd(self.discriminator)]


def _fit(module: Any, options: TRP, folder: Path) -> on_lightning.RankPruneCallback:
    callback = on_lightning.RankPruneCallback(options)
    loader = torch.utils.data.DataLoader(Setting().samples(), batch_size=8)
    _trainer(folder, [callback]).fit(module, loader)
    return callback


def test_lightning_counts_the_steps_of_one_optimizer(trace: Trace, tmp_path: Path) -> None:
    module = Adversaries()
    message = r"2 of the module's 2 optimizers hold layers.*TRP\(overrides="
    with pytest.raises(ConfigError, match=message):
        _fit(module, TRP(rank=FixedRank(RANK)), tmp_path)
    options = TRP(rank=FixedRank(RANK), every=2, overrides={"discriminator.*": None})
    callback = _fit(module, options, tmp_path)
    assert trace.steps == STEPS
    assert callback.plan is not None
    assert {layer.name for layer in callback.plan.factorized} == {"generator.0", "generator.2"}
    # a plan chooses as well
    trace.steps = 0
    assert _fit(Adversaries(), TRP(plan=callback.plan), tmp_path).plan is not None
    assert trace.steps == STEPS


def test_lightning_needs_an_optimizer_that_holds_a_layer(tmp_path: Path) -> None:
    module = Adversaries()
    options = TRP(rank=FixedRank(RANK), overrides={"discriminator.*": None})
    module.configure_optimizers = lambda: [  # type: ignore[method-assign]
        _sgd(module.discriminator[0]),
        _sgd(module.discriminator[2]),
    ]
    with pytest.raises(ConfigError, match="none of the module's 2 optimizers holds a layer"):
        _fit(module, options, tmp_path)


def test_a_lightning_module_is_factorised_as_it_is(tmp_path: Path) -> None:
    """Names, FLOPs and copying work while the module is tied to its trainer."""
    setting = Setting()
    module, x = Module(mlp()), setting.batches()[0]
    callback = on_lightning.RankPruneCallback(setting.options, example_inputs=x)
    loader = torch.utils.data.DataLoader(setting.samples(), batch_size=8)
    trainer = _trainer(tmp_path, [callback])
    trainer.fit(module, loader)
    plan = callback.plan
    assert plan is not None
    assert [layer.name for layer in plan.layers] == ["net.0", "net.2"]
    assert (plan.flops or 0) < (plan.dense_flops or 0)
    compact = factorize(module, plan)
    with torch.no_grad():
        assert relative_error(compact(x), module(x)) <= 1e-5


@pytest.mark.parametrize(
    ("module", "packages", "extra"),
    [
        ("lightning", ("pytorch_lightning", "lightning"), "lightning"),
        ("transformers", ("transformers",), "transformers"),
    ],
)
def test_a_missing_framework_names_its_extra(
    module: str, packages: tuple[str, ...], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, package)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    name = f"rankprune.integrations.{module}"
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=rf"rankprune\[{extra}\]"):
        importlib.import_module(name)


# -- optimizers, closures, compiled models, averages -----------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any, bool], torch.optim.Optimizer]] = {
    "sgd fused": lambda p, on: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=on, foreach=False),
    "sgd foreach": lambda p, on: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=on),
    "adamw fused": lambda p, on: torch.optim.AdamW(p, lr=0.01, fused=on, foreach=False),
    "adamw foreach": lambda p, on: torch.optim.AdamW(p, lr=0.01, foreach=on),
}


@pytest.mark.parametrize("when", ["projection", "step"])
@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_and_foreach_optimizers_train_as_the_plain_ones(
    name: str, mode: str, when: str
) -> None:
    """In fp64, to 1e-8."""
    options = TRP(rank=FixedRank(RANK), every=2, nuclear=0.1, nuclear_mode=mode, nuclear_when=when)
    models = [mlp().double(), mlp().double()]
    for model, fast in zip(models, (True, False), strict=True):
        optimizer = OPTIMIZERS[name](model.parameters(), fast)
        trp = attach(model, optimizer, options)
        for x in Setting().batches():
            optimizer.zero_grad()
            model(x.double()).square().mean().backward()
            optimizer.step()
        assert trp.step == STEPS
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_gets_the_nuclear_gradient_in_each_evaluation(
    search: str | None, keyword: bool
) -> None:
    """Written into the loss, the nuclear norm leads to the same weights, in fp64."""
    weight = 0.01
    net, other = mlp().double(), mlp().double()
    x = torch.randn(64, 16, dtype=torch.float64)
    target = torch.randn(64, 16, dtype=torch.float64)
    options = {"lr": 0.5, "max_iter": 6, "line_search_fn": None}
    if search is not None:
        # a line search compares losses, so they must hold the norm of which the gradient is
        options["line_search_fn"] = search
    optimizer = torch.optim.LBFGS(net.parameters(), **options)  # type: ignore[arg-type]
    plain = torch.optim.LBFGS(other.parameters(), **options)  # type: ignore[arg-type]
    # full rank: every step regularises over all directions, and nothing is ever projected away
    trp = attach(
        net,
        optimizer,
        TRP(rank=Ratio(1.0), every=10**6, start=0, nuclear=weight, nuclear_when="step"),
    )
    evaluations = 0

    def norm(model: nn.Sequential) -> Tensor:
        return sum(
            (torch.linalg.matrix_norm(model[i].weight, "nuc") for i in (0, 2)), torch.zeros(())
        )

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        with torch.no_grad():
            return loss + weight * norm(net)

    def regularised() -> Tensor:
        plain.zero_grad()
        loss = (other(x) - target).square().mean() + weight * norm(other)
        loss.backward()
        return loss

    before = copy.deepcopy(net)
    for step in range(3):
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert torch.allclose(loss, plain.step(regularised), rtol=1e-9)
        assert trp.step == step + 1
    assert evaluations >= 3 * 6
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(parameter, same, rtol=0, atol=1e-8)
    assert relative_error(net[0].weight.detach(), before[0].weight.detach()) > 1e-2


def test_closures_are_regularised_each_time_and_only_once() -> None:
    """What the optimizer sees after each evaluation is the loss's gradient and the norm's, once."""
    net, x = mlp().double(), torch.randn(8, 16, dtype=torch.float64)
    weight, seen = 0.3, []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            for _ in range(3):
                closure()
                seen.append(net[0].weight.grad.clone())
            return super().step()

    optimizer = Watching(net.parameters(), lr=0.1)
    options = TRP(rank=FixedRank(RANK), every=10, nuclear=weight)
    attach(net, optimizer, options)
    u, _, vh = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)
    polar = u[:, :RANK] @ vh[:RANK]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    closure()
    expected = net[0].weight.grad + weight * polar
    optimizer.step(closure)
    assert len(seen) == 3
    for gradient in seen:
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("when", ["projection", "step"])
def test_a_step_inside_of_autocast_is_a_step_outside(when: str) -> None:
    """The products of a projection are not rounded to bf16."""
    models = [mlp(), mlp()]
    for model, inside in zip(models, (True, False), strict=True):
        optimizer = _sgd(model)
        options = TRP(rank=FixedRank(RANK), every=1, nuclear=0.1, nuclear_when=when)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            trp = attach(model, optimizer, options)
        for x in Setting().batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                model(x).square().mean().backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
            assert _rank(model[0].weight) == RANK
        trp.detach()
    for parameter, same in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(parameter, same)


def _train_compiled(when: str, tmp_path: Path) -> None:
    setting = Setting(nuclear_when=when)
    net, other = mlp(), mlp()
    plan = _plain(
        net, setting, tmp_path, wrap=lambda m: torch.compile(m, backend="eager", fullgraph=True)
    )
    assert _plain(other, setting, tmp_path) == plan
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)


@pytest.mark.parametrize("when", ["projection", "step"])
def test_a_compiled_model_trains_as_the_uncompiled_one(when: str, tmp_path: Path) -> None:
    apart(lambda: _train_compiled(when, tmp_path))


def test_a_moving_average_is_projected_to_the_plan() -> None:
    net = mlp()
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    optimizer = _sgd(net)
    trp = attach(net, optimizer, TRP(rank=FixedRank(RANK), every=2, nuclear=0.1))
    batches = Setting().batches()
    for x in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
    plan = trp.finish()
    assert plan.factorized
    assert _rank(average.module[0].weight) > RANK
    project(average.module, plan)
    compact = factorize(average.module, plan)
    with torch.no_grad():
        assert relative_error(compact(batches[0]), average(batches[0])) <= 1e-5
        assert relative_error(average(batches[0]), net(batches[0])) > 1e-3
