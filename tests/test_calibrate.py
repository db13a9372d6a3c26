"""Calibration: what is summed, what is planned and factorised with it, BatchNorm's statistics."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankprune as rp
from rankprune import recorder
from rankprune.moments import input_patches
from runs import apart


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def images(count: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Smooth images: their channels and pixels correlate."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 8, 3, 12, 12, generator=generator)
    return list(noise.cumsum(-1).cumsum(-2) * torch.tensor([1.0, 0.3, 0.05]).reshape(3, 1, 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.shared = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.shared.weight

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.again(torch.relu(self.shared(self.q(x))))


def test_moments_of_every_layer() -> None:
    model = convnet().train()
    seen: list[torch.Tensor] = []
    model[7].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    done: list[int] = []
    stats = rp.calibrate(model, images(), progress=done.append)
    assert set(stats.moments) == {"0", "3", "7"}
    assert stats.batches == 6
    assert done == [1, 2, 3, 4, 5, 6]
    assert str(stats) == "inputs of 3 layers over 6 batches"
    assert all(module.training for module in model.modules())
    assert float(model[1].num_batches_tracked) == 0  # it ran in eval mode
    x = torch.cat(seen).double()
    moment = stats.moments["7"]
    gram = x.T @ x / len(x)
    torch.testing.assert_close(moment.second_moment()[0], gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment.mean()[0], x.mean(0), rtol=1e-5, atol=1e-6)
    # all can take their mean back: by a BatchNorm, or by a bias
    assert all(moment.centred for moment in stats.moments.values())
    assert stats.norms == {"0": "1"}
    assert len(model[7]._forward_pre_hooks) == 1  # the test's own


def test_fp64_sums() -> None:
    stats = rp.calibrate(convnet(), images(), dtype=torch.float64)
    assert all(moment.second_moment().dtype == torch.float64 for moment in stats.moments.values())
    with pytest.raises(rp.ConfigError, match=r"dtype=torch\.float16"):
        rp.calibrate(convnet(), images(), dtype=torch.float16)


def test_what_a_batch_may_be() -> None:
    model = convnet()
    expected = rp.calibrate(model, images()).moments["3"].second_moment()
    for batches in (
        DataLoader(TensorDataset(torch.cat(images()), torch.zeros(48)), batch_size=8),
        [(x,) for x in images()],
        [{"input": x} for x in images()],
        iter(images()),
    ):
        found = rp.calibrate(model, batches).moments["3"].second_moment()
        torch.testing.assert_close(found, expected)


def test_masked_positions_do_not_count() -> None:
    model = Attention()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    moment = rp.calibrate(model, [{"x": x, "attention_mask": mask}]).moments["q"]
    assert moment.count == 8
    kept = x[mask.bool()].double()
    torch.testing.assert_close(moment.second_moment()[0], kept.T @ kept / 8, rtol=1e-5, atol=1e-6)


def test_tied_layers_share_their_moments() -> None:
    stats = rp.calibrate(Attention(), [torch.randn(2, 5, 16)])
    assert set(stats.moments) == {"q", "shared"}
    assert stats.moments["shared"].count == 20
    assert stats.moments["q"].count == 10


def test_only_some_layers() -> None:
    assert set(rp.calibrate(convnet(), images(), layers="7").moments) == {"7"}
    assert set(rp.calibrate(convnet(), images(), layers=["0", "[37]"]).moments) == {"0", "3", "7"}
    with pytest.raises(rp.ConfigError, match="pattern 'head' matches no layer"):
        rp.calibrate(convnet(), images(), layers="head")


def test_planned_error_is_measured_on_held_out_batches() -> None:
    """Of every layer alone: what the plan says is lost is lost, on data that it has not seen."""
    model = convnet().eval()
    stats = rp.calibrate(model, images(60, seed=1))
    for name in ("3", "7"):
        plan = rp.make_plan(model, rp.FixedRank(6), stats=stats, guard=False, overrides={"0": None})
        keep = {layer.name: None for layer in plan.layers if layer.name != name}
        plan = rp.make_plan(model, rp.FixedRank(6), stats=stats, guard=False, overrides=keep)
        compact = rp.factorize(model, plan, stats=stats)
        with torch.no_grad():
            x = model[: int(name)](torch.cat(images(60, seed=2)))
            dense, low = model[int(name)](x), compact[int(name)](x)
        axes = [axis for axis in range(dense.dim()) if axis != 1]
        # the mean stays as it was, so it counts neither as energy nor as error
        energy = plan[name].energy
        assert energy is not None
        errors = (dense - low).square().sum() / (dense - dense.mean(axes, True)).square().sum()
        assert float(errors) == pytest.approx(1 - energy, rel=0.15)
        assert 1e-5 < 1 - energy < 0.5


def mean_error(dense: torch.Tensor, low: torch.Tensor) -> float:
    """Of the channels' means, in units of the outputs' deviation."""
    axes = [axis for axis in range(dense.dim()) if axis != 1]
    return float((dense - low).mean(axes).abs().max() / dense.std())


@pytest.mark.parametrize("sensitivity", [False, True])
def test_outputs_keep_their_mean(sensitivity: bool) -> None:
    """By the bias where there is one, by the BatchNorm's running mean where not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    ).eval()
    model[1].running_mean.normal_()
    x = torch.cat(images(8)) + 2.0
    stats = rp.calibrate(model, [x], sensitivity=sensitivity)
    assert [stats.moments[name].centred for name in "0358"] == [True, True, False, True]
    assert stats.norms == {"0": "1"}
    with torch.no_grad():
        for name, after in (("0", 2), ("3", 4), ("8", 9)):
            rules = {other: None for other in "0358" if other != name}
            plan = rp.make_plan(model, rp.FixedRank(2), overrides=rules, guard=False)
            compact = rp.factorize(model, plan, stats=stats)
            plainly = rp.factorize(model, plan)
            dense, low, plain = (part[:after](x) for part in (model, compact, plainly))
            if sensitivity:  # of what counts, which is not all alike
                assert mean_error(dense, low) < mean_error(dense, plain)
            else:
                bound = 0.05 if name == "0" else 1e-4  # rectified after the BatchNorm
                assert mean_error(dense, low) < bound < mean_error(dense, plain)


