"""The planner: break-even guard, overrides, budgets, and costs that equal a recount."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cases import (
    BiasTiedLinears,
    SharedModule,
    TiedConvs,
    TiedEmbedding,
    TiedLinears,
    UnequallyTiedConvs,
    cnn_input,
    mobilenet_v2,
    resnet18,
    resnet20,
    small_cnn,
)
from rankprune import (
    SCHEMES,
    Budget,
    BudgetError,
    ConfigError,
    Energy,
    FixedRank,
    LayerConfig,
    LayerError,
    LayerSpec,
    MatrixShape,
    NumericsError,
    Plan,
    Ratio,
    Spectrum,
    Threshold,
    calibrate,
    count_bytes,
    count_params,
    factorize,
    make_plan,
    plan_of,
    profile,
)
from rankprune.overrides import ExactRank
from rankprune.planner import _grid, _LayerOption, wanted_rank
from rankprune.schemes import CHOICES, applicable
from rankprune.survey import survey

INF, NAN = math.inf, math.nan

# -- reported costs equal a recount (floor 8) ------------------------------------------------------


def _encoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 24),
        nn.TransformerEncoderLayer(24, 2, 32, batch_first=True),
        nn.Linear(24, 16),
    )


def _with_lstm() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 24)
            self.lstm = nn.LSTM(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(self.inner(x))[0]

    return Net()


RECOUNTED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "small_cnn": (small_cnn, cnn_input()),
    "tied_linears": (TiedLinears, torch.zeros(3, 20)),
    "tied_convs": (TiedConvs, torch.zeros(1, 12, 6, 6)),
    "unequally_tied": (UnequallyTiedConvs, torch.zeros(1, 12, 6, 6)),
    "bias_tied": (BiasTiedLinears, torch.zeros(3, 20)),
    "tied_embedding": (TiedEmbedding, torch.zeros(2, 4, dtype=torch.long)),
    "shared_module": (SharedModule, torch.zeros(3, 20)),
    "encoder": (_encoder, torch.zeros(2, 5, 16)),
    "lstm": (_with_lstm, torch.zeros(2, 5, 16)),
    "resnet20": (resnet20, torch.zeros(1, 3, 32, 32)),
    "mobilenet_v2": (mobilenet_v2, torch.zeros(1, 3, 64, 64)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "mobilenet_v2" else n for n in RECOUNTED],
)
def test_planned_costs_equal_a_recount(name: str) -> None:
    """Parameters, FLOPs and bytes, in total and by layer, guarded and not."""
    build, x = RECOUNTED[name]
    torch.manual_seed(0)
    model = build()
    for guard in (True, False):
        plan = make_plan(model, Ratio(0.4), guard=guard, example_inputs=x)
        assert plan.factorized
        assert (plan.dense_params, plan.dense_flops) == (
            count_params(model),
            profile(model, x).flops,
        )
        compact = factorize(model, plan)
        recount = profile(compact, x)
        distinct = {id(p): p.numel() for p in compact.parameters()}
        assert plan.params == recount.params == count_params(compact) == sum(distinct.values())
        assert plan.flops == recount.flops
        saved = sum(4 * (layer.dense_params - layer.params) for layer in plan.layers)
        assert recount.bytes == count_bytes(model) - saved
        for layer in plan.factorized:
            names = (layer.name, *layer.tied)
            assert layer.flops == sum(recount.layers[name].flops for name in names)
        assert plan_of(compact).params == plan.params


@pytest.mark.parametrize("name", ["tied_linears", "tied_convs", "shared_module", "encoder"])
def test_layers_costs_sum_to_the_models(name: str) -> None:
    build, x = RECOUNTED[name]
    model = build()
    plan = make_plan(model, Ratio(0.4), example_inputs=x)
    flops = sum(layer.dense_flops or 0 for layer in plan.layers)
    assert plan.dense_flops is not None
    assert flops == plan.dense_flops > 0


def test_planning_does_not_change_the_model() -> None:
    model = small_cnn()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    make_plan(model, Budget(flops=0.5), example_inputs=cnn_input())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


# -- the guard -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_features", [5, 16, 33])
@pytest.mark.parametrize("in_features", [4, 16, 40])
def test_guard_in_parameters_is_exact(in_features: int, out_features: int) -> None:
    """Factorised exactly where it is smaller, for every rank."""
    model = nn.Sequential(nn.Linear(in_features, out_features))
    for rank in range(1, min(in_features, out_features) + 1):
        plan = make_plan(model, FixedRank(rank))
        smaller = rank * (in_features + out_features) < in_features * out_features
        assert plan["0"].dense is not smaller
        if not smaller:
            assert "does not pay (break-even" in plan["0"].reason
            assert plan.params == plan.dense_params


def test_guard_in_flops_sees_that_a_strided_spatial_pair_costs_more() -> None:
    """The first half of a strided spatial pair runs at full width: cheaper in weights alone."""
    layer = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
    model, x = nn.Sequential(layer), torch.zeros(1, 16, 16, 16)
    # rank r: 2·16·3·r weights of 2304; 16·3·r·(8·16 + 8·8) multiply-adds of 2304·8·8
    for rank in range(1, 49):
        by_params = rank * 96 < 2304
        by_flops = rank * 48 * (8 * 16 + 8 * 8) < 2304 * 64
        blind = make_plan(model, FixedRank(rank), scheme="spatial")["0"]
        seeing = make_plan(model, FixedRank(rank), scheme="spatial", example_inputs=x)["0"]
        assert blind.dense is not by_params
        assert seeing.dense is not (by_params and by_flops)
        if not seeing.dense:
            compact = factorize(model, make_plan(model, FixedRank(rank), scheme="spatial"))
            assert profile(compact, x).flops < profile(model, x).flops
    assert 48 * 192 * 16 == 2304 * 64  # break-even at 16 in FLOPs, at 24 in weights


@pytest.mark.parametrize("scheme", ["auto", *SCHEMES])
def test_a_guarded_plan_never_costs_more(scheme: str) -> None:
    model, x = small_cnn(), cnn_input()
    for rule in (Energy(0.99), Energy(0.5), Ratio(1.0), Ratio(0.2), FixedRank(3)):
        plan = make_plan(model, rule, scheme=scheme, example_inputs=x)
        for layer in plan.layers:
            assert layer.params <= layer.dense_params
            assert (layer.flops or 0) <= (layer.dense_flops or 0)
            if not layer.dense:
                assert layer.params < layer.dense_params
        unguarded = make_plan(model, rule, scheme=scheme, example_inputs=x, guard=False)
        for layer, same in zip(plan.layers, unguarded.layers, strict=True):
            assert layer.dense or layer == same


def test_auto_takes_the_cheapest_scheme() -> None:
    model, x = small_cnn(), cnn_input()
    plan = make_plan(model, Ratio(0.3), example_inputs=x, guard=False)
    for name in ("channel", "spatial", "decoupled", "depthwise"):
        other = make_plan(model, Ratio(0.3), scheme=name, example_inputs=x, guard=False)
        for layer, alone in zip(plan.layers, other.layers, strict=True):
            if not alone.dense:
                assert (layer.flops or 0) <= (alone.flops or 0)


def test_a_scheme_that_does_not_fit_says_why() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(32, 32))
    plan = make_plan(model, Ratio(0.3), scheme="spatial")
    assert plan["0"].reason == "spatial is for 2-d convolutions"
    assert plan["1"].scheme == "linear"


# -- overrides -------------------------------------------------------------------------------------


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)])


def _ranks(plan: Plan) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in plan.layers}


def test_the_last_matching_override_wins() -> None:
    overrides = {"*": FixedRank(2), "1?": FixedRank(3), "[45]": LayerConfig(rank=4), "5": None}
    found = _ranks(make_plan(_stack(), FixedRank(9), overrides=overrides))
    expected: dict[str, int | None] = {str(i): 2 for i in range(12)}
    expected |= {"10": 3, "11": 3, "4": 4, "5": None}
    assert found == expected
    again = _ranks(make_plan(_stack(), FixedRank(9), overrides={"5": None, "*": FixedRank(2)}))
    assert again["5"] == 2


def test_an_override_of_none_leaves_dense() -> None:
    plan = make_plan(_stack(), Ratio(0.2), overrides={"3": None})
    assert plan["3"].reason == "left dense by an override"
    assert plan["3"].params == plan["3"].dense_params


def test_a_layer_config_sets_scheme_and_rank() -> None:
    model = small_cnn()
    overrides = {
        "0": LayerConfig(scheme="decoupled"),
        "3": LayerConfig(rank=Energy(0.2), scheme="spatial"),
        "6": LayerConfig(rank=5),
        "10": LayerConfig(),
    }
    plan = make_plan(model, FixedRank(2), scheme="channel", overrides=overrides, guard=False)
    assert [(x.scheme, x.rank) for x in plan.layers][:1] == [("decoupled", 2)]
    assert plan["3"].scheme == "spatial"
    assert (plan["3"].energy or 0) >= 0.2
    assert (plan["6"].scheme, plan["6"].rank) == ("channel", 5)
    assert (plan["10"].scheme, plan["10"].rank) == ("linear", 2)


def test_an_exact_rank_is_given_or_refused() -> None:
    model = nn.Sequential(nn.Conv2d(64, 8, 3))
    # channel has at most 8, decoupled 9, spatial 24
    for rank in (1, 8, 9, 10, 24):
        plan = make_plan(model, Ratio(1), overrides={"0": LayerConfig(rank=rank)}, guard=False)
        assert plan["0"].rank == rank
    with pytest.raises(ConfigError, match="'0': rank 25 exceeds the largest possible, 24"):
        make_plan(model, Ratio(1), overrides={"0": LayerConfig(rank=25)})
    for scheme, largest in (("channel", 8), ("decoupled", 9)):
        override = {"0": LayerConfig(rank=largest + 1, scheme=scheme)}
        with pytest.raises(ConfigError, match=f"exceeds the largest possible, {largest}"):
            make_plan(model, Ratio(1), overrides=override)


def test_a_pattern_without_match_lists_near_names() -> None:
    model = nn.ModuleDict({"stage1": nn.Linear(8, 8), "stage2": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match="'stage3' matches no layer; did you mean 'stage"):
        make_plan(model, Ratio(0.5), overrides={"stage3": None})
    with pytest.raises(ConfigError, match="known: 'stage1', 'stage2'"):
        make_plan(model, Ratio(0.5), overrides={"xyz.*": None})


def test_a_tied_layers_second_name_matches_too() -> None:
    plan = make_plan(TiedLinears(), FixedRank(3), overrides={"b": FixedRank(5)})
    assert _ranks(plan) == {"a": 5}


@pytest.mark.parametrize("override", [3, "channel", 0.5, Budget(params=0.5), object])
def test_other_overrides_are_refused(override: Any) -> None:
    with pytest.raises(ConfigError, match="override for '0' must be"):
        make_plan(_stack(), Ratio(0.5), overrides={"0": override})


@pytest.mark.parametrize("rank", [0, -1, 1.5, "4", True, Budget(params=0.5)])
def test_a_layer_config_checks_its_rank(rank: Any) -> None:
    with pytest.raises(ConfigError, match="LayerConfig"):
        LayerConfig(rank=rank)


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        LayerConfig(3)  # type: ignore[misc]


def test_a_layer_config_with_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        make_plan(_stack(), Ratio(0.5), overrides={"0": LayerConfig(scheme="linaer")})


def test_an_override_of_an_unsupported_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lstm' cannot be factorised: LSTM is not supported"):
        make_plan(_with_lstm(), Ratio(0.5), overrides={"lstm": FixedRank(2)})


def test_a_pattern_may_match_unsupported_layers_beside_others() -> None:
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16))
    plan = make_plan(model, Ratio(1), overrides={"*": FixedRank(2)})
    assert (plan["0"].rank, plan["1"].rank) == (None, 2)
    with pytest.raises(ConfigError, match="'0' cannot be factorised"):
        make_plan(model, Ratio(1), overrides={"0": FixedRank(2)})


def test_an_exact_rank_needs_no_sensitivity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    stats = calibrate(model, [torch.randn(4, 3, 9, 9)], sensitivity=lambda y: y.square().sum())
    plan = make_plan(model, Budget(params=0.7), stats=stats, overrides={"1": LayerConfig(rank=3)})
    assert plan["1"].rank == 3


# -- budgets ---------------------------------------------------------------------------------------


def test_a_wide_layer_can_be_made_as_small_as_its_smallest_rank() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024))
    plan = make_plan(model, Budget(params=0.004))
    assert plan["0"].rank == 1


BUDGETS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], dict[str, float]]] = [
    ("resnet20", resnet20, (1, 3, 32, 32), {"flops": 0.6}),
    ("resnet20", resnet20, (1, 3, 32, 32), {"flops": 0.2}),
    ("resnet20", resnet20, (1, 3, 32, 32), {"params": 0.5}),
    ("resnet20", resnet20, (1, 3, 32, 32), {"flops": 0.4, "params": 0.4}),
    ("resnet20", resnet20, (1, 3, 32, 32), {"flops": 0.2, "params": 0.9}),
    ("mobilenet_v2", mobilenet_v2, (1, 3, 64, 64), {"flops": 0.7}),
    ("mobilenet_v2", mobilenet_v2, (1, 3, 64, 64), {"params": 0.6}),
    ("small_cnn", small_cnn, (1, 3, 12, 12), {"flops": 0.5}),
    ("tied_linears", TiedLinears, (1, 20), {"params": 0.7}),
    ("shared_module", SharedModule, (1, 20), {"flops": 0.5}),
]
SLOW_BUDGETS = [
    ("resnet18", resnet18, (1, 3, 64, 64), {"flops": 0.35}),
    ("resnet18", resnet18, (1, 3, 64, 64), {"params": 0.2}),
    ("resnet18", resnet18, (1, 3, 64, 64), {"flops": 0.5, "params": 0.5}),
]


@pytest.mark.parametrize(
    ("build", "shape", "bounds"),
    [pytest.param(*row[1:], id=f"{row[0]} {row[3]}") for row in BUDGETS]
    + [
        pytest.param(*row[1:], id=f"{row[0]} {row[3]}", marks=pytest.mark.slow)
        for row in SLOW_BUDGETS
    ],
)
def test_budget_is_met_and_used(
    build: Callable[[], nn.Module], shape: tuple[int, ...], bounds: dict[str, float]
) -> None:
    """Never above, and what binds within a few per cent of it; counted on the real network."""
    torch.manual_seed(0)
    model, x = build(), torch.zeros(shape)
    plan = make_plan(model, Budget(**bounds), example_inputs=x)
    dense, compact = profile(model, x), profile(factorize(model, plan), x)
    shares = {name: getattr(compact, name) / getattr(dense, name) for name in bounds}
    assert all(shares[name] <= bound for name, bound in bounds.items()), shares
    slack = (
        0.01 if len(list(model.parameters())) > 20 else 0.1
    )  # one rank is that much of a small one
    assert max(shares[name] / bound for name, bound in bounds.items()) >= 1 - slack, shares
    for layer in plan.layers:
        assert layer.params <= layer.dense_params
        assert (layer.flops or 0) <= (layer.dense_flops or 0)


def test_a_tighter_budget_loses_more() -> None:
    model = resnet20()
    kept = []
    for share in (0.8, 0.5, 0.3, 0.15):
        plan = make_plan(model, Budget(params=share))
        kept.append(sum(1.0 if x.energy is None else x.energy for x in plan.layers))
    assert kept == sorted(kept, reverse=True)


def test_a_full_budget_leaves_all_dense() -> None:
    plan = make_plan(small_cnn(), Budget(params=1.0, flops=1), example_inputs=cnn_input())
    assert not plan.factorized
    assert {layer.reason for layer in plan.layers} == {"the budget is better spent elsewhere"}


def test_budget_keeps_overrides_and_multiples() -> None:
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    overrides = {"*stage1*": None, "*stage2.unit1.*": FixedRank(4)}
    plan = make_plan(
        model, Budget(flops=0.75), overrides=overrides, example_inputs=x, multiple_of=4
    )
    assert all(layer.dense for layer in plan.layers if "stage1" in layer.name)
    assert {x.rank for x in plan.layers if "stage2.unit1." in x.name and not x.dense} == {4}
    assert all(layer.rank is None or layer.rank % 4 == 0 for layer in plan.layers)
    assert plan.factorized
    assert (plan.flops or 0) <= 0.75 * (plan.dense_flops or 0)


def test_an_unreachable_budget_says_what_is_the_closest() -> None:
    model, x = small_cnn(), cnn_input()
    with pytest.raises(BudgetError, match="cannot be met: the closest") as caught:
        make_plan(model, Budget(flops=0.01, params=0.9), example_inputs=x)
    closest = caught.value.closest
    assert closest.keys() == {"flops", "params"}
    assert all(0.01 < share < 1 for share in closest.values())
    # the closest can be met, and nothing below it
    plan = make_plan(model, Budget(flops=closest["flops"]), example_inputs=x)
    assert plan.flops == round(closest["flops"] * (plan.dense_flops or 0))
    with pytest.raises(BudgetError):
        make_plan(model, Budget(flops=closest["flops"] * 0.999), example_inputs=x)


def test_a_budget_that_the_rest_of_the_model_exceeds() -> None:
    """Most parameters sit where nothing can be done."""
    model = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 32))
    with pytest.raises(BudgetError) as caught:
        make_plan(model, Budget(params=0.5))
    assert caught.value.closest["params"] == pytest.approx((32000 + 32 + 64) / 33056)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, 5, NAN, INF, "0.5", True, [0.5]])
@pytest.mark.parametrize("quantity", ["flops", "params"])
def test_a_budget_is_a_fraction(quantity: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"Budget\({quantity}="):
        Budget(**{quantity: value})


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="give at least one"):
        Budget()


def test_a_flops_budget_needs_inputs() -> None:
    with pytest.raises(ConfigError, match="a FLOPs budget needs example_inputs"):
        make_plan(small_cnn(), Budget(flops=0.5))


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("width", [24, 120, 320])
def test_a_budget_chooses_among_evenly_spread_ranks_that_pay(width: int, multiple_of: int) -> None:
    """Some 64 of them, from the smallest to the largest, each at the loss of its energy."""
    model, x = nn.Sequential(nn.Conv2d(width, width, 3, stride=2)), torch.zeros(1, width, 9, 9)
    (site,) = survey(model, profile(model, x))
    assert site.spec is not None
    for scheme in applicable(site.spec, "auto")[0]:
        layer = _LayerOption(site, scheme)
        step = 1 if scheme.name in CHOICES["separable"] else multiple_of
        paying = [
            rank
            for rank in range(step, layer.max_rank + 1, step)
            if not layer.guarded(layer.at(rank, "", None)).dense
        ]
        stride = max(1, math.ceil(len(paying) / 64))
        options = list(_grid(layer, multiple_of))
        ranks = sorted({*paying[:1], *paying[stride - 1 :: stride]})
        assert [option.layer.rank for option in options] == ranks
        for option in options:
            assert option.loss == pytest.approx(1 - (option.layer.energy or 0))


def test_the_same_model_gets_the_same_plan() -> None:
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    plans = [make_plan(model, Budget(flops=0.4), example_inputs=x) for _ in range(2)]
    assert plans[0] == plans[1]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("rank", [Energy(0.9), FixedRank(2), Budget(params=0.5)], ids=str)
def test_non_finite_weights_are_named(rank: Any, value: float) -> None:
    model = small_cnn()
    with torch.no_grad():
        model[3].weight[1, 2, 0, 0] = value
    with pytest.raises(NumericsError, match="layer '3': the weight holds"):
        make_plan(model, rank)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Sequential(), "no weights"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "no weights"),
        (nn.Linear(8, 8), "the model is this one layer; wrap it in nn.Sequential"),
        (nn.Sequential(nn.LSTM(8, 8)), "0: LSTM is not supported"),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention is not supported"),
    ],
    ids=["empty", "vectors", "one_layer", "lstm", "attention"],
)
def test_a_model_without_layers_says_why(model: nn.Module, complaint: str) -> None:
    with pytest.raises(ConfigError, match="no layer that can be factorised") as caught:
        make_plan(model, Ratio(0.5))
    assert complaint in str(caught.value)


def test_weights_on_the_meta_device_have_no_spectrum() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32))
    refused = "layer '0': its weight is on the meta device"
    with pytest.raises(LayerError, match=refused):
        make_plan(model, Energy(0.9))
    with pytest.raises(LayerError, match=refused):
        factorize(model, make_plan(nn.Sequential(nn.Linear(32, 32)), FixedRank(4)))


@pytest.mark.parametrize("rank", [0.5, 4, "energy", None, Energy])
def test_rank_is_a_rule_or_a_budget(rank: Any) -> None:
    with pytest.raises(ConfigError, match="must be a rank rule or a Budget"):
        make_plan(small_cnn(), rank)


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, "8", True])
def test_multiple_of_is_a_whole_number(multiple_of: Any) -> None:
    with pytest.raises(ConfigError, match="multiple_of"):
        make_plan(small_cnn(), Ratio(0.5), multiple_of=multiple_of)


def test_ranks_go_up_to_a_multiple_but_not_past_the_largest_and_exact_ones_stay() -> None:
    spectrum = Spectrum(torch.ones(1, 20), MatrixShape(batch=1, rows=20, cols=30))
    for rule, expected in ((FixedRank, [8, 8, 16, 20, 20]), (ExactRank, [1, 8, 9, 17, 20])):
        found = [
            wanted_rank(rule(rank), spectrum, SCHEMES["linear"], 8) for rank in (1, 8, 9, 17, 20)
        ]
        assert found == expected


def test_tied_layers_are_planned_once_and_the_embeddings_head_stays() -> None:
    plan = make_plan(TiedConvs(), FixedRank(4))
    assert [(x.name, x.tied, x.rank) for x in plan.layers] == [("a", ("b",), 4)]
    plan = make_plan(TiedEmbedding(), FixedRank(4))
    assert [x.name for x in plan.factorized] == ["body"]
    assert plan["head"].reason == "weight is shared with embed (Embedding)"
    assert plan["embed"].reason == "Embedding is not supported"


def test_reasons_say_how_the_rank_was_chosen() -> None:
    plan = make_plan(_stack(), Energy(0.3), overrides={"0": Threshold(1.0)})
    assert plan["1"].reason == "Energy(keep=0.3)"
    assert plan["0"].reason.startswith(("Threshold(value=1.0", "linear at rank"))
    budget = make_plan(_stack(), Budget(params=0.3))
    assert {x.reason for x in budget.factorized} == {"budget"}


def test_energy_in_the_plan_is_that_of_the_weights() -> None:
    model = small_cnn()
    plan = make_plan(model, Ratio(0.4), guard=False)
    compact = factorize(model.double(), plan)
    for layer in plan.factorized:
        weight = model.get_submodule(layer.name).weight.detach()
        lost = (weight - compact.get_submodule(layer.name).dense_weight()).square().sum()
        assert 1 - float(lost / weight.square().sum()) == pytest.approx(layer.energy, abs=1e-6)
        assert isinstance(layer.spec, LayerSpec)
