"""Choosing layers, schemes and ranks: the only code that does.

`make_plan` surveys the model, lists for every layer the options that its settings allow (dense, or
scheme × rank), drops those that do not pay (the break-even guard), and picks: by a rank rule layer
by layer, or by a budget with one knapsack over all layers.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from rankprune.errors import BudgetError, ConfigError, near
from rankprune.knapsack import Choice, solve
from rankprune.plan import LayerPlan, Plan
from rankprune.profile import ExampleInputs, count_params, profile
from rankprune.ranks import FixedRank, RankRule, Spectrum
from rankprune.schemes import SCHEMES, Scheme, applicable, get_scheme
from rankprune.survey import Site, survey

# Ranks that a budget considers for one layer and scheme; more only slow the solver down.
_GRID = 64


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper bounds on the compact model's cost, as fractions of the dense model's.

    Attributes:
        flops: fraction of the dense FLOPs, 0 < flops ≤ 1; needs example inputs.
        params: fraction of the dense parameters, 0 < params ≤ 1.
    """

    flops: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= 1):
                raise ConfigError(
                    f"Budget({item.name}={value!r}): a fraction of the dense model, "
                    "greater than 0 and at most 1"
                )
        if not self.bounds():
            raise ConfigError("Budget(): give at least one of flops=…, params=…")

    def bounds(self) -> dict[str, float]:
        """The fractions that are set, by quantity."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Settings for the layers that a pattern matches.

    Attributes:
        rank: an exact rank or a rule; None takes the plan's own rule or budget.
        scheme: a scheme's name or "auto"; None takes the plan's own.
    """

    rank: int | RankRule | None = None
    scheme: str | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not (self.rank is None or isinstance(self.rank, RankRule) or whole):
            raise ConfigError(
                f"LayerConfig(rank={self.rank!r}): a whole number ≥ 1, a rank rule or None"
            )


Override = RankRule | LayerConfig | None


