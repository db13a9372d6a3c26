"""Costs, against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import SharedModule, TiedLinears, cnn_input, small_cnn
from rankprune import ConfigError, count_bytes, count_params, profile
from rankprune.layers import LayerSpec
from rankprune.profile import factor_flops


def test_flops_are_two_a_multiply_add() -> None:
    model = small_cnn()
    convs = {
        "0": 16 * 3 * 9 * 144,
        "3": 24 * 16 * 9 * 36,
        "6": 24 * 12 * 9 * 36,
        "10": 24 * 20,
        "12": 20 * 10,
    }
    cost = profile(model, cnn_input(2))
    assert {name: cost.layers[name].flops for name in convs} == {
        name: 2 * 2 * macs for name, macs in convs.items()
    }
    assert cost.flops == 2 * 2 * sum(convs.values())
    assert cost.layers["1"].flops == 0
    assert cost.layers["3"].input_shapes == ((2, 16, 12, 12),)


def test_params_and_bytes_count_shared_tensors_once() -> None:
    model = TiedLinears()
    assert count_params(model) == 400 + 2 * 20
    assert count_bytes(model) == 4 * (400 + 2 * 20)
    assert count_bytes(model.half()) == 2 * (400 + 2 * 20)
    norm = nn.BatchNorm2d(5)
    assert count_bytes(norm) == 4 * 5 * 4 + 8  # two parameters, two statistics, one int64


def test_a_layer_called_twice_costs_twice() -> None:
    cost = profile(SharedModule(), torch.zeros(1, 20))
    assert cost.layers["a"].flops == 3 * 2 * 400
    assert cost.layers["a"].input_shapes == ((1, 20),) * 3
    assert cost.flops == 4 * 2 * 400


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.layer(input=x) + y


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Linear(4, 3), torch.zeros(2, 4)),
        (nn.Linear(4, 3), (torch.zeros(2, 4),)),
        (nn.Linear(4, 3), {"input": torch.zeros(2, 4)}),
        (_Two(), {"x": torch.zeros(2, 4), "y": torch.zeros(2, 3)}),
        (nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))),
    ],
    ids=["tensor", "tuple", "mapping", "keywords", "two"],
)
def test_inputs_are_tensors_tuples_or_mappings(model: nn.Module, inputs: Any) -> None:
    cost = profile(model, inputs)
    assert cost.flops > 0 or isinstance(model, nn.Bilinear)
    assert "unused" not in cost.layers


@pytest.mark.parametrize("inputs", [[1], "x", None, 3])
def test_other_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ConfigError, match=f"got {type(inputs).__name__}"):
        profile(nn.Linear(4, 3), inputs)


def test_a_model_that_does_not_run_says_why_and_is_left_as_it_was() -> None:
    model = small_cnn()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ConfigError, match="does not run on example_inputs: RuntimeError"):
        profile(model, torch.zeros(1, 4, 12, 12))
    assert [module.training for module in model.modules()] == modes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_profiling_leaves_no_trace() -> None:
    model = small_cnn()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    profile(model, cnn_input())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _Positions(nn.Module):
    """Calls a layer with a part of a parameter, as networks with positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 8))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.table[: len(x)])


def test_a_layer_may_be_called_with_a_part_of_a_parameter() -> None:
    model = _Positions()
    model.layer.bias.requires_grad_(False)
    assert profile(model, torch.zeros(4, 8)).layers["layer"].flops == 2 * 4 * 8 * 8
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False]


def test_attention_is_counted_in_full() -> None:
    """The fused inference path hides FLOPs; its switch is put back."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    cost = profile(layer, torch.zeros(1, 5, 16))
    linear = 2 * 5 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 32)
    assert cost.flops >= linear
    assert cost.layers["linear1"].flops == 2 * 5 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled() is enabled


def test_factor_flops_run_on_shapes_alone() -> None:
    first, second = (LayerSpec.of(nn.Linear(10**5, 3)), LayerSpec.of(nn.Linear(3, 10**5)))
    assert first is not None
    assert second is not None
    assert factor_flops((first, second), ((2, 10**5), (5, 10**5))) == 7 * 2 * 2 * 3 * 10**5
    assert factor_flops((first, second), ()) == 0


def test_what_a_network_keeps_for_evaluation_is_dropped_as_it_wants() -> None:
    """As timm's LeViT keeps its attention biases."""

    class Cached(nn.Linear):
        cache: torch.Tensor | None = None

        def train(self, mode: bool = True) -> Cached:
            if mode:
                self.cache = None
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                self.cache = self.weight.detach()
            return super().forward(x)

    model = nn.Sequential(Cached(4, 4), nn.Dropout())
    model[1].eval()
    profile(model, torch.zeros(1, 4))
    assert model[0].cache is None
    assert [module.training for module in model] == [True, False]
