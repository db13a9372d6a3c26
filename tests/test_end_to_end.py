"""From a dense network to a saved compact one, in a plain torch loop."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankprune as rp
from cases import write_plan

OPTIONS: dict[str, dict[str, Any]] = {
    "rule": {"rank": rp.Energy(0.8), "nuclear": 1e-3},
    "every step": {"rank": rp.Ratio(0.3), "nuclear": 1e-3, "nuclear_when": "step", "every": 1},
    "decoupled": {"rank": rp.FixedRank(3), "nuclear": 1e-2, "nuclear_mode": "decoupled"},
    "budget": {"rank": rp.Budget(flops=0.5)},
    "descending budget": {"rank": rp.Budget(flops=0.5, params=0.6), "descent": 8, "every": 2},
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (8,), generator=generator)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    images, labels = batch(step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("name", OPTIONS)
def test_decomposed_network_is_the_projected_one(name: str) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    images = batch(99)[0]
    trp = rp.attach(
        model, optimizer, rp.TRP(**{"every": 3, **OPTIONS[name]}), example_inputs=images
    )
    for step in range(13):
        one_step(model, optimizer, step)
    plan = trp.finish()
    compact = rp.factorize(model.eval(), plan)
    assert plan.factorized
    difference = (compact(images) - model(images)).abs().max() / model(images).abs().max()
    assert difference < 1e-5
    cost = rp.profile(compact, images)
    assert (cost.flops, cost.params) == (plan.flops, plan.params)
    target = OPTIONS[name]["rank"]
    if isinstance(target, rp.Budget):
        assert plan.dense_flops is not None
        assert cost.flops <= 0.5 * plan.dense_flops
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(model, optimizer, 100)  # the hooks are off
    assert trp.finish() is plan
    assert trp.step == 13
    assert any(not torch.equal(frozen[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", OPTIONS)
def test_resuming_at_any_step_changes_nothing(name: str) -> None:
    options = rp.TRP(**{"every": 3, **OPTIONS[name]})
    images = batch(99)[0]
    model = make_model()
    optimizer = make_optimizer(model)
    trp = rp.attach(model, optimizer, options, example_inputs=images)
    states = []
    for step in range(12):
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), trp.state_dict())))
        one_step(model, optimizer, step)
    plan = trp.finish()
    for start, (weights, momentum, state) in enumerate(states):
        again = make_model()
        again.load_state_dict(weights)
        other = make_optimizer(again)
        other.load_state_dict(momentum)
        resumed = rp.attach(again, other, options, example_inputs=images, state=state)
        for step in range(start, 12):
            one_step(again, other, step)
        assert resumed.finish() == plan
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), (start, key)


def test_projection_happens_before_every_mth_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    projected: list[int] = []
    original = rp.Controller.project

    def project(self: rp.Controller) -> None:
        projected.append(self.step)
        original(self)

    monkeypatch.setattr(rp.Controller, "project", project)
    rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(2), every=3, start=2, end=9))
    for step in range(12):
        one_step(model, optimizer, step)
    assert projected == [2, 5, 8]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_steps(fused: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    trp = rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(2), every=2, nuclear=1e-3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        if step in (1, 4):
            loss = loss * float("inf")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert trp.step == 4


@pytest.mark.parametrize("fused", [False, True])
def test_nuclear_gradient_does_not_depend_on_the_loss_scale(fused: bool) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(2), every=1, nuclear=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        images, labels = batch(0)
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        scaler.step(optimizer)
        weights.append(model[6].weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_regularise_adds_autograds_nuclear_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    weight = model[0].weight
    controller = rp.Controller(
        model, rp.TRP(rank=rp.FixedRank(5), nuclear=0.3, nuclear_when="step", guard=False)
    )
    weight.grad = torch.zeros_like(weight)
    controller.regularise()
    (expected,) = torch.autograd.grad(0.3 * torch.linalg.matrix_norm(weight, "nuc"), weight)
    assert (weight.grad - expected).abs().max() < 1e-8


def test_diverged_weights_are_refused_by_name() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    trp = rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(2), every=1))
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    with pytest.raises(rp.NumericsError, match=r"'6'.* 1 NaN"):
        trp.project()


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(rp.ConfigError, match="none of the model's parameters"):
        rp.attach(make_model(), make_optimizer(make_model()), rp.TRP(rank=rp.FixedRank(2)))


class Tied(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    x = torch.randn(3, 16)
    plan = rp.make_plan(model, rp.FixedRank(4), example_inputs=x)
    assert plan["first"].tied == ("second",)
    compact = rp.factorize(model, plan)
    assert compact.first[0].weight is compact.second[0].weight
    assert rp.profile(compact, x).params == plan.params == 2 * 16 * 4 + 2 * 16
    rp.save(compact, tmp_path / "m")
    loaded = rp.load(Tied(), tmp_path / "m")
    assert torch.equal(loaded(x), compact(x))
    assert loaded.first[0].weight is loaded.second[0].weight


@pytest.fixture
def compact() -> nn.Module:
    model = make_model().eval()
    return rp.factorize(model, rp.make_plan(model, rp.Ratio(0.3), example_inputs=batch(0)[0]))


def test_round_trips_are_exact(compact: nn.Module, tmp_path: Path) -> None:
    images = batch(1)[0]
    rp.save(compact, tmp_path / "m", metadata={"note": "é"})
    assert rp.read_plan(tmp_path / "m").metadata["note"] == "é"
    for other in (
        copy.deepcopy(compact),
        pickle.loads(pickle.dumps(compact)),
        rp.load(make_model(), tmp_path / "m").eval(),
    ):
        assert torch.equal(other(images), compact(images))


def test_saving_never_loses_what_was_there(
    compact: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    rp.save(compact, folder)
    with pytest.raises(rp.FileError, match="holds a saved model"):
        rp.save(compact, folder)
    before, images = compact(batch(0)[0]), batch(0)[0]
    changed = copy.deepcopy(compact)
    with torch.no_grad():
        changed[1].weight.add_(1)
    replace = __import__("os").replace
    for failing in (1, 2):
        calls = 0

        def broken(source: Any, target: Any, *, at: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(28, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", broken)
            with pytest.raises(rp.FileError, match="No space left"):
                rp.save(changed, folder, overwrite=True)
        assert torch.equal(rp.load(make_model(), folder).eval()(images), before)
        assert not list(folder.glob("*.tmp"))
        assert not list(folder.glob(".*.tmp"))
    rp.save(changed, folder, overwrite=True)
    assert torch.equal(rp.load(make_model(), folder).eval()(images), changed(images))
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_weights_of_others_are_never_removed(
    compact: nn.Module, tmp_path: Path, overwrite: bool
) -> None:
    """Other libraries call their weights model.safetensors too."""
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(3)}, path, metadata={"format": "pt"})
    before = path.read_bytes()
    rp.save(compact, tmp_path, overwrite=overwrite)
    rp.save(compact, tmp_path, overwrite=True)
    assert path.read_bytes() == before
    images = batch(0)[0]
    assert torch.equal(rp.load(make_model(), tmp_path).eval()(images), compact(images))


def test_damaged_weights_are_refused(compact: nn.Module, tmp_path: Path) -> None:
    rp.save(compact, tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(content), (60,), generator=generator).tolist():
        for damaged in (
            content[:position],
            content[:position]
            + bytes([content[position] ^ (1 << position % 8)])
            + content[position + 1 :],
        ):
            path.write_bytes(damaged)
            with pytest.raises(rp.FileError, match=r"model\.safetensors"):
                rp.load(make_model(), tmp_path)


def edited(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "plan.json").read_text())
    for key, value in changes.items():
        target, _, field = key.partition("__")
        if field:
            document[target][field] = value
        else:
            document[target] = value
    write_plan(folder, document)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights__file": "../model.safetensors"},
        {"weights__file": "/etc/passwd"},
        {"weights__sha256": "0" * 64},
        {"weights__sha256": 5},
        {"schema_version": 2},
        {"layers": []},
        {"layers": 3},
        {"dense_params": -1},
        {"weights": {}},
    ],
)
def test_edited_plans_are_refused(compact: nn.Module, tmp_path: Path, changes: Any) -> None:
    rp.save(compact, tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises((rp.PlanError, rp.FileError)):
        rp.load(make_model(), tmp_path)


def test_another_model_is_refused_and_left_alone(compact: nn.Module, tmp_path: Path) -> None:
    rp.save(compact, tmp_path)
    other = nn.Sequential(*list(make_model())[:-1], nn.Linear(24, 5))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises((rp.PlanError, rp.FileError), match="5"):
        rp.load(other, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_report_counts_what_is_there(compact: nn.Module) -> None:
    model, images = make_model().eval(), batch(0)[0]
    summary = rp.report(model, compact, example_inputs=images)
    again = rp.Report.from_dict(json.loads(json.dumps(summary.to_dict())))
    assert again == summary
    assert summary.compact.params == sum(p.numel() for p in compact.parameters())
    tensors = [*compact.parameters(), *compact.buffers()]
    assert summary.compact.bytes == sum(t.numel() * t.element_size() for t in tensors)
    saved = sum(layer.dense_flops - layer.flops for layer in summary.layers)
    assert summary.dense.flops - summary.compact.flops == saved
    assert "FLOPs" in str(summary)
