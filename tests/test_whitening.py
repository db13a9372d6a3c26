"""Second moments against plain sums, and factors against the error of outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankprune.errors import LayerError, NumericsError
from rankprune.layers import LayerSpec
from rankprune.linalg import Decomposition
from rankprune.moments import RIDGE, Moment, input_patches
from rankprune.schemes import SCHEMES, Inputs, applicable
from rankprune.whitening import Whitened

torch.manual_seed(0)

LAYERS = {
    "linear": (nn.Linear(12, 9), (40, 12)),
    "wide linear": (nn.Linear(20, 6), (5, 8, 20)),
    "tall linear": (nn.Linear(6, 20, bias=False), (50, 6)),
    "conv": (nn.Conv2d(4, 10, 3, padding=1), (3, 4, 9, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 4, 9, 11)),
    "dilated": (nn.Conv2d(3, 8, 3, dilation=2), (2, 3, 12, 12)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=2), (2, 8, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 8, 8)),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "circular": (nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 8, 8)),
    "same": (nn.Conv2d(4, 5, (5, 3), padding="same", dilation=2), (2, 4, 9, 8)),
    "valid": (nn.Conv2d(4, 5, 3, padding="valid"), (2, 4, 8, 8)),
    "1-d": (nn.Conv1d(5, 7, 4, stride=2, padding=1), (3, 5, 20)),
    "3-d": (nn.Conv3d(2, 6, (2, 3, 2), padding=1), (2, 2, 5, 6, 7)),
    # spatial's columns are as many as a patch is long, and are none
    "alike sizes": (nn.Conv2d(4, 12, 3, padding=1), (3, 4, 9, 8)),
    "pointwise": (nn.Conv2d(8, 12, 1), (2, 8, 6, 6)),
}
CASES = [
    (name, scheme.name)
    for name, (layer, _) in LAYERS.items()
    for scheme in applicable(LayerSpec.of(layer), "auto")[0]
]


def correlated(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Inputs whose channels are of very different size and correlate."""
    generator = torch.Generator().manual_seed(seed)
    axis = 1 if len(shape) > 3 or shape == LAYERS["1-d"][1] else len(shape) - 1
    sides = shape[axis]
    mix = torch.randn(sides, sides, generator=torch.Generator().manual_seed(1))
    mix = mix * torch.logspace(0, -2, sides)
    x = torch.randn(*shape, generator=generator).movedim(axis, -1)
    x = (x @ mix.T + 0.3).movedim(-1, axis)
    return x.cumsum(-1) if len(shape) > 3 else x  # neighbouring pixels are alike


def prepared(name: str) -> tuple[nn.Module, LayerSpec, torch.Tensor, Moment]:
    layer, shape = LAYERS[name]
    layer = layer.double()
    spec = LayerSpec.of(layer)
    assert spec is not None
    x = correlated(shape).double()
    patches = input_patches(spec, x)
    moment = Moment(spec.groups, patches.shape[-1])
    for part in patches.split(7, 1):
        moment.update(part)
    return layer, spec, x, moment


