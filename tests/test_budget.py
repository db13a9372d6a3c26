"""Budgets: what may be asked for, what is chosen, and what a clock says about it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankprune.latency
from cases import cnn_input, mlp, small_cnn
from rankprune import (
    TRP,
    Budget,
    BudgetError,
    ConfigError,
    Controller,
    FixedRank,
    LatencyTable,
    LayerPlan,
    Plan,
    Ratio,
    Runtime,
    attach,
    factorize,
    make_plan,
)
from rankprune.budget import Option, is_faster, spend, spend_time
from rankprune.knapsack import SLACK
from rankprune.latency import DENSE, Request
from rankprune.runtimes import Run

INF, NAN = math.inf, math.nan
EAGER = Runtime(backend="eager", threads=1)

# -- what may be asked for -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, 5, NAN, INF, "0.5", True, [0.5]])
def test_a_latency_is_a_fraction(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"Budget\(latency=.*a fraction of the dense model"):
        Budget(latency=value)


@pytest.mark.parametrize("value", [0, -3, NAN, INF, "2ms", True, [2.0]])
def test_milliseconds_are_positive(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"Budget\(latency_ms=.*milliseconds, greater than 0"):
        Budget(latency_ms=value)


def test_one_bound_on_time_is_enough() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Budget(latency=0.5, latency_ms=3.0)


def test_bounds_are_those_given() -> None:
    assert Budget(flops=0.5, latency_ms=120).bounds() == {"flops": 0.5, "latency_ms": 120}
    assert Budget(latency=1).timed
    assert Budget(latency_ms=2.5).timed
    assert not Budget(flops=0.5, params=0.5).timed


_fractions = st.floats(0.01, 1)


@given(
    st.dictionaries(st.sampled_from(["flops", "params", "latency"]), _fractions, min_size=1),
    st.floats(0.1, 1e4),
    st.lists(st.floats(0, 0.999), min_size=2, max_size=6),
)
def test_easing_comes_down_to_the_budget(
    bounds: dict[str, float], milliseconds: float, left: list[float]
) -> None:
    if "latency" not in bounds:
        bounds["latency_ms"] = milliseconds
    budget = Budget(**bounds)
    assert budget.eased(0).bounds() == pytest.approx(bounds)
    steps = [budget.eased(value).bounds() for value in sorted(left, reverse=True)]
    for looser, tighter in itertools.pairwise(steps):
        assert all(looser[name] >= tighter[name] >= bounds[name] * 0.999999 for name in bounds)


# -- spend -----------------------------------------------------------------------------------------


def _option(
    name: str,
    loss: float,
    dense: tuple[int, int, float | None],
    own: tuple[int, int, float | None] | None = None,
    rank: int = 1,
) -> Option:
    """FLOPs, parameters and milliseconds of a layer, dense and as it would be."""
    chosen = own or dense
    layer = LayerPlan(
        name=name,
        type="Linear",
        spec=None,
        scheme=None if own is None else "linear",
        rank=None if own is None else rank,
        dense_flops=dense[0],
        dense_params=dense[1],
        dense_latency_ms=dense[2],
        flops=chosen[0],
        params=chosen[1],
        latency_ms=chosen[2],
    )
    return Option(layer, loss)


@st.composite
def problems(
    draw: st.DrawFn,
) -> tuple[list[list[Option]], Budget, dict[str, float], float]:
    """Up to 4 layers of up to 4 options, a rest that has no choice, one to three bounds."""
    milliseconds = st.integers(1, 800).map(lambda value: value / 8)
    groups = []
    for index in range(draw(st.integers(1, 4))):
        dense = draw(st.tuples(st.integers(1, 999), st.integers(1, 999), milliseconds))
        group = [_option(f"l{index}", 0.0, dense)]
        for _ in range(draw(st.integers(0, 3))):
            shares = draw(st.tuples(*[st.integers(1, 40).map(lambda v: v / 32)] * 3))
            own = (
                max(int(dense[0] * shares[0]), 1),
                max(int(dense[1] * shares[1]), 1),
                dense[2] * shares[2],
            )
            group.append(_option(f"l{index}", draw(st.integers(0, 1000)) / 1000, dense, own))
        groups.append(group)
    rest = draw(st.tuples(st.integers(0, 500), st.integers(0, 500), milliseconds))
    quantities = ("flops", "params", "latency")
    total = {
        quantity: sum(_dense(group[0], quantity) for group in groups) + own
        for quantity, own in zip(quantities, rest, strict=True)
    }
    bounds = draw(st.dictionaries(st.sampled_from(quantities), st.floats(0.2, 1), min_size=1))
    return groups, Budget(**bounds), total, draw(st.sampled_from([1.0, 0.5, 1.7]))


def _dense(option: Option, quantity: str) -> float:
    name = "dense_latency_ms" if quantity == "latency" else f"dense_{quantity}"
    return getattr(option.layer, name)


def _own(option: Option, quantity: str) -> float:
    return getattr(option.layer, "latency_ms" if quantity == "latency" else quantity)


def _share(
    options: Sequence[Option], quantity: str, total: Mapping[str, float], gain: float
) -> float:
    """What the whole network then costs, as a fraction."""
    worth = gain if quantity == "latency" else 1.0
    saved = sum(_dense(o, quantity) - _own(o, quantity) for o in options)
    return 1 - worth * saved / total[quantity]


@settings(max_examples=150)
@given(problems())
def test_no_choice_within_the_budget_loses_less(
    problem: tuple[list[list[Option]], Budget, dict[str, float], float],
) -> None:
    """Or only one that leaves more of the budget unused than the solver's slack."""
    groups, budget, total, gain = problem
    bounds = budget.bounds()

    def fits(options: Sequence[Option], ease: float) -> bool:
        return all(
            _share(options, name, total, gain) <= bound + ease for name, bound in bounds.items()
        )

    every = list(itertools.product(*groups))
    try:
        picked = spend(groups, budget, total, gain)
    except BudgetError as error:
        refused = error.closest
    else:
        refused = None
    if refused is not None:
        assert not any(fits(options, -1e-9) for options in every)
        least = {name: min(_share(o, name, total, gain) for o in every) for name in bounds}
        assert refused == pytest.approx(least)
        return
    assert [option.layer.name for option in picked] == [group[0].layer.name for group in groups]
    assert fits(picked, 1e-9)

    def used(options: Sequence[Option], name: str) -> float:
        """Share of the limit on these layers that is used."""
        worth = gain if name == "latency" else 1.0
        most = sum(_dense(group[0], name) for group in groups)
        limit = most - total[name] * (1 - bounds[name]) / worth
        limit = limit if name == "latency" else math.floor(limit)
        return sum(_own(o, name) for o in options) / limit

    loss = sum(option.loss for option in picked)
    feasible = [options for options in every if fits(options, -1e-9)]
    losses = [
        [sum(o.loss for o in options) for options in feasible if used(options, name) >= 1 - SLACK]
        for name in bounds
    ] + [[sum(o.loss for o in options) for options in feasible]]
    tolerance = 1e-3 * sum(max(o.loss for o in group) for group in groups) + 1e-9
    assert loss <= max(min(values, default=0) for values in losses) + tolerance


