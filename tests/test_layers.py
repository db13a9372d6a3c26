"""LayerSpec: a layer in plain numbers, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cases import LAYERS, Case, Conv1D
from rankprune import LayerSpec
from rankprune.errors import LayerError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

cases = pytest.mark.parametrize("case", LAYERS, ids=[case.id for case in LAYERS])


@cases
def test_built_layer_has_the_same_description(case: Case) -> None:
    spec = case.spec
    built = LayerSpec.of(spec.build())
    assert built == replace(spec, kind="linear" if spec.kind == "hf_conv1d" else spec.kind)


@cases
def test_counts_are_those_of_the_layer(case: Case) -> None:
    layer = case.layer()
    assert case.spec.weight_shape == tuple(layer.weight.shape)
    assert case.spec.weight_numel == layer.weight.numel()
    assert case.spec.params == sum(parameter.numel() for parameter in layer.parameters())
    assert case.spec.bias is (layer.bias is not None)
    case.spec.validate("it")


@cases
def test_built_layer_computes_the_same(case: Case) -> None:
    layer, built = case.layer(), case.spec.build(dtype=case.dtype)
    state = layer.state_dict()
    if case.spec.kind == "hf_conv1d":
        state["weight"] = state["weight"].T
    built.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(built(case.input()), layer(case.input()), rtol=1e-5, atol=1e-5)


def test_build_draws_no_random_numbers() -> None:
    for case in LAYERS[:20]:
        spec = case.spec
        state = torch.get_rng_state()
        spec.build()
        assert torch.equal(torch.get_rng_state(), state)


def test_build_on_a_device_and_in_a_dtype() -> None:
    spec = LayerSpec.of(nn.Conv2d(3, 4, 3))
    assert spec is not None
    built = spec.build(device="meta", dtype=torch.bfloat16)
    assert built.weight.is_meta
    assert built.weight.dtype is torch.bfloat16


class _OtherForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class _OtherConvolution(nn.Conv2d):
    """As convolutions with a padding of their own do it."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(nn.functional.pad(x, (1, 0)), weight, bias)


def _replaced_forward() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = torch.relu
    return layer


UNSUPPORTED = [
    _OtherForward(4, 4),
    _OtherConvolution(4, 4, 3),
    _replaced_forward(),
    nn.Embedding(4, 4),
    nn.LSTM(4, 4),
    nn.Bilinear(2, 3, 4),
    nn.BatchNorm2d(4),
    nn.ReLU(),
    nn.Identity(),
    nn.MultiheadAttention(4, 2).out_proj,
    nn.LazyLinear(4),
]


@pytest.mark.parametrize("module", UNSUPPORTED, ids=lambda module: type(module).__name__)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_may_compute_anything_else_is_not_described(module: nn.Module) -> None:
    assert LayerSpec.of(module) is None


class _OtherInit(nn.Conv3d):
    """As torchvision's video networks have them: only the constructor is another."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (1, 3, 3), padding=(0, 1, 1))


def test_a_subclass_that_inherits_the_forward_is_described() -> None:
    layer = _OtherInit(4)
    spec = LayerSpec.of(layer)
    assert spec == LayerSpec.of(nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)))


def test_timms_linear_is_a_linear_layer() -> None:
    from timm.layers import Linear

    assert LayerSpec.of(Linear(4, 3)) == LayerSpec.of(nn.Linear(4, 3))


def test_a_conv1d_of_another_library_is_not_hugging_faces() -> None:
    other = type("Conv1D", (Conv1D,), {"__module__": "somewhere"})
    assert LayerSpec.of(other(4, 4)) is None
    assert LayerSpec.of(Conv1D(5, 3)) == LayerSpec(
        kind="hf_conv1d", in_channels=3, out_channels=5, bias=True
    )


IMPOSSIBLE = [
    ({"kind": "dense"}, "kind 'dense'"),
    ({"in_channels": 0}, "at least 1"),
    ({"groups": 0}, "at least 1"),
    ({"groups": 3}, "does not divide"),
    ({"kernel_size": ()}, "0 dimensions"),
    ({"kernel_size": (1, 1, 1, 1)}, "4 dimensions"),
    ({"kernel_size": (0, 3)}, "kernel_size"),
    ({"stride": (1,)}, "stride"),
    ({"stride": (0, 1)}, "stride"),
    ({"dilation": (1, 0)}, "dilation"),
    ({"padding": (1,)}, "padding"),
    ({"padding": (-1, 0)}, "padding"),
    ({"padding": "full"}, "padding 'full'"),
    ({"padding_mode": "mirror"}, "padding_mode 'mirror'"),
    ({"output_padding": (-1, 0)}, "output_padding"),
    ({"output_padding": ()}, "output_padding"),
]


@pytest.mark.parametrize(("change", "complaint"), IMPOSSIBLE, ids=lambda value: str(value))
def test_impossible_numbers_are_named(change: dict[str, object], complaint: str) -> None:
    spec = LayerSpec.of(nn.Conv2d(4, 8, 3, padding=1))
    assert spec is not None
    with pytest.raises(LayerError, match=complaint) as caught:
        replace(spec, **change).validate("stem")  # type: ignore[arg-type]
    assert "'stem'" in str(caught.value)


def test_a_linear_layer_has_no_kernel() -> None:
    spec = LayerSpec(kind="linear", in_channels=2, out_channels=2, bias=True, kernel_size=(3,))
    with pytest.raises(LayerError, match="kernel of 1 dimensions"):
        spec.validate("fc")
