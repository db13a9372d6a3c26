"""Learning from a dense network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from rankprune.errors import ConfigError
from rankprune.recipes.config import SOFT, make_config
from rankprune.recipes.teacher import Teacher, blocks


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


INPUTS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture
def dense() -> Network:
    torch.manual_seed(0)
    return Network()


def _compact(dense: nn.Module) -> nn.Module:
    plan = rp.make_plan(dense, rp.FixedRank(2), overrides={"head": None}, guard=False)
    return rp.factorize(dense, plan)


def test_blocks_are_the_innermost_modules_of_several_layers(dense: Network) -> None:
    assert blocks(dense) == ["stage.0", "stage.1"]
    assert blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []


def test_the_dense_network_has_nothing_to_learn_from_itself(dense: Network) -> None:
    loss, logits = Teacher(dense, soft=1.0)(copy.deepcopy(dense), INPUTS, LABELS)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(logits, dense(INPUTS))


def test_the_parts_of_the_loss_add_up(dense: Network) -> None:
    student = _compact(dense)
    answers, logits = dense(INPUTS) / 4, student(INPUTS)
    hard = nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
    soft = nn.functional.kl_div(
        (logits / 4).log_softmax(1), answers.softmax(1), reduction="batchmean"
    )
    x, y = dense.stem(INPUTS), student.stem(INPUTS)
    errors = []
    for theirs, ours in zip(dense.stage, student.stage, strict=True):
        x, y = theirs(x), ours(y)
        errors.append((x - y).square().mean() / x.square().mean())
    expected = 0.3 * hard + 0.7 * 16 * soft + 2 * (errors[0] + errors[1]) / 2
    loss, _ = Teacher(dense, soft=0.7, match=2.0)(student, INPUTS, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_answers_to_an_image_and_its_mirror_image(dense: Network) -> None:
    """Only the answers are the mean of two: blocks are compared on the image itself."""
    student = copy.deepcopy(dense)
    both = (dense(INPUTS) + dense(INPUTS.flip(-1))) / 2
    expected = 16 * nn.functional.kl_div(
        (dense(INPUTS) / 4).log_softmax(1), (both / 4).softmax(1), reduction="batchmean"
    )
    loss, _ = Teacher(dense, soft=1.0, match=2.0, mirrored=True)(student, INPUTS, LABELS)
    torch.testing.assert_close(loss, expected)
    assert loss > 1e-6


def test_gradients_reach_the_student_only_and_hooks_do_not_stay(dense: Network) -> None:
    student = _compact(dense)
    Teacher(dense)(student, INPUTS, LABELS)[0].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in dense.parameters())
    for model in (dense, student):
        assert not any(module._forward_hooks for module in model.modules())


BASE = {"data": "fake", "model": "digits_cnn", "flops": 0.5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0),
        ({"baseline": True}, SOFT),
        ({"weights": "dense.safetensors"}, SOFT),
        ({"pretrained": True, "distill": 0.5}, 0.5),
        ({"baseline": True, "method": "dense"}, 0.0),
        ({"distill": 0.0}, 0.0),
    ],
)
def test_there_is_a_teacher_where_there_is_a_dense_network(
    options: dict[str, object], expected: float
) -> None:
    assert make_config({**BASE, **options}).soft() == expected


def test_a_teacher_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no trained dense network to learn from"):
        make_config({**BASE, "distill": 0.5})
    for options in ({"match": 1.0}, {"match": 1.0, "baseline": True, "distill": 0.0}):
        with pytest.raises(ConfigError, match=r"match=1\.0 needs a dense network"):
            make_config({**BASE, **options})
    with pytest.raises(ConfigError, match="mirrored needs a dense network"):
        make_config({**BASE, "mirrored": True})


def test_a_target_must_be_reached_before_the_factors_are_trained() -> None:
    with pytest.raises(ConfigError, match="exceed the run"):
        make_config({**BASE, "start": 0.2, "descent": 0.5, "tail": 0.4})