def test_a_gain_below_one_asks_more_of_the_layers() -> None:
    """The network saves half of what its layers save: the bound is met there, not here."""
    dense = (100, 100, 10.0)
    group = [
        _option("l", 0.0, dense),
        *(_option("l", 1 - s, dense, (99, 99, 10 * s)) for s in (0.9, 0.8, 0.6)),
    ]
    total = {"flops": 100, "params": 100, "latency": 10.0}
    for gain, share in ((1.0, 0.8), (2.0, 0.9), (0.5, 0.6)):
        (picked,) = spend([group], Budget(latency=0.8), total, gain)
        assert picked.layer.latency_ms == 10 * share
    with pytest.raises(BudgetError) as caught:
        spend([group], Budget(latency=0.8), total, 0.4)
    assert caught.value.closest == {"latency": pytest.approx(0.84)}


def test_an_unreachable_budget_says_what_was_wanted_and_what_is_possible() -> None:
    dense = (100, 200, 10.0)
    groups = [[_option("l", 0.0, dense), _option("l", 0.5, dense, (50, 150, 9.0))]]
    total = {"flops": 200, "params": 200, "latency": 20.0}
    with pytest.raises(BudgetError) as caught:
        spend(groups, Budget(flops=0.7, params=0.8, latency=0.5), total)
    assert caught.value.closest == {"flops": 0.75, "params": 0.75, "latency": 0.95}
    assert str(caught.value).startswith(
        "budget flops=0.7, params=0.8, latency=0.5 cannot be met: the closest that these layers "
        "and schemes reach is flops=0.7500, params=0.7500, latency=0.9500; raise the budget"
    )


