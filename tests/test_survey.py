"""Which layers are found, which can be factorised, and why the others cannot."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

from cases import (
    BiasTiedLinears,
    SharedModule,
    TiedConvs,
    TiedEmbedding,
    TiedLinears,
    UnequallyTiedConvs,
    small_cnn,
)
from rankprune import LayerSpec, Ratio, make_plan, profile
from rankprune.survey import Site, survey


def _sites(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in survey(model)}


def test_every_layer_with_a_matrix_is_listed_in_order() -> None:
    """Normalisation has vectors alone."""
    assert [site.name for site in survey(small_cnn())] == ["0", "3", "6", "10", "12"]
    assert not any(site.obstacle for site in survey(small_cnn()))


def test_a_scale_of_any_shape_is_no_matrix() -> None:
    model = nn.Sequential(nn.Linear(8, 1), _Scale())
    assert [site.name for site in survey(model)] == ["0"]


class _Scale(nn.Module):
    """As ConvNeXt's blocks have it, beside a token and a step of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.step = nn.Parameter(torch.ones(()))


def _parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class _Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _patched() -> nn.Linear:
    """As accelerate's hooks do it."""
    layer = nn.Linear(8, 8)
    layer.forward = functools.partial(torch.zeros_like)
    return layer


def _bias_pruned() -> nn.Module:
    layer = nn.Linear(8, 8)
    torch.nn.utils.prune.l1_unstructured(layer, "bias", 0.3)  # type: ignore[no-untyped-call]
    return nn.Sequential(layer)


def _summed() -> nn.Module:
    """As is done to pretrained networks for grey pictures."""
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(layer.weight.sum(1, keepdim=True))
    return nn.Sequential(layer)


def _transposed() -> nn.Module:
    """An autoencoder's second half."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.T)
    return model


OBSTACLES = [
    ("LSTM", lambda: nn.Sequential(nn.LSTM(8, 8)), "0", "LSTM is not supported"),
    ("Embedding", lambda: nn.Sequential(nn.Embedding(8, 8)), "0", "Embedding is not supported"),
    ("subclass", lambda: nn.Sequential(_Subclass(8, 8)), "0", "_Subclass is not supported"),
    ("patched", lambda: nn.Sequential(_patched()), "0", "the forward of this Linear is replaced"),
    ("parametrised", _parametrised, "0", "weight is parametrised"),
    ("weight_norm", _old_weight_norm, "0", "weight is not a parameter"),
    ("bias pruned", _bias_pruned, "0", "bias is not a parameter"),
    ("other attributes", _summed, "0", "weight has shape (4, 1, 3, 3), the layer's attributes"),
    ("tied in another layout", _transposed, "0", "weight is shared with 1"),
    ("pruned", _pruned, "0", "weight is not a parameter"),
    ("empty", lambda: nn.Sequential(_empty()), "0", "the weight is empty"),
    (
        "attention",
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        "0",
        "MultiheadAttention is not supported",
    ),
    (
        "attention's projection",
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        "0.out_proj",
        "NonDynamicallyQuantizableLinear is not supported",
    ),
    (
        "encoder layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        "linear1",
        "TransformerEncoderLayer reads this weight directly",
    ),
    ("one layer", lambda: nn.Linear(8, 8), "", "the model is this one layer"),
    ("integers", lambda: nn.Sequential(_integers()), "0", "weight has dtype int8"),
]


def _empty() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Linear(0, 8)


def _integers() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("build", "name", "obstacle"), [row[1:] for row in OBSTACLES], ids=[row[0] for row in OBSTACLES]
)
def test_obstacles_are_named(build: object, name: str, obstacle: str) -> None:
    assert callable(build)
    assert obstacle in _sites(build())[name].obstacle


def test_tied_layers_of_one_description_are_one_site() -> None:
    for model in (TiedLinears(), TiedConvs()):
        (site,) = survey(model)
        assert (site.name, site.tied, site.obstacle) == ("a", ("b",), "")
        assert site.dense_params == sum(parameter.numel() for parameter in model.parameters())
        assert site.bias_params() == 2 * site.module.bias.numel()


@pytest.mark.parametrize(
    "model", [UnequallyTiedConvs(), BiasTiedLinears()], ids=["dilation", "bias"]
)
def test_tied_layers_that_differ_stay_dense(model: nn.Module) -> None:
    """One pair of factors cannot stand for both."""
    sites = _sites(model)
    assert "weight is shared with b" in sites["a"].obstacle
    assert "weight is shared with a" in sites["b"].obstacle
    assert not sites["free"].obstacle


def test_a_head_tied_to_an_embedding_stays_dense() -> None:
    sites = _sites(TiedEmbedding())
    assert sites["head"].obstacle == "weight is shared with embed (Embedding)"
    assert not sites["body"].obstacle


def test_a_module_at_two_names_is_one_site() -> None:
    sites = survey(SharedModule())
    assert [(site.name, site.tied) for site in sites] == [("a", ()), ("c.0", ())]


def test_views_of_one_memory_are_tied() -> None:
    """Not only one Parameter object at two places."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert survey(model)[0].tied == ("1",)


def test_meta_weights_are_not_taken_for_one() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert [site.tied for site in survey(model)] == [(), ()]


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_is_not_called_stays_dense() -> None:
    model, x = _Unused(), torch.zeros(1, 16)
    sites = {site.name: site for site in survey(model, profile(model, x))}
    assert sites["unused"].obstacle.startswith("not called in the forward pass")
    assert make_plan(model, Ratio(0.25), example_inputs=x)["unused"].dense
    # without inputs nobody can know
    assert not make_plan(model, Ratio(0.25))["unused"].dense


def test_costs_of_all_calls_are_added() -> None:
    for model in (TiedLinears(), SharedModule()):
        cost = profile(model, torch.zeros(3, 20))
        sites = survey(model, cost)
        assert sum(site.dense_flops or 0 for site in sites) == cost.flops
        assert sum(len(site.input_shapes) for site in sites) == cost.flops // (3 * 800)


def test_a_stride_may_be_one_number() -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.stride, layer.padding = 2, 1  # type: ignore[assignment]
    spec = LayerSpec.of(layer)
    assert spec is not None
    assert (spec.stride, spec.padding) == ((2, 2), (1, 1))
    flat = nn.Linear(8, 8)
    flat.weight = nn.Parameter(flat.weight.flatten())
    assert LayerSpec.of(flat) is None


def test_a_forward_that_was_put_back_is_the_classes_own() -> None:
    """As accelerate leaves it when its hooks are removed."""
    layer = nn.Linear(8, 8)
    before = layer.forward
    layer.forward = functools.partial(torch.zeros_like)  # type: ignore[method-assign]
    assert LayerSpec.of(layer) is None
    layer.forward = before  # type: ignore[method-assign]
    assert LayerSpec.of(layer) is not None
