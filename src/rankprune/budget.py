"""Budgets: upper bounds on what the compact network costs, and the options that keep to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from rankprune.errors import BudgetError, ConfigError
from rankprune.knapsack import Choice, solve
from rankprune.latency import Clock
from rankprune.plan import LayerPlan

# How often a plan is measured and corrected, and how far below its bound a measurement may stay
# before the bound counts as not used.
_ROUNDS = 5
_UNUSED = 0.06
# What the solver aims at, so that a measurement's noise does not break the budget.
_AIM = 0.98
# Where layers gain and the network does not, a layer must gain so much more.
_STRICTER = 0.85


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on the compact model's cost; any that are given hold together.

    Attributes:
        flops: fraction of the dense FLOPs, 0 < flops ≤ 1; needs example inputs.
        params: fraction of the dense parameters, 0 < params ≤ 1.
        latency: fraction of the dense network's time on a runtime, 0 < latency ≤ 1; needs example
            inputs, at the batch that counts, and a `Runtime`.
        latency_ms: the same as milliseconds.
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.bounds().items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            most = math.inf if name == "latency_ms" else 1
            if not (number and 0 < value <= most and math.isfinite(value)):
                wanted = "milliseconds, greater than 0"
                if most == 1:
                    wanted = "a fraction of the dense model, greater than 0 and at most 1"
                raise ConfigError(f"Budget({name}={value!r}): {wanted}")
        if not self.bounds():
            raise ConfigError(
                "Budget(): give at least one of flops=…, params=…, latency=…, latency_ms=…"
            )
        if self.latency is not None and self.latency_ms is not None:
            raise ConfigError("Budget: give latency as a fraction or in milliseconds, not both")

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by quantity."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def timed(self) -> bool:
        """Whether it bounds the time."""
        return self.latency is not None or self.latency_ms is not None

    def eased(self, left: float) -> Budget:
        """A looser budget on the way to this one; `left` of the way, 0 to below 1, is to come."""
        eased = {
            name: value / (1 - left) if name == "latency_ms" else value + (1 - value) * left
            for name, value in self.bounds().items()
        }
        return Budget(**eased)


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer."""

    layer: LayerPlan
    loss: float


def spend(
    groups: Sequence[Sequence[Option]],
    budget: Budget,
    dense: Mapping[str, float],
    gain: float = 1.0,
) -> list[Option]:
    """Least total loss within the budget, which is used to within a hundredth where it can be.

    Args:
        groups: the options of each layer.
        budget: the bounds; `latency_ms` only as `latency`.
        dense: what the whole dense model costs, by quantity: "flops", "params", "latency".
        gain: milliseconds that the network saves for each that its layers save alone.

    Raises:
        BudgetError: no choice of options keeps to the budget.
    """
    bounds, closest, limits = budget.bounds(), {}, []
    for quantity, fraction in bounds.items():
        worth = gain if quantity == "latency" else 1.0
        total = dense[quantity]
        most = sum(max(_saved(option, quantity) for option in group) for group in groups)
        closest[quantity] = 1 - worth * most / total if total else 1.0
        # the rest of the model has no choice: what it costs is taken off the limit
        listed = sum(_cost(group[0], quantity) + _saved(group[0], quantity) for group in groups)
        limit = listed - (total - fraction * total) / worth
        limits.append(limit if quantity == "latency" else math.floor(limit))
    picked = None
    if all(limit > 0 for limit in limits):
        table = [
            [Choice(o.loss, tuple(_cost(o, quantity) for quantity in bounds)) for o in group]
            for group in groups
        ]
        picked = solve(table, limits)
    if picked is None:
        wanted = ", ".join(f"{quantity}={fraction:g}" for quantity, fraction in bounds.items())
        reachable = ", ".join(f"{quantity}={value:.4f}" for quantity, value in closest.items())
        raise BudgetError(
            f"budget {wanted} cannot be met: the closest that these layers and schemes reach is "
            f"{reachable}; raise the budget, allow more layers or schemes, or lower multiple_of",
            closest,
        )
    return [group[index] for group, index in zip(groups, picked, strict=True)]