# -- spend_time ------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """A network of which a function says what it takes, of the milliseconds that layers save."""

    dense_ms: float
    takes: Callable[[float], float]
    runtime: Runtime = EAGER
    compact_ms: float = 0.0
    seen: list[float] = field(default_factory=list)

    def measure(self, layers: Sequence[LayerPlan]) -> None:
        saved = sum((x.dense_latency_ms or 0) - (x.latency_ms or 0) for x in layers)
        self.compact_ms = self.takes(saved)
        self.seen.append(self.compact_ms)


def _groups(layers: int = 6, ranks: int = 20, least: float = 0.1) -> list[list[Option]]:
    """Layers of 10 ms and more with finely graded options, down to a share of the time."""
    groups = []
    for index in range(layers):
        dense = (1000, 1000, 10.0 + index)
        group = [_option(f"l{index}", 0.0, dense)]
        for rank in range(1, ranks + 1):
            share = least + (0.99 - least) * rank / ranks
            own = (int(1000 * share), int(1000 * share), dense[2] * share)
            group.append(_option(f"l{index}", (1 - share) ** 2 * (1 + index), dense, own, rank))
        groups.append(group)
    return groups


_TOTAL = {"flops": 6000.0, "params": 6000.0}
_DENSE_MS = 75.0


def _proportional(gain: float) -> _Clock:
    return _Clock(_DENSE_MS, lambda saved: _DENSE_MS - gain * saved)


