"""Distillation: a compact model learns the dense one's answers, with and without TRP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.recipes.distill import Distillation, distill, match_hidden, match_logits


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)
    )


def batches(count: int = 60) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 16, generator=generator) for _ in range(count)]


def distance(student: nn.Module, dense: nn.Module) -> float:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float(match_logits(student(x), dense(x), None))


def test_the_compact_model_comes_closer() -> None:
    dense = teacher()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    student = rp.factorize(dense, rp.make_plan(dense, rp.Budget(params=0.5)))
    start = distance(student, dense)
    losses: list[float] = []
    found = distill(
        student, dense, batches(), Distillation(lr=1e-2),
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert found is None
    assert len(losses) == 60
    assert distance(student, dense) < 0.5 * start
    assert not student.training
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())


def test_with_trp_the_projected_model_is_the_factorised_one() -> None:
    dense = teacher()
    plan = rp.make_plan(dense, rp.Budget(params=0.5))
    start = distance(rp.factorize(dense, plan), dense)
    student = rp.defactorize(rp.factorize(dense, plan))
    options = Distillation(lr=1e-2, trp=rp.TRP(plan=plan, every=5))
    found = distill(student, dense, batches(), options)
    assert found is not None
    assert [layer.rank for layer in found.layers] == [layer.rank for layer in plan.layers]
    compact = rp.factorize(student, found)
    x = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(compact(x), student(x), rtol=1e-4, atol=1e-5)
    assert distance(compact, dense) < 0.7 * start
    assert not any(parameter._backward_hooks for parameter in student.parameters())


def test_accumulated_batches_make_fewer_steps() -> None:
    dense = teacher()
    student = rp.factorize(dense, rp.make_plan(dense, rp.Budget(params=0.5)))
    steps: list[int] = []
    distill(
        student, dense, batches(10), Distillation(accumulate=4),
        progress=lambda step, loss: steps.append(step),
    )  # fmt: skip
    assert steps == [1, 2, 3]


def test_losses() -> None:
    a, b = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = nn.functional.kl_div(
        a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(match_logits(a, b, None), expected.mean())
    torch.testing.assert_close(match_logits(a, b, mask), expected[mask.bool()].mean())
    hidden: Any = SimpleNamespace(last_hidden_state=a)
    assert float(match_hidden(hidden, hidden, mask)) == 0.0
    torch.testing.assert_close(match_hidden(a, b, None), (a - b).square().mean() / b.var(-1).mean())
    with pytest.raises(rp.ConfigError, match=r"\(SimpleNamespace\) has no logits"):
        match_logits(hidden, hidden, None)


def test_refusals() -> None:
    dense = teacher()
    with pytest.raises(rp.ConfigError, match="no batches"):
        distill(dense, dense, [])
    broken = teacher()
    nn.init.constant_(broken[0].weight, torch.nan)
    with pytest.raises(rp.NumericsError, match="diverged at batch 0"):
        distill(teacher(), broken, batches(1))
