"""The contract of every scheme, on every kind of layer, against torch and against NumPy loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cases import (
    CONTRACT,
    CONTRACT_IDS,
    LAYERS,
    TOLERANCE,
    Case,
    Conv1D,
    every_layer,
    relative_error,
    schemes_of,
)
from rankprune import (
    SCHEMES,
    Budget,
    Energy,
    FixedRank,
    LayerConfig,
    LayerSpec,
    MatrixShape,
    RankRule,
    Ratio,
    Scheme,
    Threshold,
    count_params,
    factorize,
    make_plan,
    profile,
)
from rankprune.errors import ConfigError
from rankprune.schemes import CHOICES, applicable, check_scheme, get_scheme

# torch says that an even kernel with padding="same" copies its input; the layer is meant so
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

contract = pytest.mark.parametrize(("case", "scheme_name"), CONTRACT, ids=CONTRACT_IDS)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def _full_rank(case: Case, scheme_name: str, guard: bool = False) -> tuple[nn.Module, nn.Module]:
    """The layer as a network, and the same factorised at full rank through the public API."""
    model = nn.Sequential(case.layer())
    plan = make_plan(model, Ratio(1.0), scheme=scheme_name, guard=guard)
    assert [layer.scheme for layer in plan.layers] == [scheme_name]
    return model, factorize(model, plan)


def test_the_table_holds_what_it_promises() -> None:
    """Every kernel, stride, dilation, padding, mode, grouping, bias and dtype occurs."""
    specs = [case.spec for case in LAYERS]
    assert {s.kind for s in specs} == {"linear", "hf_conv1d", "conv", "conv_transpose"}
    assert {name for _, name in CONTRACT} == set(SCHEMES)
    for dims in (1, 2, 3):
        own = [s for s in specs if s.dims == dims and s.kind == "conv"]
        assert {s.padding_mode for s in own} == {"zeros", "reflect", "replicate", "circular"}
        assert {"same", "valid"} < {s.padding for s in own}
        assert {s.groups for s in own} == {1, 2, 3, 4}
        assert {s.bias for s in own} == {True, False}
        assert any(max(s.stride) > 1 for s in own)
        assert any(max(s.dilation) > 1 for s in own)
        transposed = [s for s in specs if s.dims == dims and s.kind == "conv_transpose"]
        assert any(max(s.output_padding) > 0 for s in transposed)
        assert {s.groups for s in transposed} == {1, 2, 3, 4}


@contract
def test_full_rank_reproduces_the_layer(case: Case, scheme_name: str) -> None:
    model, compact = _full_rank(case, scheme_name)
    x = case.input()
    with torch.no_grad():
        assert relative_error(compact(x), model(x)) <= TOLERANCE[case.dtype]


@contract
def test_matrix_and_weight_are_exact_inverses(case: Case, scheme_name: str) -> None:
    scheme, spec, weight = SCHEMES[scheme_name], case.spec, _weight(case.layer())
    matrix = scheme.to_matrix(spec, weight)
    shape = scheme.matrix_shape(spec)
    assert tuple(matrix.shape) == (shape.batch, shape.rows, shape.cols)
    assert torch.equal(scheme.from_matrix(spec, matrix), weight)
    other = torch.randn_like(matrix)
    assert torch.equal(scheme.to_matrix(spec, scheme.from_matrix(spec, other)), other)


@contract
def test_factors_and_matrices_are_exact_inverses(case: Case, scheme_name: str) -> None:
    scheme, spec = SCHEMES[scheme_name], case.spec
    shape = scheme.matrix_shape(spec)
    for rank in {1, 2, shape.max_rank}:
        left = torch.randn(shape.batch, shape.rows, rank, dtype=case.dtype)
        right = torch.randn(shape.batch, rank, shape.cols, dtype=case.dtype)
        weights = scheme.factor_weights(spec, left, right)
        described = [s.weight_shape for s in scheme.factor_specs(spec, rank)]
        assert [tuple(weight.shape) for weight in weights] == described
        back_left, back_right = scheme.factor_matrices(spec, *weights)
        assert torch.equal(back_left, left)
        assert torch.equal(back_right, right)


@contract
def test_costs_agree_with_the_built_layers(case: Case, scheme_name: str) -> None:
    scheme, spec = SCHEMES[scheme_name], case.spec
    bias = spec.out_channels if spec.bias else 0
    for rank in (1, scheme.matrix_shape(spec).max_rank):
        factors = scheme.factor_specs(spec, rank)
        built = sum(count_params(factor.build()) for factor in factors)
        assert built == sum(factor.params for factor in factors)
        assert built == rank * scheme.unit_params(spec) + bias
        for factor in factors:
            assert LayerSpec.of(factor.build()) == factor


@contract
def test_planned_flops_are_those_that_torch_counts(case: Case, scheme_name: str) -> None:
    model, x = nn.Sequential(case.layer()), case.input()
    plan = make_plan(model, FixedRank(2), scheme=scheme_name, guard=False, example_inputs=x)
    recount = profile(factorize(model, plan), x)
    assert (plan.params, plan.flops) == (recount.params, recount.flops)


@contract
def test_planted_rank_is_recovered(case: Case, scheme_name: str) -> None:
    scheme, spec = SCHEMES[scheme_name], case.spec
    shape = scheme.matrix_shape(spec)
    rank = max(1, shape.max_rank // 2)
    left = torch.linalg.qr(torch.randn(shape.batch, shape.rows, rank, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape.batch, shape.cols, rank, dtype=torch.float64)).Q
    values = torch.linspace(2, 1, rank, dtype=torch.float64)
    layer = case.layer()
    with torch.no_grad():
        layer.weight.copy_(scheme.from_matrix(spec, (left * values) @ right.mT))
    model = nn.Sequential(layer)
    rules: list[RankRule] = [Threshold(1e-4, relative=True), Threshold(1e-4), Energy(1 - 1e-8)]
    for rule in rules:
        plan = make_plan(model, rule, scheme=scheme_name, guard=False)
        assert plan["0"].rank == rank, rule
    x = case.input()
    with torch.no_grad():
        assert relative_error(factorize(model, plan)(x), model(x)) <= TOLERANCE[case.dtype]


@contract
def test_truncated_layer_computes_what_the_projected_weight_does(
    case: Case, scheme_name: str
) -> None:
    """The method's promise, at a rank that is not full, against NumPy's SVD."""
    scheme, spec = SCHEMES[scheme_name], case.spec
    rank = max(1, scheme.matrix_shape(spec).max_rank - 1)
    model, x = nn.Sequential(case.layer()), case.input()
    override = {"0": LayerConfig(rank=rank, scheme=scheme_name)}
    plan = make_plan(model, Energy(1.0), overrides=override, guard=False)
    compact = factorize(model, plan)
    matrix = scheme.to_matrix(spec, _weight(model[0])).double().numpy()
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    nearest = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    with torch.no_grad():
        projected = scheme.from_matrix(spec, torch.from_numpy(nearest)).to(case.dtype)
        model[0].weight.copy_(projected)
        assert relative_error(compact(x), model(x)) <= TOLERANCE[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_full_rank_reproduces_every_layer_there_is(part: int) -> None:
    """The whole product of options, not a sample of it."""
    failures = []
    for case in itertools.islice(every_layer(), part, None, 16):
        x = case.input()
        for scheme_name in schemes_of(case):
            model, compact = _full_rank(case, scheme_name)
            with torch.no_grad():
                error = relative_error(compact(x), model(x))
            if not error <= TOLERANCE[case.dtype]:
                failures.append(f"{scheme_name}: {case.id}: {error}")
    assert not failures, failures[:10]


# -- the matrices, by loops ------------------------------------------------------------------------

Array = NDArray[np.float64]


def _channel_oracle(spec: LayerSpec, w: Array) -> Array:
    g = spec.groups
    outer, inner = w.shape[0] // g, w.shape[1]
    positions = list(np.ndindex(*spec.kernel_size))
    out = np.empty((g, outer, inner * len(positions)))
    for group, o, i in np.ndindex(g, outer, inner):
        for p, position in enumerate(positions):
            out[group, o, i * len(positions) + p] = w[(group * outer + o, i, *position)]
    return out


def _spatial_oracle(spec: LayerSpec, w: Array) -> Array:
    g, (kh, kw) = spec.groups, spec.kernel_size
    c_group, n_group = spec.in_channels // g, spec.out_channels // g
    out = np.empty((g, c_group * kh, n_group * kw))
    for group, c, n, i, j in np.ndindex(g, c_group, n_group, kh, kw):
        if spec.kind == "conv":
            value = w[group * n_group + n, c, i, j]
        else:
            value = w[group * c_group + c, n, i, j]
        out[group, c * kh + i, n * kw + j] = value
    return out


def _decoupled_oracle(spec: LayerSpec, w: Array) -> Array:
    positions = list(np.ndindex(*spec.kernel_size))
    out = np.empty((w.shape[0], w.shape[1], len(positions)))
    for filter_, channel in np.ndindex(*w.shape[:2]):
        for p, position in enumerate(positions):
            out[filter_, channel, p] = w[(filter_, channel, *position)]
    return out


def _depthwise_oracle(spec: LayerSpec, w: Array) -> Array:
    g = spec.groups
    outer, inner = w.shape[0] // g, w.shape[1]
    positions = list(np.ndindex(*spec.kernel_size))
    out = np.empty((g * inner, outer, len(positions)))
    for group, o, i in np.ndindex(g, outer, inner):
        for p, position in enumerate(positions):
            out[group * inner + i, o, p] = w[(group * outer + o, i, *position)]
    return out


def _linear_oracle(spec: LayerSpec, w: Array) -> Array:
    out = np.empty((1, spec.out_channels, spec.in_channels))
    for o, i in np.ndindex(spec.out_channels, spec.in_channels):
        out[0, o, i] = w[o, i] if spec.kind == "linear" else w[i, o]
    return out


ORACLES = {
    "channel": _channel_oracle,
    "spatial": _spatial_oracle,
    "decoupled": _decoupled_oracle,
    "depthwise": _depthwise_oracle,
    "linear": _linear_oracle,
}
SMALL_LAYERS: list[nn.Module] = [
    nn.Linear(3, 5),
    Conv1D(5, 3),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(3, 4, (2, 3)),
    nn.Conv2d(4, 6, (3, 2), groups=2),
    nn.Conv3d(2, 3, (2, 1, 3)),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(3, 4, (2, 3)),
    nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
]


@pytest.mark.parametrize("layer", SMALL_LAYERS, ids=str)
def test_matrix_is_that_of_the_definition(layer: nn.Module) -> None:
    spec = LayerSpec.of(layer)
    assert spec is not None
    compared = 0
    for name, scheme in SCHEMES.items():
        if scheme.refuses(spec) is None:
            weight = _weight(layer)
            expected = ORACLES[name](spec, weight.double().numpy())
            assert np.array_equal(scheme.to_matrix(spec, weight).double().numpy(), expected)
            compared += 1
    assert compared == {0: 1, 1: 3, 2: 4, 3: 3}[spec.dims]


# -- what fits, and what is refused ----------------------------------------------------------------

REFUSALS = [
    (nn.Conv2d(4, 4, 3, groups=4), "spatial"),  # depthwise
    (nn.Conv2d(1, 8, 3), "channel spatial depthwise"),
    (nn.Conv2d(8, 1, 3), "spatial decoupled"),
    (nn.Conv2d(8, 8, 1), "channel spatial"),
    (nn.Conv1d(8, 8, 3), "channel decoupled depthwise"),
    (nn.Conv3d(8, 8, 3), "channel decoupled depthwise"),
    (nn.Conv2d(1, 1, 1), ""),
    (nn.Linear(8, 8), "linear"),
    (nn.Linear(1, 8), ""),
    (nn.Linear(8, 1), ""),
]


@pytest.mark.parametrize(("layer", "fitting"), REFUSALS, ids=str)
def test_schemes_fit_where_they_can_save(layer: nn.Module, fitting: str) -> None:
    spec = LayerSpec.of(layer)
    assert spec is not None
    schemes, reason = applicable(spec, "auto")
    assert {scheme.name for scheme in schemes} == set(fitting.split())
    assert bool(reason) is (not fitting)
    if not fitting:
        assert "rank 1" in reason


def test_refused_scheme_says_why() -> None:
    spec = LayerSpec.of(nn.Conv1d(8, 8, 3))
    assert spec is not None
    assert applicable(spec, "spatial") == ([], "spatial is for 2-d convolutions")


def test_a_convolution_scheme_leaves_linear_layers_to_linear() -> None:
    spec = LayerSpec.of(nn.Linear(8, 8))
    assert spec is not None
    assert applicable(spec, "spatial") == ([SCHEMES["linear"]], "")


def test_unknown_scheme_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'channel'"):
        get_scheme("chanel")
    with pytest.raises(ConfigError, match="unknown scheme 'chanel'"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), Ratio(0.5), scheme="chanel")
    with pytest.raises(ConfigError, match="unknown scheme"):
        make_plan(nn.Sequential(nn.Linear(8, 8)), Budget(params=0.5), scheme="svd")


def test_schemes_are_listed_under_their_names() -> None:
    assert {name: scheme.name for name, scheme in SCHEMES.items()} == {n: n for n in SCHEMES}
    assert all(isinstance(scheme, Scheme) for scheme in SCHEMES.values())


def test_max_rank_is_the_smaller_side() -> None:
    assert MatrixShape(3, 4, 5).max_rank == MatrixShape(1, 5, 4).max_rank == 4


CHOSEN = [
    (nn.Conv2d(8, 8, 3), "decoupled depthwise"),
    (nn.ConvTranspose2d(8, 8, 3), "decoupled depthwise"),
    (nn.Conv2d(8, 8, 3, groups=2), "decoupled depthwise"),
    (nn.Conv2d(8, 1, 3), "decoupled"),
    (nn.Conv2d(8, 8, 1), "channel spatial"),
    (nn.Conv2d(8, 8, 3, groups=8), "spatial"),
    (nn.Linear(8, 8), "linear"),
]


@pytest.mark.parametrize(("layer", "fitting"), CHOSEN, ids=str)
def test_separable_leaves_no_layer_without_a_scheme(layer: nn.Module, fitting: str) -> None:
    spec = LayerSpec.of(layer)
    assert spec is not None
    schemes, reason = applicable(spec, "separable")
    assert " ".join(scheme.name for scheme in schemes) == fitting
    assert not reason


def test_choices_have_names_of_their_own() -> None:
    assert not set(CHOICES) & set(SCHEMES)
    assert {name for names in CHOICES.values() for name in names} == set(SCHEMES)
    for name in (*SCHEMES, *CHOICES):
        check_scheme(name)
    with pytest.raises(ConfigError, match="did you mean 'separable'"):
        check_scheme("seperable")
    with pytest.raises(ConfigError, match="unknown scheme '3'"):
        check_scheme(3)  # type: ignore[arg-type]
