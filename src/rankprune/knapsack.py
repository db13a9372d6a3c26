"""The multiple-choice knapsack behind budgets: one option a layer, least loss, costs bounded.

The linear relaxation has few fractional layers (at most one a bound), so rounding it is nearly
optimal, and its reduced costs rule most options out exactly. HiGHS solves what is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from rankprune.c_stdout import c_stdout_to_stderr

# How far below a budget a choice may stay where something closer exists.
SLACK = 0.01
# The proof of optimality is cut short: layers of equal shape make it long and worthless. Nodes are
# counted, not seconds, so that a resumed run and every process of a distributed one choose alike.
_NODES = 200
_GAP = 1e-3
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Choice:
    """One option of one layer: predicted loss, and a cost for every bounded quantity."""

    loss: float
    costs: tuple[float, ...]


def solve(groups: Sequence[Sequence[Choice]], limits: Sequence[float]) -> list[int] | None:
    """Pick one choice a group with the least total loss within the limits.

    The limit that binds is used to within `SLACK` where some choice of options does.

    Args:
        groups: the options of each layer, at least one each.
        limits: an upper bound on the sum of each cost, greater than 0.

    Returns:
        The index chosen in each group, or None where no choice fits.

    >>> solve([[Choice(0.0, (4,)), Choice(0.5, (1,))], [Choice(0.0, (4,)), Choice(0.1, (2,))]], [6])
    [0, 1]
    """
    members = [(g, index) for g, group in enumerate(groups) for index in _pareto(group)]
    # costs in units of their limit and losses at most 1: the solver's tolerances are absolute
    costs = np.array([groups[g][i].costs for g, i in members]).T / np.array(limits)[:, None]
    losses = np.array([groups[g][i].loss for g, i in members])
    losses /= max(losses.max(), 1e-12)
    owner = np.array([g for g, _ in members])
    free = np.full(len(limits), -np.inf)
    best = _solve(losses, costs, owner, free)
    if best is None:
        return None
    used = costs[:, best].sum(1)
    binding = int(used.argmax())
    if used[binding] < 1 - SLACK:
        free[binding] = 1 - SLACK
        closer = _solve(losses, costs, owner, free)
        best = best if closer is None else closer
    return [members[index][1] for index in best]


def _solve(
    losses: NDArray[np.float64],
    costs: NDArray[np.float64],
    owner: NDArray[np.int64],
    least: NDArray[np.float64],
) -> NDArray[np.int64] | None:
    """Indices of the taken options, one an owner, with least ≤ sum of costs ≤ 1."""
    count = int(owner.max()) + 1
    floors = np.isfinite(least)
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    relaxed = linprog(
        losses,
        A_ub=np.vstack([costs, -costs[floors]]),
        b_ub=np.concatenate([np.ones(len(costs)), -least[floors]]),
        A_eq=cast(Any, one_each),  # sparse matrices are allowed; the stubs do not know
        b_eq=np.ones(count),
        bounds=(0, 1),
        method="highs",
    )
    if relaxed.x is None:
        return None

    def fits(taken: NDArray[np.int64]) -> bool:
        spent = costs[:, taken].sum(1)
        return bool((spent <= 1 + _TOLERANCE).all() and (spent >= least - _TOLERANCE).all())

    best = _round(relaxed.x, losses, owner, fits)
    left = np.arange(len(owner))
    if best is not None:
        bound = float(losses @ relaxed.x)
        gap = float(losses[best].sum()) - bound
        if gap <= _GAP * max(bound, _TOLERANCE):
            return best
        reduced = losses - one_each.T @ relaxed.eqlin.marginals
        reduced = reduced - np.vstack([costs, -costs[floors]]).T @ relaxed.ineqlin.marginals
        left = np.flatnonzero(reduced <= gap + _TOLERANCE)
        left = np.union1d(left, best)
    with c_stdout_to_stderr():
        exact = milp(
            losses[left],
            integrality=np.ones(len(left), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each[:, left], 1, 1),
                LinearConstraint(costs[:, left], least, 1),
            ],
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
    if exact.x is not None:
        taken = left[np.flatnonzero(exact.x > 0.5)]
        # the solver's tolerance may let a choice through that is slightly too expensive
        better = best is None or losses[taken].sum() < losses[best].sum()
        if len(taken) == count and fits(taken) and better:
            return taken
    return best


def _round(
    relaxed: NDArray[np.float64],
    losses: NDArray[np.float64],
    owner: NDArray[np.int64],
    fits: Callable[[NDArray[np.int64]], bool],
) -> NDArray[np.int64] | None:
    """Best way to round the fractional owners of a relaxed solution, or None."""
    alternatives = [
        np.flatnonzero((owner == group) & (relaxed > _TOLERANCE))
        for group in range(owner.max() + 1)
    ]
    if np.prod([float(len(options)) for options in alternatives]) > 4096:
        return None
    rounded = (np.array(taken) for taken in itertools.product(*alternatives))
    return min(filter(fits, rounded), key=lambda taken: losses[taken].sum(), default=None)


def _pareto(group: Sequence[Choice]) -> list[int]:
    """Indices of the choices that no other beats or equals in loss and in every cost."""
    order = sorted(range(len(group)), key=lambda i: (group[i].loss, group[i].costs))
    kept: list[int] = []
    for index in order:
        costs = group[index].costs
        if not any(
            all(c <= d for c, d in zip(group[other].costs, costs, strict=True)) for other in kept
        ):
            kept.append(index)
    return kept
