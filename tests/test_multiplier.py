"""Layers with several kernels a channel, against the same with one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import CONTRACT, CONTRACT_IDS, Case, relative_error
from rankprune import SCHEMES, FixedRank, LowRank, factorize, make_plan
from rankprune.layers import LayerSpec
from rankprune.multiplier import (
    Repeat,
    SumOfParts,
    has_multipliers,
    unrolled,
    without_multipliers,
)

SEPARABLE = [
    pytest.param(case, name, id=name_and_case)
    for (case, name), name_and_case in zip(CONTRACT, CONTRACT_IDS, strict=True)
    if name in ("decoupled", "depthwise") and case.dtype == torch.float32
]


def _factorised(case: Case, scheme: str, rank: int) -> nn.Module:
    model = nn.Sequential(case.layer())
    return factorize(model, make_plan(model, FixedRank(rank), scheme=scheme, guard=False))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("case", "scheme"), SEPARABLE)
def test_answers_stay(case: Case, scheme: str) -> None:
    x = case.input()
    for rank in range(1, min(3, SCHEMES[scheme].matrix_shape(case.spec).max_rank) + 1):
        model = _factorised(case, scheme, rank)
        pair = model[0]
        assert isinstance(pair, LowRank)
        alone = case.spec.kind == "conv" and case.spec.groups == 1 and rank > 1
        with torch.no_grad():
            expected = model(x)
            assert has_multipliers(model) == alone
            without_multipliers(model)
            assert not has_multipliers(model)
            assert len(pair) == (3 if alone else 2)
            assert relative_error(model(x), expected) <= 1e-5
            for layer in pair:
                spec = LayerSpec.of(layer)
                if alone and spec is not None and spec.groups > 1:
                    assert spec.groups == spec.in_channels == spec.out_channels


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_both_layers_may_have_biases(inner: bool, outer: bool) -> None:
    x = torch.randn(2, 4, 7, 7)
    first = nn.Conv2d(4, 12, 3, groups=4, bias=inner)
    second = nn.Conv2d(12, 5, 1, bias=outer)
    parts = unrolled([first, second])
    assert parts is not None
    assert isinstance(parts[0], Repeat)
    with torch.no_grad():
        assert relative_error(nn.Sequential(*parts)(x), second(first(x))) <= 1e-6
    first, second = (
        nn.Conv2d(4, 15, 1, bias=inner),
        nn.Conv2d(15, 5, 3, groups=5, bias=outer),
    )
    parts = unrolled([first, second])
    assert parts is not None
    assert isinstance(parts[2], SumOfParts)
    with torch.no_grad():
        assert relative_error(nn.Sequential(*parts)(x), second(first(x))) <= 1e-6


LEFT = {
    "one kernel a channel": [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1)],
    "groups": [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1)],
    "not pointwise": [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 3)],
    "strided": [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1, stride=2)],
    "padded": [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1, padding=1)],
    "grouped 1×1": [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1, groups=2)],
    "something between": [nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 1)],
    "not convolutions": [nn.Linear(4, 8), nn.Linear(8, 4)],
    "alone": [nn.Conv2d(4, 8, 3, groups=4)],
}


@pytest.mark.parametrize("name", LEFT)
def test_others_are_left_alone(name: str) -> None:
    assert unrolled(LEFT[name]) is None


class _ByHand(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self
        return second(first(x).relu())


def test_only_what_calls_its_layers_in_turn_is_changed() -> None:
    layers = [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1)]
    assert has_multipliers(nn.Sequential(nn.ReLU(), nn.Sequential(*layers)))
    assert not has_multipliers(_ByHand(*layers))
    assert not has_multipliers(nn.Sequential(*layers, nn.ReLU()))