def test_a_batchnorm_that_is_not_alone_with_a_layer_is_left() -> None:
    """Nor one that gets something else, nor one of two that a shared layer is called for."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 3, 1, bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
            self.other = nn.Conv2d(3, 3, 1, bias=False)
            self.after = nn.BatchNorm2d(3)
            self.last = nn.Conv2d(3, 3, 1, bias=False)
            self.free = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm in self.norms:
                x = norm(self.head(x))
            return self.free(self.last(self.after(self.other(x) + x)))

    model = Shared()
    stats = rp.calibrate(model, images(2))
    assert stats.norms == {"last": "free"}
    centred = {name: moment.centred for name, moment in stats.moments.items()}
    assert centred == {"head": False, "other": False, "last": True}
    plan = rp.make_plan(model, rp.FixedRank(1), guard=False)
    rp.factorize(model, plan, stats=stats)  # it has no running mean to change
    elsewhere = nn.Sequential(model)
    assert stats.within("0").norms == {"0.last": "0.free"}
    plan = rp.make_plan(elsewhere, rp.FixedRank(1), guard=False, stats=stats.within("0"))
    assert len(plan.factorized) == 3


def test_a_batchnorm_behind_an_activation_in_place_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    stats = rp.calibrate(model, images(1))
    assert not stats.norms
    assert not stats.moments["0"].centred


def test_a_batchnorm_that_several_layers_share_is_left() -> None:
    norm = nn.BatchNorm2d(3)
    layers = [nn.Conv2d(3, 3, 1, bias=False) for _ in range(2)]
    stats = rp.calibrate(nn.Sequential(layers[0], norm, layers[1], norm), images(1))
    assert not stats.norms


def test_a_layer_whose_output_goes_to_a_batchnorm_only_at_times_is_left() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    stats = rp.calibrate(nn.Sequential(layer, nn.BatchNorm2d(3), layer, nn.ReLU()), images(1))
    assert not stats.norms


def test_better_outputs_than_without() -> None:
    model = convnet().eval()
    stats = rp.calibrate(model, images(30, seed=1))
    x = torch.cat(images(10, seed=2))

    def error(compact: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x) - compact(x)).norm() / model(x).norm())

    budget = rp.Budget(params=0.4)
    plain = rp.make_plan(model, budget)
    aware = rp.make_plan(model, budget, stats=stats)
    assert aware.params <= 0.4 * aware.dense_params
    plainly = error(rp.factorize(model, plain))
    assert error(rp.factorize(model, plain, stats=stats)) < 0.8 * plainly
    assert error(rp.factorize(model, aware, stats=stats)) < 0.8 * plainly


def test_rules_follow_the_outputs() -> None:
    """Inputs of rank 4 need rank 4, whatever the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(20_000, 4) @ torch.randn(4, 32)
    stats = rp.calibrate(model, [x])
    plan = rp.make_plan(model, rp.Energy(0.999), stats=stats)
    assert plan["0"].rank is not None
    assert plan["0"].rank <= 4
    assert rp.make_plan(model, rp.Energy(0.9999), guard=False)["0"].rank > 24


