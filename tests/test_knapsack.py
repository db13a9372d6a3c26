"""The knapsack behind budgets, against trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankprune.knapsack import SLACK, Choice, solve

ROUNDING = 1 + 1e-9
# the solver may stop this close to the optimum
GAP = 1e-3


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Choice]], list[float]]:
    """Up to 4 layers of up to 4 options, with one or two bounds."""
    bounds = draw(st.integers(1, 2))
    costs = st.tuples(*[st.integers(1, 1000).map(float)] * bounds)
    losses = st.integers(0, 1000).map(lambda value: value / 1000)
    choices = st.builds(Choice, losses, costs)
    groups = draw(st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=4))
    limits = draw(st.lists(st.integers(1, 3000).map(float), min_size=bounds, max_size=bounds))
    return groups, limits


def _undominated(group: list[Choice]) -> list[Choice]:
    """The options that no other beats or equals everywhere."""
    kept: list[Choice] = []
    for choice in sorted(group, key=lambda c: (c.loss, c.costs)):
        if not any(all(a <= b for a, b in zip(k.costs, choice.costs, strict=True)) for k in kept):
            kept.append(choice)
    return kept


def _totals(choices: tuple[Choice, ...], limits: list[float]) -> tuple[float, list[float]]:
    """Total loss, and each limit's share that is used."""
    loss = sum(choice.loss for choice in choices)
    used = [sum(c.costs[i] for c in choices) / limit for i, limit in enumerate(limits)]
    return loss, used


@settings(max_examples=300)
@given(problems())
def test_choice_is_the_best_there_is(problem: tuple[list[list[Choice]], list[float]]) -> None:
    """The least loss; or the least among those that use a limit to within the slack."""
    groups, limits = problem
    every = [_totals(c, limits) for c in itertools.product(*map(_undominated, groups))]
    feasible = [(loss, used) for loss, used in every if max(used) <= ROUNDING]
    picked = solve(groups, limits)
    if picked is None:
        assert not feasible
        return
    assert len(picked) == len(groups)
    loss, used = _totals(tuple(g[i] for g, i in zip(groups, picked, strict=True)), limits)
    assert max(used) <= ROUNDING
    tolerance = GAP * sum(max(c.loss for c in group) for group in groups) + 1e-9
    least = min(loss for loss, _ in feasible)
    close = [[loss for loss, used in feasible if used[i] >= 1 - SLACK] for i in range(len(limits))]
    if max(used) < 1 - SLACK:
        # nothing closer exists for the limit that binds
        assert loss <= least + tolerance
        assert not all(close)
    else:
        targets = [min(losses) for i, losses in enumerate(close) if used[i] >= 1 - SLACK]
        assert loss <= max(targets) + tolerance


def test_budget_is_used_where_it_can_be() -> None:
    """A choice that uses the limit is taken though it loses more than one that does not."""
    groups = [
        [Choice(0.0, (70.0,)), Choice(0.05, (40.0,))],
        [Choice(0.0, (50.0,)), Choice(0.2, (30.0,))],
    ]
    assert solve(groups, [100.0]) == [0, 1]
    assert solve(groups, [95.0]) == [1, 0]


def test_limits_are_kept_where_dearer_options_lose_less() -> None:
    groups = [[Choice(0.0, (10.0,)), Choice(1e-9, (5.0,))], [Choice(0.0, (100.0,))]]
    assert solve(groups, [110.0]) == [0, 0]
    assert solve(groups, [109.0]) == [1, 0]
    assert solve(groups, [104.0]) is None


def test_every_limit_is_kept() -> None:
    groups = [[Choice(0.0, (8.0, 1.0)), Choice(0.1, (1.0, 8.0)), Choice(0.9, (2.0, 2.0))]]
    assert solve(groups, [9.0, 9.0]) == [0]
    assert solve(groups, [7.0, 9.0]) == [1]
    assert solve(groups, [7.0, 7.0]) == [2]
    assert solve(groups, [1.0, 7.0]) is None


def test_costs_of_any_size() -> None:
    """The solver's tolerances are absolute; costs in FLOPs and losses near zero are not."""
    groups = [
        [Choice(0.0, (4e12,)), Choice(2e-9, (1e12,))],
        [Choice(0.0, (4e12,)), Choice(1e-9, (1e12,))],
    ]
    assert solve(groups, [5e12]) == [0, 1]
    groups = [[Choice(c.loss * 1e12, (c.costs[0] * 1e-12,)) for c in group] for group in groups]
    assert solve(groups, [5.0]) == [0, 1]


@pytest.mark.parametrize("limit", [1500.0, 3000.0, 4950.0])
def test_many_equal_layers(limit: float) -> None:
    """Symmetry does not make it slow, nor let the limit be missed."""
    group = [Choice((100 - rank) ** 2 / 1e4, (float(rank),)) for rank in range(1, 101)]
    picked = solve([group] * 50, [limit])
    assert picked is not None
    spent = sum(group[index].costs[0] for index in picked)
    assert (1 - SLACK) * limit <= spent <= limit
    # equal layers share equally where the loss is convex
    assert sum(group[index].loss for index in picked) <= 50 * (100 - limit / 50) ** 2 / 1e4 * 1.01


def test_the_same_problem_has_the_same_answer() -> None:
    groups = [[Choice(1 / rank, (float(rank),)) for rank in range(1, 20)] for _ in range(20)]
    answers = {tuple(solve(groups, [150.0]) or ()) for _ in range(3)}
    assert len(answers) == 1
