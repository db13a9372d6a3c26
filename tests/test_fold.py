"""Folding changes what a model is made of, and none of its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import relative_error
from rankprune import Energy, ExportError, FixedRank, factorize, fold, make_plan


def _randomise(model: nn.Module) -> nn.Module:
    """Statistics and scales that a wrong fold would get wrong."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class _Residual(nn.Module):
    """The convolution's output is used twice, so its BatchNorm must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class _NormAct(nn.BatchNorm2d):
    """As timm's: a BatchNorm by its class, and more than that by its forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class _WithoutItsBias(nn.Module):
    """Takes a layer's weight and leaves the layer uncalled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.conv.weight))


class _TwoNames(nn.Module):
    """Its layers are called by another name than the one that their weights are stored under."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        self.stages = nn.ModuleList([self.first])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class _Twice(nn.Module):
    """One layer, called twice, with a BatchNorm after the second call only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


def _image(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 6, 6)


# name: model, input, layers with a linear map or BatchNorm before and after
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int, int]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), _image(), 2, 1),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)),
        _image(),
        2,
        1,
    ),
    "not affine": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)),
        _image(),
        2,
        1,
    ),
    "1-d": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding="same"), nn.BatchNorm1d(8)),
        torch.randn(2, 4, 9),
        2,
        1,
    ),
    "3-d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)),
        torch.randn(2, 2, 5, 5, 5),
        2,
        1,
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)),
        torch.randn(5, 6),
        2,
        1,
    ),
    "with an activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), _NormAct(8)),
        _image(),
        2,
        2,
    ),
    "over another dimension": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)),
        torch.randn(5, 8, 6),
        2,
        2,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)),
        _image(),
        2,
        1,
    ),
    "grouped transposed stays": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        _image(),
        2,
        2,
    ),
    "activation between": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
        _image(),
        2,
        2,
    ),
    "residual": (_Residual, _image(), 2, 2),
    "called twice": (_Twice, _image(), 2, 2),
    "two names": (_TwoNames, _image(), 2, 1),
    "weight taken": (_WithoutItsBias, _image(), 2, 2),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
        _image(),
        2,
        2,
    ),
    "two linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)),
        torch.randn(3, 6),
        2,
        1,
    ),
    "low rank stays two": (
        lambda: nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16)),
        torch.randn(3, 16),
        2,
        2,
    ),
    "then 1×1": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        ),
        _image(),
        3,
        1,
    ),
    "1×1 with a stride stays": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 5, 1, stride=2)),
        _image(),
        2,
        2,
    ),
    "padded 1×1 stays": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 5, 1, padding=1)),
        _image(),
        2,
        2,
    ),
}


def _layers(model: nn.Module) -> int:
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_folding_keeps_the_answers(name: str) -> None:
    build, x, before, after = CASES[name]
    torch.manual_seed(0)
    model = _randomise(build())
    folded = fold(model, example_inputs=x)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) < 1e-5
    assert _layers(model) == before  # a copy was changed
    assert _layers(folded) == after


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled", "depthwise"])
def test_a_norm_goes_into_the_second_factor(scheme: str) -> None:
    torch.manual_seed(0)
    model = _randomise(
        nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    )
    x = torch.randn(2, 8, 6, 6)
    compact = factorize(model, make_plan(model, FixedRank(2), scheme=scheme, guard=False))
    folded = fold(compact, example_inputs=x)
    with torch.no_grad():
        assert relative_error(folded(x), compact(x)) < 1e-5
    assert type(folded[0]) is nn.Sequential  # no longer what a plan describes
    assert folded[0][1].bias is not None
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("dead", [1, 3, 4])
def test_ranks_that_are_zero_are_cut_out(dead: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3))
    compact: Any = factorize(model, make_plan(model, FixedRank(4), scheme="channel"))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        compact[0][0].weight[:dead] = 0
        expected = compact(x)
        folded: Any = fold(compact, example_inputs=x)
        assert relative_error(folded(x), expected) < 1e-5
    assert folded[0][0].out_channels == max(4 - dead, 1)


def test_folding_in_place_and_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).train()
    assert fold(model, example_inputs=_image(), inplace=True) is model
    assert not model.training
    assert isinstance(model[1], nn.Identity)


def test_a_whole_network_is_folded() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = _randomise(torchvision.models.resnet18(num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    compact = factorize(model, make_plan(model, Energy(0.7), example_inputs=x))
    folded = fold(compact, example_inputs=x)
    with torch.no_grad():
        assert relative_error(folded(x), compact(x)) < 1e-4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_a_model_that_cannot_be_followed_says_so() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="cannot follow Odd"):
        fold(Odd(), example_inputs=torch.ones(2))