def test_transposed_convolutions_are_left_to_plain_svd() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3))
    stats = rp.calibrate(model, [torch.randn(2, 3, 8, 8)])
    assert set(stats.moments) == {"0"}
    plan = rp.make_plan(model, rp.Ratio(0.5), guard=False, stats=stats)
    assert len(plan.factorized) == 2
    rp.factorize(model, plan, stats=stats)


def test_refusals() -> None:
    model = convnet()
    with pytest.raises(rp.ConfigError, match="no batches"):
        rp.calibrate(model, [])
    with pytest.raises(rp.ConfigError, match="does not run on a batch"):
        rp.calibrate(model, [torch.zeros(1, 5, 4, 4)])
    with pytest.raises(rp.ConfigError, match="empty list"):
        rp.calibrate(model, [[]])
    with pytest.raises(rp.NumericsError, match="layer '0' is called with NaN"):
        rp.calibrate(model, [torch.full((1, 3, 8, 8), torch.nan)])
    stats = rp.calibrate(Attention(), [torch.randn(2, 5, 16)])
    with pytest.raises(rp.ConfigError, match="stats are of another model: they have a layer 'q'"):
        rp.make_plan(model, rp.Energy(0.9), stats=stats)
    with pytest.raises(rp.ConfigError, match="stats must come from calibrate, got dict"):
        rp.make_plan(model, rp.Energy(0.9), stats={})  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batchnorm_becomes_the_average_of_the_batches() -> None:
    model = convnet().eval()
    model[1].momentum = 0.3
    with torch.no_grad():
        seen = [model[0](x) for x in images()]
    assert rp.recalibrate_bn(model, images()) is model
    means = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, variances, rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.3
    assert not any(module.training for module in model.modules())


def test_batchnorm_is_left_as_it_was_after_an_error() -> None:
    model = convnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for batches in ([], [images()[0], torch.zeros(1, 5, 4, 4)]):
        with pytest.raises(rp.ConfigError):
            rp.recalibrate_bn(model, batches)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
    assert model.training
    plain = nn.Sequential(nn.Linear(3, 3))
    assert rp.recalibrate_bn(plain, []) is plain  # there is nothing to do