@pytest.mark.parametrize("milliseconds", [False, True])
@pytest.mark.parametrize("bound", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("gain", [0.6, 1.0, 1.5])
def test_the_network_keeps_to_the_bound_and_uses_it(
    gain: float, bound: float, milliseconds: bool
) -> None:
    """Whatever share of the layers' savings arrives in the network."""
    clock = _proportional(gain)
    budget = Budget(latency_ms=bound * _DENSE_MS) if milliseconds else Budget(latency=bound)
    chosen = spend_time(_groups(), budget, _TOTAL, clock)
    assert bound * 0.94 <= clock.compact_ms / clock.dense_ms <= bound
    saved = sum(_dense(o, "latency") - _own(o, "latency") for o in chosen)
    assert clock.compact_ms == pytest.approx(_DENSE_MS - gain * saved)
    assert len(clock.seen) <= 3


def test_other_bounds_hold_beside_the_time() -> None:
    clock = _proportional(1.0)
    chosen = spend_time(_groups(), Budget(latency=0.9, params=0.5), _TOTAL, clock)
    assert _share(chosen, "params", _TOTAL, 1.0) <= 0.5
    assert clock.compact_ms <= 0.9 * clock.dense_ms
    clock = _proportional(1.5)
    chosen = spend_time(_groups(), Budget(latency=0.4, flops=0.9), _TOTAL, clock)
    assert _share(chosen, "flops", _TOTAL, 1.0) <= 0.9
    assert 0.94 * 0.4 <= clock.compact_ms / clock.dense_ms <= 0.4


@pytest.mark.parametrize("budget", [Budget(latency=0.8), Budget(latency_ms=60)])
def test_a_network_that_does_not_get_faster_cannot_keep_to_a_time(budget: Budget) -> None:
    clock = _Clock(_DENSE_MS, lambda saved: _DENSE_MS + saved)
    with pytest.raises(
        BudgetError, match=r"no plan .* keeps to latency=0\.8: the fastest"
    ) as caught:
        spend_time(_groups(), budget, _TOTAL, clock)
    assert caught.value.closest == {"latency": min(clock.seen) / _DENSE_MS}


def test_layers_that_promise_too_little_are_measured_before_they_are_refused() -> None:
    """Alone they reach 0.82 at best, in the network they save twice as much."""
    clock = _proportional(2.0)
    spend_time(_groups(least=0.8), Budget(latency=0.7), _TOTAL, clock)
    assert 0.94 * 0.7 <= clock.compact_ms / clock.dense_ms <= 0.7


def test_the_fastest_network_is_enough_where_it_just_keeps_to_the_bound() -> None:
    """Within the solver's reserve, where it would say that nothing is possible."""
    fastest = 0.5 * 0.99
    groups = _groups()
    for group in groups:
        group[1:] = [
            replace(o, layer=replace(o.layer, latency_ms=fastest * _dense(o, "latency")))
            for o in group[1:2]
        ]
    clock = _proportional(1.0)
    spend_time(groups, Budget(latency=0.5), _TOTAL, clock)
    assert clock.compact_ms == pytest.approx(fastest * _DENSE_MS)
    # but not where it breaks another bound
    with pytest.raises(BudgetError, match=r"flops=0\.001.* cannot be met"):
        spend_time(groups, Budget(latency=0.5, flops=0.001), _TOTAL, _proportional(1.0))


def test_a_plan_that_keeps_to_the_bound_survives_later_failures() -> None:
    """The first one is faster than asked for; all others turn out to be slow."""
    clock = _Clock(_DENSE_MS, lambda saved: _DENSE_MS)
    answers = iter([0.4, 0.99, 0.99, 0.99, 0.99])
    clock.takes = lambda saved: _DENSE_MS * next(answers)
    chosen = spend_time(_groups(), Budget(latency=0.7), _TOTAL, clock)
    assert clock.compact_ms == 0.4 * _DENSE_MS
    assert len(clock.seen) > 1
    saved = sum(_dense(o, "latency") - _own(o, "latency") for o in chosen)
    assert saved / _DENSE_MS == pytest.approx(1 - 0.7 * 0.98, abs=0.02)


def _two_kinds() -> list[list[Option]]:
    """Options that save a quarter of the FLOPs: a bit faster, or much faster and worse."""
    groups = []
    for index in range(4):
        dense = (1000, 1000, 10.0)
        barely = _option(f"l{index}", 0.1, dense, (750, 750, 9.5), rank=2)
        clearly = _option(f"l{index}", 0.3, dense, (700, 700, 4.0), rank=1)
        groups.append([_option(f"l{index}", 0.0, dense), barely, clearly])
    return groups


_FOUR = {"flops": 4000.0, "params": 4000.0}


def test_where_the_network_gets_slower_layers_must_gain_more() -> None:
    """Two more calls a layer cost 1 ms each, which layers measured alone do not show."""
    clock = _Clock(40.0, lambda saved: 40.0 if not saved else 44.0 - saved)
    chosen = spend_time(_two_kinds(), Budget(flops=0.75), _FOUR, clock)
    assert clock.seen == [42.0, 20.0]
    assert [option.layer.rank for option in chosen] == [1, 1, 1, 1]
    assert (clock.dense_ms, clock.compact_ms) == (40.0, 20.0)


@pytest.mark.parametrize("budget", [Budget(flops=0.75), Budget(params=0.8, flops=0.9)])
def test_a_slower_network_is_never_chosen(budget: Budget) -> None:
    clock = _Clock(40.0, lambda saved: 40.0 + saved)
    with pytest.raises(BudgetError):
        spend_time(_two_kinds(), budget, _FOUR, clock)
    assert all(seen > 40.0 for seen in clock.seen)


def test_no_plan_is_slower_though_layers_gain_as_much_as_one_may_ask() -> None:
    groups = [[o for o in group if o.layer.dense or o.layer.rank == 1] for group in _two_kinds()]
    for group in groups:
        layer = group[1].layer
        group[1] = replace(group[1], layer=replace(layer, latency_ms=1.0))
    clock = _Clock(40.0, lambda saved: 41.0)
    with pytest.raises(
        BudgetError,
        match=r"no plan that was measured keeps to latency=1: the fastest takes 1\.025 of the "
        r"dense network's time on eager",
    ) as caught:
        spend_time(groups, Budget(flops=0.75), _FOUR, clock)
    assert caught.value.closest == {"latency": pytest.approx(1.025)}
    assert len(clock.seen) == 5


@pytest.mark.parametrize(
    "budget",
    [
        Budget(latency=1.0),
        Budget(latency_ms=1000),
        Budget(flops=1),
        Budget(latency_ms=1e3, flops=1),
    ],
)
def test_a_full_budget_leaves_all_dense(budget: Budget) -> None:
    clock = _proportional(1.0)
    chosen = spend_time(_groups(), budget, _TOTAL, clock)
    assert all(option.layer.dense for option in chosen)
    assert clock.compact_ms == clock.dense_ms


def test_a_layer_without_a_choice_stays_though_it_is_slower() -> None:
    """An override's: the others have to make up for it."""
    groups = _two_kinds()
    groups[0] = [_option("l0", 0.0, (1000, 1000, 10.0), (100, 100, 12.0))]
    clock = _Clock(40.0, lambda saved: 40.0 if not saved else 44.0 - saved)
    chosen = spend_time(groups, Budget(flops=0.75), _FOUR, clock)
    assert chosen[0].layer.latency_ms == 12.0
    assert clock.seen[0] > clock.dense_ms >= clock.compact_ms


def test_untimed_layers_count_as_faster() -> None:
    dense = (10, 10, 4.0)
    assert is_faster(_option("l", 0.0, dense).layer, 0.1)
    assert is_faster(_option("l", 0.0, (10, 10, None), (5, 5, None)).layer, 0.1)
    layer = _option("l", 0.0, dense, (5, 5, 3.0)).layer
    assert is_faster(layer)
    assert is_faster(layer, 0.76)
    assert not is_faster(layer, 0.75)


# -- make_plan on a runtime ------------------------------------------------------------------------


def _lin(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class _Times:
    """Stands for `measure`: what a call takes follows from its name."""

    def __init__(self, takes: Callable[[str], float], network: float = 0.9) -> None:
        self.takes = takes
        self.network = network

    def __call__(self, calls: Mapping[str, Run], *_: Any) -> dict[str, float]:
        if set(calls) <= {DENSE, "compact"}:  # a whole network
            return {name: 10.0 if name == DENSE else 10.0 * self.network for name in calls}
        return {name: 1.0 if name == DENSE else self.takes(name) for name in calls}


def _patched(monkeypatch: pytest.MonkeyPatch, times: _Times) -> LatencyTable:
    monkeypatch.setattr(rankprune.latency, "measure", times)
    return LatencyTable(EAGER, cache="")


def test_a_real_plan_on_a_runtime_has_times(tmp_path: Any) -> None:
    """Whatever this machine measures; budgets on time can be missed, so nothing is asked of it."""
    model, x = small_cnn(), cnn_input()
    table = LatencyTable(EAGER, cache=tmp_path)
    plan = make_plan(model, Ratio(0.3), example_inputs=x, runtime=table, guard=False, multiple_of=1)
    assert table.measured > 0
    assert len(plan.factorized) == 5
    for layer in plan.factorized:
        assert (layer.latency_ms or 0) > 0
        assert (layer.dense_latency_ms or 0) > 0
    assert plan.measured is None
    assert Plan.from_json(plan.to_json()) == plan
    assert "ms alone" in str(plan)
    again = LatencyTable(EAGER, cache=tmp_path)
    assert (
        make_plan(model, Ratio(0.3), example_inputs=x, runtime=again, guard=False, multiple_of=1)
        == plan
    )
    assert again.measured == 0


def test_a_real_full_budget_is_measured(tmp_path: Any) -> None:
    x = cnn_input(3)
    table = LatencyTable(EAGER, cache=tmp_path)
    plan = make_plan(small_cnn(), Budget(latency=1.0), example_inputs=x, runtime=table)
    assert not plan.factorized
    found = plan.metadata["latency"]
    assert found.keys() >= {"dense_ms", "compact_ms", "backend", "threads", "precision", "device"}
    assert (found["batch"], found["backend"], found["threads"]) == (3, "eager", 1)
    assert found["dense_ms"] == found["compact_ms"] > 0
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.measured == plan.measured
    assert "on eager, fp32, 1 threads, batch 3" in str(back)


def test_a_plan_within_a_time_is_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _patched(monkeypatch, _Times(lambda name: int(name.split(":")[1]) / 40, network=0.68))
    model = _lin()
    plan = make_plan(model, Budget(latency=0.7), example_inputs=torch.zeros(1, 64), runtime=table)
    assert plan.factorized
    assert all(x.latency_ms < x.dense_latency_ms for x in plan.factorized)
    assert all(x.rank % EAGER.rank_multiple() == 0 for x in plan.factorized)
    assert plan.metadata["latency"]["compact_ms"] == pytest.approx(6.8)
    assert Plan.from_json(plan.to_json()) == plan
    assert factorize(model, plan)(torch.zeros(1, 64)).shape == (1, 64)


@pytest.mark.parametrize("rank", [FixedRank(8), Budget(flops=1.0), Budget(latency=1.0)])
def test_what_is_slower_is_left_dense_and_says_so(
    monkeypatch: pytest.MonkeyPatch, rank: Any
) -> None:
    table = _patched(monkeypatch, _Times(lambda name: 1.0 + int(name.split(":")[1]) / 16))
    plan = make_plan(_lin(), rank, example_inputs=torch.zeros(1, 64), runtime=table, multiple_of=8)
    assert not plan.factorized
    if isinstance(rank, FixedRank):
        reason = "nothing is faster: linear at rank 8 takes 1.5 ms, dense 1 ms"
        assert {layer.reason for layer in plan.layers} == {reason}
        assert {layer.latency_ms for layer in plan.layers} == {1.0}


def test_a_budget_that_needs_slower_layers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _patched(monkeypatch, _Times(lambda name: 1.1))
    for budget in (Budget(flops=0.5), Budget(latency=0.5)):
        with pytest.raises(BudgetError):
            make_plan(_lin(), budget, example_inputs=torch.zeros(1, 64), runtime=table)


def test_without_the_guard_slower_layers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _patched(monkeypatch, _Times(lambda name: 2.5))
    plan = make_plan(
        _lin(), FixedRank(8), example_inputs=torch.zeros(1, 64), runtime=table, guard=False
    )
    assert len(plan.factorized) == 2
    assert {(x.dense_latency_ms, x.latency_ms) for x in plan.layers} == {(1.0, 2.5)}


def test_a_slow_override_survives_a_budget_without_the_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = _Times(lambda name: 1.5 if name == "linear:48" else int(name.split(":")[1]) / 40)
    plan = make_plan(
        _lin(),
        Budget(flops=0.99),
        example_inputs=torch.zeros(1, 64),
        runtime=_patched(monkeypatch, times),
        guard=False,
        multiple_of=8,
        overrides={"0": FixedRank(48)},
    )
    assert (plan["0"].rank, plan["0"].latency_ms) == (48, 1.5)
    assert not plan["2"].dense


def test_a_time_needs_a_runtime_and_a_runtime_needs_inputs() -> None:
    for budget in (Budget(latency=0.5), Budget(latency_ms=3.0)):
        with pytest.raises(ConfigError, match=r"a latency budget needs runtime=Runtime"):
            make_plan(_lin(), budget, example_inputs=torch.zeros(1, 64))
    for rank in (Budget(latency=0.5), FixedRank(3)):
        with pytest.raises(ConfigError, match="a runtime needs example_inputs"):
            make_plan(_lin(), rank, runtime=EAGER)
    with pytest.raises(ConfigError, match="runtime must be a Runtime or a LatencyTable"):
        make_plan(_lin(), FixedRank(3), runtime="eager")  # type: ignore[arg-type]


def test_measuring_leaves_model_and_random_state_alone(tmp_path: Any) -> None:
    """A training run that finds its layers in the cache draws what the first one drew."""
    model = small_cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    table = LatencyTable(EAGER, cache=tmp_path)
    make_plan(model, Budget(latency=1.0), example_inputs=cnn_input(), runtime=table)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


# -- training --------------------------------------------------------------------------------------


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    x = torch.randn(8, 16)
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("descent", [0, 3])
def test_training_down_to_a_time(monkeypatch: pytest.MonkeyPatch, descent: int) -> None:
    """Planned on made-up times, so that the budget can be kept on any machine."""
    table = _patched(monkeypatch, _Times(lambda name: int(name.split(":")[1]) / 12, network=0.75))
    model, x = mlp(), torch.zeros(4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = TRP(rank=Budget(latency=0.77), runtime=table, multiple_of=1, every=2, descent=descent)
    trp = attach(model, optimizer, options, example_inputs=x)
    _steps(model, optimizer, 5)
    plan = trp.finish()
    assert plan.factorized
    found = plan.metadata["latency"]
    assert (found["dense_ms"], found["compact_ms"], found["batch"]) == (10.0, 7.5, 4)
    assert all(layer.latency_ms is not None for layer in plan.factorized)
    assert Plan.from_json(plan.to_json()) == plan
    assert torch.allclose(factorize(model, plan)(x), model(x), atol=1e-6)


def test_training_on_a_real_runtime(tmp_path: Any) -> None:
    model, x = mlp(), torch.zeros(4, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    table = LatencyTable(EAGER, cache=tmp_path)
    options = TRP(rank=Budget(latency=1.0), runtime=table, multiple_of=1)
    trp = attach(model, optimizer, options, example_inputs=x)
    _steps(model, optimizer, 2)
    plan = trp.finish()
    assert plan.metadata["latency"]["dense_ms"] > 0
    assert plan.metadata["latency"]["backend"] == "eager"


def test_training_to_a_time_needs_a_runtime() -> None:
    with pytest.raises(ConfigError, match="a latency budget needs runtime"):
        Controller(mlp(), TRP(rank=Budget(latency=0.5)), example_inputs=torch.zeros(1, 16))


def test_a_layer_called_in_two_shapes_takes_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _patched(monkeypatch, _Times(lambda name: 0.25))
    spec = make_plan(_lin(), FixedRank(3)).layers[0].spec
    assert spec is not None
    shapes = [(1, 64), (3, 64)]
    table.measure([Request(spec, shape, {"linear": [4]}) for shape in shapes])
    assert table.dense(spec, shapes) == 2.0
    assert table.factorized(spec, "linear", 4, shapes) == 0.5