def output_energy(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Mean over positions and samples of ‖W x‖², by running the layer without its bias."""
    twin = LayerSpec.of(layer).build(dtype=torch.float64)
    twin.weight = nn.Parameter(weight)
    if twin.bias is not None:
        nn.init.zeros_(twin.bias)
    with torch.no_grad():
        y = twin(x)
    positions = y.numel() / LayerSpec.of(layer).out_channels
    return float(y.square().sum() / positions)


@pytest.mark.parametrize("name", LAYERS)
def test_patches_give_the_layers_outputs(name: str) -> None:
    layer, spec, x, moment = prepared(name)
    patches = input_patches(spec, x)
    weight = layer.weight.detach().reshape(spec.groups, -1, patches.shape[-1])
    assert moment.count == patches.shape[1]
    by_hand = (patches @ weight.mT).square().sum() / patches.shape[1]
    assert float(by_hand) == pytest.approx(output_energy(layer, layer.weight.detach(), x))
    expected = patches.mT @ patches / patches.shape[1]
    torch.testing.assert_close(moment.second_moment(), expected)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_predicted_error_is_the_outputs(name: str, scheme: str) -> None:
    layer, spec, x, moment = prepared(name)
    chosen = SCHEMES[scheme]
    weight = layer.weight.detach()
    whitened = Whitened(spec, chosen, weight, moment, name, shrinkage=RIDGE)
    errors = whitened.errors()
    largest = chosen.matrix_shape(spec).max_rank
    assert errors.shape == (largest + 1,)
    total = output_energy(layer, weight, x)
    for rank in range(1, largest + 1):
        left, right = whitened.factors(rank)
        assert left.shape[-1] == right.shape[-2] == rank
        rest = weight - chosen.from_matrix(spec, left @ right)
        measured = output_energy(layer, rest, x) / total
        # beyond the ridge, which is added to every direction
        assert float(errors[rank]) == pytest.approx(measured, rel=1e-3, abs=5e-5)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_better_than_plain_svd_and_exact_at_full_rank(name: str, scheme: str) -> None:
    layer, spec, x, moment = prepared(name)
    chosen = SCHEMES[scheme]
    weight = layer.weight.detach()
    whitened = Whitened(spec, chosen, weight, moment, name, shrinkage=RIDGE)
    largest = chosen.matrix_shape(spec).max_rank
    matrix = chosen.to_matrix(spec, weight)
    gains = []
    for rank in range(1, largest):
        left, right = whitened.factors(rank)
        ours = output_energy(layer, weight - chosen.from_matrix(spec, left @ right), x)
        plain = Decomposition(matrix).project(rank)
        theirs = output_energy(layer, weight - chosen.from_matrix(spec, plain), x)
        gains.append(theirs / ours)
        if whitened.inputs is Inputs.COLUMNS:
            assert ours <= theirs * 1.0001
    assert not gains or sum(gains) / len(gains) > (1.0 if name == "depthwise" else 1.05)
    left, right = whitened.factors(largest)
    torch.testing.assert_close(left @ right, matrix, rtol=0, atol=1e-5)


def test_optimal_among_all_of_that_rank() -> None:
    """Gradient descent on the output's error finds nothing better."""
    layer, spec, x, moment = prepared("linear")
    weight, rank = layer.weight.detach(), 3
    whitened = Whitened(spec, SCHEMES["linear"], weight, moment, "layer", shrinkage=RIDGE)
    left, right = (f.squeeze(0).contiguous().requires_grad_() for f in whitened.factors(rank))
    optimizer = torch.optim.LBFGS([left, right], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = ((weight - left @ right) @ x.T).square().sum()
        value.backward()
        return value

    start = loss().item()
    optimizer.step(loss)
    assert loss().item() > 0.9999 * start


@pytest.mark.parametrize("samples", [1, 4, 11, 12, 13, 60])
def test_few_and_repeated_samples(samples: int) -> None:
    """Moments that are singular, however they are kept, spoil nothing."""
    torch.manual_seed(3)
    weight = torch.randn(9, 12, dtype=torch.float64)
    spec = LayerSpec.of(nn.Linear(12, 9))
    assert spec is not None
    x = torch.randn(samples, 12, dtype=torch.float64)
    x[:, 3:] = x[:, :1]  # rank 3 at most
    moment = Moment(1, 12)
    for row in x:
        moment.update(row.reshape(1, 1, 12))
    whitened = Whitened(spec, SCHEMES["linear"], weight, moment, "layer", shrinkage=RIDGE)
    left, right = whitened.factors(3)
    rest = (weight - (left @ right).squeeze(0)) @ x.T
    assert rest.norm() < 1e-3 * (weight @ x.T).norm()
    left, right = whitened.factors(9)
    torch.testing.assert_close((left @ right).squeeze(0), weight, rtol=0, atol=1e-5)


def test_no_input_at_all() -> None:
    """A layer that is called with zeros keeps its energy, and the plain SVD's directions."""
    weight = torch.randn(6, 8)
    spec = LayerSpec.of(nn.Linear(8, 6))
    assert spec is not None
    moment = Moment(1, 8)
    moment.update(torch.zeros(1, 20, 8))
    whitened = Whitened(spec, SCHEMES["linear"], weight, moment, "layer", shrinkage=RIDGE)
    assert whitened.errors().tolist() == [0.0] * 7
    left, right = whitened.factors(6)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()


def test_refusals() -> None:
    spec = LayerSpec.of(nn.Linear(8, 6))
    assert spec is not None
    moment = Moment(1, 9)
    with pytest.raises(LayerError, match="layer 'fc': calibrated with 1 × 9 inputs"):
        Whitened(spec, SCHEMES["linear"], torch.zeros(6, 8), moment, "fc")
    with pytest.raises(NumericsError, match="layer 'fc'"):
        Whitened(spec, SCHEMES["linear"], torch.full((6, 8), torch.nan), Moment(1, 8), "fc")