def test_layers_that_see_one_tensor_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.q(x), self.k(x)
            x.mul_(2)  # the same tensor, with other values
            return q + k + self.v(x)

    cut: list[int] = []

    def counting(spec: rp.LayerSpec, inputs: torch.Tensor) -> torch.Tensor:
        cut.append(1)
        return input_patches(spec, inputs)

    monkeypatch.setattr(sys.modules["rankprune.recorder"], "input_patches", counting)
    x = torch.randn(20, 8)
    expected = (x.double().T @ x.double() / 20).float().double()
    moments = rp.calibrate(Three(), [x.clone()]).moments
    for name, factor in (("q", 1), ("k", 1), ("v", 4)):
        torch.testing.assert_close(
            moments[name].second_moment()[0], factor * expected, rtol=1e-5, atol=1e-6
        )


def _stats(model: nn.Module, **options: Any) -> rp.Stats:
    return rp.calibrate(model, images(), **options)


def test_autocast_around_it_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 4))
    batches = [torch.randn(100, 24) for _ in range(3)]
    plain = rp.calibrate(model, batches).moments["0"]
    with torch.autocast("cpu", torch.bfloat16):
        half = rp.calibrate(model, batches).moments["0"]
    assert torch.equal(plain.second_moment(), half.second_moment())
    assert torch.equal(plain.mean(), half.mean())


def test_activations_in_place_are_seen_in_inference_mode_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
    ).eval()
    with torch.inference_mode():
        stats = _stats(model)
    assert not stats.norms
    assert not stats.moments["0"].centred


def _calibrated_after_compiling() -> None:
    model: Any = torch.compile(convnet().eval(), backend="eager")
    with torch.no_grad():
        model(images()[0])
    assert len(rp.calibrate(model, images()).moments) == 3


def test_compiled_code_knows_the_hooks() -> None:
    apart(_calibrated_after_compiling)


def test_a_batchnorm_over_another_dimension_is_left() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    assert not rp.calibrate(model, [torch.randn(5, 8, 6)]).norms
    assert rp.calibrate(model, [torch.randn(5, 6)]).norms == {"0": "1"}


def test_a_model_that_calls_none_of_its_layers_is_refused() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(rp.ConfigError, match="no layer that can be calibrated is called"):
        rp.calibrate(Idle(), [torch.randn(2, 4)])


@pytest.mark.parametrize("sensitivity", [False, True])
def test_a_few_examples_at_a_time_add_up(
    monkeypatch: pytest.MonkeyPatch, sensitivity: bool
) -> None:
    whole = _stats(convnet(), sensitivity=sensitivity)
    monkeypatch.setattr(recorder, "MOST", 3 * 9 * 144)
    parts = _stats(convnet(), sensitivity=sensitivity)
    for name, moment in whole.moments.items():
        other = parts.moments[name]
        assert other.count == moment.count
        torch.testing.assert_close(other.second_moment(), moment.second_moment(), rtol=1e-4, atol=0)


def test_sensitivity_without_a_batch_and_without_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        stats = rp.calibrate(
            model, [torch.randn(3, 8, 9)], sensitivity=lambda output: output.square().sum()
        )
    assert stats.moments["0"].count == 6 * 7
    network, batches = convnet(), images()
    with torch.inference_mode():
        assert rp.calibrate(network, batches, sensitivity=True).moments.keys() == {"0", "3", "7"}


def test_a_bias_that_two_layers_share_is_put_right_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    model, batches = Shared(), [torch.randn(64, 12) + 2.0]
    stats = rp.calibrate(model, batches)
    plan = rp.make_plan(model, rp.FixedRank(3), stats=stats, guard=False)
    compact = rp.factorize(model, plan, stats=stats)
    assert compact.a[1].bias is compact.b[1].bias  # type: ignore[index]
    assert rp.count_params(compact) == plan.params
    error = compact(batches[0]) - model(batches[0])
    assert error.mean(0).abs().max() < 1e-4