class _ExactRank(FixedRank):
    """A rank that a layer must be able to have."""


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer."""

    layer: LayerPlan
    loss: float


@dataclass(frozen=True)
class _Settings:
    """What one layer is to get, after overrides."""

    rank: RankRule | Budget | None  # None: leave dense
    scheme: str
    overridden: bool


def make_plan(
    model: nn.Module,
    rank: RankRule | Budget,
    *,
    scheme: str = "auto",
    overrides: Mapping[str, Override] | None = None,
    example_inputs: ExampleInputs | None = None,
    guard: bool = True,
    multiple_of: int = 1,
) -> Plan:
    """Choose for every layer: dense, or a scheme and a rank.

    Args:
        model: the dense model; it is not changed.
        rank: a rank rule (`Energy`, `Ratio`, …), applied layer by layer, or a `Budget` for the
            whole model.
        scheme: "auto" considers every scheme that fits a layer; a scheme's name only that one for
            convolutions (linear layers always use `linear`).
        overrides: shell-style name patterns ("layer1.*") to a rule, a `LayerConfig`, or None to
            leave dense. Where several match, the last wins.
        example_inputs: what the model is called with. Needed for FLOPs; without it the guard looks
            at parameters only.
        guard: leave layers dense where the chosen rank does not save both parameters and FLOPs.
            False factorises even so (a budget never does).
        multiple_of: ranks are rounded up to a multiple of this.

    Returns:
        A plan with an entry for every layer that has a matrix-like parameter.

    Raises:
        ConfigError: unknown scheme, a pattern that matches nothing, no layer to factorise.
        BudgetError: the budget cannot be met; the message and `.closest` say what can.
        NumericsError: a weight holds NaN or infinity.

    Example:
        >>> import torch
        >>> from rankprune import Energy
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        >>> plan = make_plan(model, Energy(0.5), example_inputs=torch.zeros(1, 64))
        >>> [layer.scheme for layer in plan.layers]
        ['linear', None]
    """
    if scheme != "auto":
        get_scheme(scheme)
    if not isinstance(rank, (RankRule, Budget)):
        raise ConfigError(f"rank must be a rank rule or a Budget, got {rank!r}")
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ConfigError(f"multiple_of={multiple_of!r}: a whole number ≥ 1")
    budget = rank if isinstance(rank, Budget) else None
    if budget is not None and budget.flops is not None and example_inputs is None:
        raise ConfigError("a FLOPs budget needs example_inputs, to count FLOPs on real shapes")
    cost = None if example_inputs is None else profile(model, example_inputs)
    sites = survey(model, cost)
    if not any(not site.obstacle for site in sites):
        raise ConfigError(
            "the model has no layer that can be factorised: "
            + ("; ".join(f"{site.name}: {site.obstacle}" for site in sites[:5]) or "no weights")
        )
    settings = _resolve(sites, rank, scheme, overrides or {})
    groups = [
        _options(site, settings[site.name], guard=guard, multiple_of=multiple_of) for site in sites
    ]
    dense_params = cost.params if cost else count_params(model)
    dense_flops = cost.flops if cost else None
    if budget is None:
        chosen = [group[0] for group in groups]
    else:
        chosen = _within(groups, budget, {"params": dense_params, "flops": dense_flops or 0})
    return Plan(
        layers=tuple(option.layer for option in chosen),
        dense_params=dense_params,
        dense_flops=dense_flops,
    )


def rank_rules(
    model: nn.Module, rule: RankRule, *, overrides: Mapping[str, Override] | None = None
) -> dict[str, RankRule]:
    """The rule of every layer that is not left dense by an override, by name."""
    settings = _resolve(survey(model), rule, "auto", overrides or {})
    return {name: own.rank for name, own in settings.items() if isinstance(own.rank, RankRule)}


def realise(
    model: nn.Module,
    ranks: Mapping[str, tuple[str, int, str]],
    *,
    example_inputs: ExampleInputs | None = None,
    energies: Mapping[str, float] | None = None,
    guard: bool = True,
) -> Plan:
    """A plan with exactly these schemes and ranks, under the break-even guard.

    Args:
        model: the dense model.
        ranks: scheme, rank and reason, by layer name; other layers stay dense.
        example_inputs: to count FLOPs, as in `make_plan`.
        energies: share of energy kept, where it was measured before a projection.
        guard: as in `make_plan`.
    """
    cost = None if example_inputs is None else profile(model, example_inputs)
    layers = []
    for site in survey(model, cost):
        layer = _dense(site, site.obstacle or "not chosen")
        if site.name in ranks and not site.obstacle:
            name, rank, reason = ranks[site.name]
            option = _LayerOption(site, SCHEMES[name])
            layer = option.at(rank, reason, (energies or {}).get(site.name))
            if guard:
                layer = option.guarded(layer)
        layers.append(layer)
    return Plan(
        layers=tuple(layers),
        dense_params=cost.params if cost else count_params(model),
        dense_flops=cost.flops if cost else None,
    )


class _LayerOption:
    """A layer under one scheme: what every rank costs, and from which rank on it does not pay."""

    def __init__(self, site: Site, scheme: Scheme) -> None:
        assert site.spec is not None
        self.site = site
        self.scheme = scheme
        self.unit_params = scheme.unit_params(site.spec)
        self.unit_flops = site.unit_flops(scheme)
        self.max_rank = scheme.matrix_shape(site.spec).max_rank

    def break_even(self) -> int:
        """Smallest rank that saves nothing, in parameters or in FLOPs."""
        assert self.site.spec is not None
        limits = [math.ceil(self.site.spec.weight_numel / self.unit_params)]
        if self.unit_flops and self.site.dense_flops is not None:
            limits.append(math.ceil(self.site.dense_flops / self.unit_flops))
        return min(limits)

    def at(self, rank: int, reason: str, energy: float | None) -> LayerPlan:
        site = self.site
        return LayerPlan(
            name=site.name,
            type=type(site.module).__name__,
            spec=site.spec,
            scheme=self.scheme.name,
            rank=rank,
            reason=reason,
            energy=energy,
            dense_params=site.dense_params,
            dense_flops=site.dense_flops,
            params=site.bias_params() + rank * self.unit_params,
            flops=None if self.unit_flops is None else rank * self.unit_flops,
            tied=site.tied,
        )

    def guarded(self, layer: LayerPlan) -> LayerPlan:
        assert layer.rank is not None
        limit = self.break_even()
        if layer.rank < limit:
            return layer
        return layer.left_dense(
            f"{self.scheme.name} at rank {layer.rank} does not pay (break-even {limit})"
        )


def _dense(site: Site, reason: str) -> LayerPlan:
    return LayerPlan(
        name=site.name,
        type=type(site.module).__name__,
        spec=site.spec,
        reason=reason,
        dense_params=site.dense_params,
        dense_flops=site.dense_flops,
        params=site.dense_params,
        flops=site.dense_flops,
        tied=site.tied,
    )


def _resolve(
    sites: Sequence[Site],
    rank: RankRule | Budget,
    scheme: str,
    overrides: Mapping[str, Override],
) -> dict[str, _Settings]:
    """Apply overrides by name; a pattern that matches nothing is an error."""
    settings = {site.name: _Settings(rank, scheme, False) for site in sites}
    for pattern, override in overrides.items():
        names = [
            site.name
            for site in sites
            if any(fnmatch.fnmatchcase(name, pattern) for name in (site.name, *site.tied))
        ]
        if not names:
            raise ConfigError(f"pattern {pattern!r} matches no layer; {near(pattern, settings)}")
        for name in names:
            settings[name] = _overridden(override, pattern, rank, scheme)
    return settings


def _overridden(
    override: Override, pattern: str, rank: RankRule | Budget, scheme: str
) -> _Settings:
    if override is None:
        return _Settings(None, scheme, True)
    if isinstance(override, RankRule):
        return _Settings(override, scheme, True)
    if isinstance(override, LayerConfig):
        if override.scheme not in (None, "auto"):
            get_scheme(str(override.scheme))
        own = _ExactRank(override.rank) if isinstance(override.rank, int) else override.rank
        return _Settings(own or rank, override.scheme or scheme, True)
    raise ConfigError(
        f"override for {pattern!r} must be a rank rule, a LayerConfig or None, got {override!r}"
    )


def _options(site: Site, wanted: _Settings, *, guard: bool, multiple_of: int) -> list[Option]:
    """What can be done to a layer: one option under a rule, several under a budget."""
    if wanted.rank is None:
        return [Option(_dense(site, "left dense by an override"), 0.0)]
    if site.obstacle:
        if wanted.overridden and site.spec is None:
            raise ConfigError(f"layer {site.name!r} cannot be factorised: {site.obstacle}")
        return [Option(_dense(site, site.obstacle), 0.0)]
    assert site.spec is not None
    schemes, refusal = applicable(site.spec, wanted.scheme)
    if isinstance(wanted.rank, _ExactRank):
        rank = wanted.rank.rank
        shapes = [scheme.matrix_shape(site.spec) for scheme in schemes]
        largest = max((shape.max_rank for shape in shapes), default=0)
        if rank > largest:
            raise ConfigError(
                f"layer {site.name!r}: rank {rank} exceeds the largest possible, "
                f"{largest}" + (f" ({refusal})" if refusal else "")
            )
        # a scheme with a smaller largest rank would quietly give another one than asked for
        schemes = [s for s, own in zip(schemes, shapes, strict=True) if own.max_rank >= rank]
    if not schemes:
        return [Option(_dense(site, refusal), 0.0)]
    options = [_LayerOption(site, scheme) for scheme in schemes]
    if isinstance(wanted.rank, Budget):
        return [
            Option(_dense(site, "the budget is better spent elsewhere"), 0.0),
            *(choice for option in options for choice in _grid(option, multiple_of)),
        ]
    return [_by_rule(options, wanted.rank, guard=guard, multiple_of=multiple_of)]


def _energy(spectrum: Spectrum, rank: int) -> float:
    return float(spectrum.energy()[rank - 1])


def round_rank(rank: int, multiple_of: int, max_rank: int) -> int:
    """Round up to a multiple, at most the largest rank."""
    return min(math.ceil(rank / multiple_of) * multiple_of, max_rank)


def _by_rule(
    options: Sequence[_LayerOption], rule: RankRule, *, guard: bool, multiple_of: int
) -> Option:
    """The scheme that is cheapest at the rank that the rule wants."""
    layers = []
    for option in options:
        spectrum = option.site.spectrum(option.scheme)
        rank = round_rank(rule.select(spectrum), multiple_of, option.max_rank)
        layers.append((option, option.at(rank, str(rule), _energy(spectrum, rank))))
    option, best = min(layers, key=lambda pair: (pair[1].flops or 0, pair[1].params))
    return Option(option.guarded(best) if guard else best, 0.0)


def _grid(option: _LayerOption, multiple_of: int) -> Iterator[Option]:
    """The ranks below break-even that a budget chooses from, at most `_GRID` of them."""
    last = min(option.break_even() - 1, option.max_rank)
    ranks = list(range(multiple_of, last + 1, multiple_of))
    if not ranks:
        return
    spectrum = option.site.spectrum(option.scheme)
    energy = spectrum.energy()
    stride = math.ceil(len(ranks) / _GRID)
    for rank in ranks[stride - 1 :: stride] if stride > 1 else ranks:
        kept = float(energy[rank - 1])
        yield Option(option.at(rank, "budget", kept), 1 - kept)


def _within(
    groups: Sequence[Sequence[Option]], budget: Budget, dense: Mapping[str, int]
) -> list[Option]:
    """Least total loss within the budget."""
    bounds = budget.bounds()

    def saved(option: Option, quantity: str) -> int:
        before = getattr(option.layer, f"dense_{quantity}") or 0
        return before - (getattr(option.layer, quantity) or 0)

    closest = {}
    for quantity in bounds:
        most = sum(max(saved(option, quantity) for option in group) for group in groups)
        closest[quantity] = (dense[quantity] - most) / dense[quantity] if dense[quantity] else 1.0
    # the layers' own cost, with the rest of the model as one group that has no choice
    limits = []
    for quantity, fraction in bounds.items():
        listed = sum(getattr(group[0].layer, f"dense_{quantity}") or 0 for group in groups)
        rest = dense[quantity] - listed
        limits.append(math.floor(fraction * dense[quantity]) - rest)
    picked = None
    if all(limit > 0 for limit in limits):
        table = [
            [
                Choice(
                    option.loss,
                    tuple(float(getattr(option.layer, quantity) or 0) for quantity in bounds),
                )
                for option in group
            ]
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
