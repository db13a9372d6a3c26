"""Sensitivity: inputs weighted by the gradients of the outputs, and what a budget makes of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.moments import input_patches
from rankprune.recorder import sampled_loss


class Mixed(nn.Module):
    """Convolutions with activations that change their inputs in place, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)
        self.fc = nn.Linear(8, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.first(x))
        return self.fc(self.relu(self.grouped(hidden)).mean((2, 3)))


def test_inputs_count_by_their_gradients() -> None:
    model = Mixed()
    batches = [torch.randn(4, 3, 9, 9) for _ in range(3)]
    target = torch.randn(4, 6)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output * target).sum()

    stats = rp.calibrate(model, batches, sensitivity=loss)
    # the same by hand: a plain forward that keeps every input and output
    expected: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for x in batches:
        a = model.first(x)
        b = model.grouped(a.relu())
        c = model.fc(b.relu().mean((2, 3)))
        gradients = torch.autograd.grad(loss(c), (a, b, c))
        seen = (x, a.relu(), b.relu().mean((2, 3)))
        for name, value, gradient in zip(("first", "grouped", "fc"), seen, gradients, strict=True):
            spec = rp.LayerSpec.of(model.get_submodule(name))
            assert spec is not None
            patches = input_patches(spec, value.detach()).double()
            by_group = gradient.double().unflatten(1, (spec.groups, -1))  # [B, g, N/g, …]
            squares = by_group.square().sum(2).transpose(0, 1).flatten(1)
            gram = (patches * squares.unsqueeze(-1)).mT @ patches
            expected[name] = expected.get(name, 0) + gram
            counts[name] = counts.get(name, 0) + patches.shape[1]
    assert set(stats.moments) == set(expected)
    for name, moment in stats.moments.items():
        assert moment.weighted
        assert moment.count == counts[name]
        torch.testing.assert_close(
            moment.second_moment() * moment.count, expected[name], rtol=1e-4, atol=1e-6
        )


def test_nothing_is_left_behind() -> None:
    model = Mixed().train()
    model.first.weight.requires_grad_(False)
    rp.calibrate(model, [torch.randn(2, 3, 9, 9)], sensitivity=True)
    assert not model.first.weight.requires_grad
    assert model.first.bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_a_budget_spares_what_the_answers_depend_on() -> None:
    """Two branches alike, of which one hardly reaches the output."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.loud(x)) + 0.01 * torch.tanh(self.quiet(x)))

    model = Branches()
    batches = [torch.randn(64, 32) for _ in range(4)]
    stats = rp.calibrate(model, batches)
    sensitive = rp.calibrate(model, batches, sensitivity=True)
    budget = rp.Budget(params=0.7)
    plain = rp.make_plan(model, budget, stats=stats)
    plan = rp.make_plan(model, budget, stats=sensitive)
    assert plan["quiet"].params < plain["quiet"].params
    assert plan["loud"].params > plan["quiet"].params
    x = torch.randn(512, 32)

    def divergence(compact: nn.Module) -> float:
        with torch.no_grad():
            ours, theirs = compact(x).log_softmax(-1), model(x).log_softmax(-1)
            return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    aware = divergence(rp.factorize(model, plan, stats=stats))
    assert aware < 0.5 * divergence(rp.factorize(model, plain, stats=stats))


def test_layers_of_unknown_sensitivity_stay_dense_under_a_budget() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    stats = rp.calibrate(model, [torch.randn(8, 16)], layers="0", sensitivity=True)
    plan = rp.make_plan(model, rp.Budget(params=0.9), stats=stats)
    assert plan["1"].reason == "its sensitivity was not measured"
    assert not plan["0"].dense
    assert rp.make_plan(model, rp.FixedRank(2), stats=stats)["1"].rank == 2


def _tensor(x: torch.Tensor) -> torch.Tensor:
    return x


def _with_logits(x: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=x)


def _as_mapping(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": x}


@pytest.mark.parametrize("wrap", [_tensor, _with_logits, _as_mapping])
def test_sampled_answers_have_the_fisher_information(
    wrap: Callable[[torch.Tensor], object],
) -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(2, 3, 4)
    draws = 4000
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(sampled_loss(wrap(logits), None, generator), logits)
        total += gradient.square()
    shares = logits.detach().softmax(-1)
    torch.testing.assert_close(total / draws, shares * (1 - shares), rtol=0.1, atol=0.02)


def test_hidden_states_and_masks() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    output = SimpleNamespace(last_hidden_state=hidden)
    (gradient,) = torch.autograd.grad(sampled_loss(output, mask, generator), hidden)
    assert (gradient[mask == 0] == 0).all()
    assert (gradient[mask == 1] != 0).all()
    with pytest.raises(rp.ConfigError, match="the model returns tuple"):
        sampled_loss((hidden,), None, generator)


def test_the_classes_of_a_picture_are_its_channels() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    total, draws = torch.zeros(1, 3, 2, 2), 4000
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(sampled_loss(logits, None, generator), logits)
        total += gradient.square()
    shares = logits.detach().softmax(1)
    torch.testing.assert_close(total / draws, shares * (1 - shares), rtol=0.1, atol=0.02)