def spend_time(
    groups: Sequence[Sequence[Option]],
    budget: Budget,
    dense: Mapping[str, float],
    clock: Clock,
) -> list[Option]:
    """Least total loss within a budget, proven by measuring the whole network.

    A choice is made by the layers' own times, then built and measured; what it saves, against what
    its layers save alone, corrects the next choice. A choice that makes the network slower is never
    returned, whatever the budget bounds.

    Args:
        groups: the options of each layer.
        budget: the bounds.
        dense: what the whole dense model costs, "flops" and "params".
        clock: of the network.

    Raises:
        BudgetError: no choice keeps to the budget.
    """
    gain, margin, fastest = 1.0, 1.0, math.inf
    best: tuple[float, list[Option], tuple[float, float]] | None = None
    refusal: BudgetError | None = None
    for attempt in range(_ROUNDS):
        bound, now = _relative(budget, clock.dense_ms)
        aim = replace(now, latency=bound * _AIM) if bound < 1 else now
        # a layer that has no choice stays as it is, whatever it takes
        faster = [[o for o in group if is_faster(o.layer, margin)] or group for group in groups]
        kept = True
        try:
            chosen = spend(faster, aim, {**dense, "latency": clock.dense_ms}, gain)
        except BudgetError as error:
            refusal = error
            if attempt or bound == 1:
                break
            # layers alone may promise too little: see what the fastest network really takes
            chosen = [min(group, key=lambda o: _cost(o, "latency")) for group in faster]
            kept = _keeps(chosen, now, dense)
        clock.measure([option.layer for option in chosen])
        bound, _ = _relative(budget, clock.dense_ms)
        fraction = clock.compact_ms / clock.dense_ms
        fastest = min(fastest, fraction if kept else math.inf)
        loss = sum(option.loss for option in chosen)
        if kept and fraction <= bound and (best is None or loss < best[0]):
            best = loss, chosen, (clock.dense_ms, clock.compact_ms)
        used = bound == 1 or fraction >= bound * (1 - _UNUSED)
        if kept and fraction <= bound and used:
            break
        alone = sum(_saved(option, "latency") for option in chosen)
        if not alone:
            break
        if bound < 1:
            gain = max((clock.dense_ms - clock.compact_ms) / alone, 0.01)
        else:
            margin *= _STRICTER
    if best is not None:
        clock.dense_ms, clock.compact_ms = best[2]
        return best[1]
    if refusal is not None and fastest == math.inf:
        raise refusal
    raise BudgetError(
        f"no plan that was measured keeps to latency={bound:.3g}: the fastest takes "
        f"{fastest:.4g} of the dense network's time on {clock.runtime.backend}",
        {"latency": fastest},
    )


def _keeps(chosen: Sequence[Option], budget: Budget, dense: Mapping[str, float]) -> bool:
    """Whether a choice keeps to all bounds but those on time."""
    return all(
        dense[quantity] - sum(_saved(option, quantity) for option in chosen)
        <= fraction * dense[quantity]
        for quantity, fraction in budget.bounds().items()
        if quantity in dense
    )


def _relative(budget: Budget, dense_ms: float) -> tuple[float, Budget]:
    """The bound on time as a fraction, 1 where there is none, and the budget in fractions."""
    if budget.latency_ms is None:
        return budget.latency or 1.0, budget
    bound = min(budget.latency_ms / dense_ms, 1.0)
    return bound, replace(budget, latency=bound, latency_ms=None)


def is_faster(layer: LayerPlan, margin: float = 1.0) -> bool:
    """Whether a layer takes less than this share of its dense self's time; untimed ones do."""
    if layer.dense or layer.latency_ms is None or layer.dense_latency_ms is None:
        return True
    return layer.latency_ms < margin * layer.dense_latency_ms


_ATTRIBUTES = {
    "flops": ("dense_flops", "flops"),
    "params": ("dense_params", "params"),
    "latency": ("dense_latency_ms", "latency_ms"),
}


def _cost(option: Option, quantity: str) -> float:
    return float(getattr(option.layer, _ATTRIBUTES[quantity][1]) or 0)


def _saved(option: Option, quantity: str) -> float:
    before = getattr(option.layer, _ATTRIBUTES[quantity][0]) or 0
    return float(before) - _cost(option, quantity)
