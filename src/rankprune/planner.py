"""Choosing layers, schemes and ranks: the only code that does.

`make_plan` surveys the model, lists for every layer the options that its settings allow (dense, or
scheme × rank), drops those that do not pay (the break-even guard), and picks: by a rank rule layer
by layer, or by a budget with one knapsack over all layers. On a runtime, options that are slower
than the dense layer are dropped too, and a budget is proven by measuring the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rankprune.budget import Budget, Option, is_faster, spend, spend_time
from rankprune.calibrate import Stats, check_stats
from rankprune.errors import ConfigError
from rankprune.latency import Clock, LatencyTable, Request
from rankprune.overrides import ExactRank, Override, Settings, resolve
from rankprune.plan import LayerPlan, Plan
from rankprune.profile import ExampleInputs, count_params, profile
from rankprune.ranks import RankRule, Spectrum
from rankprune.runtimes import Runtime
from rankprune.schemes import SCHEMES, Scheme, applicable, check_scheme
from rankprune.survey import Site, survey

# Ranks that a budget considers for one layer and scheme; more only slow the solver down.
_GRID = 64
# why `realise` leaves a layer dense
UNCHOSEN = "not chosen"


def make_plan(
    model: nn.Module,
    rank: RankRule | Budget,
    *,
    scheme: str = "auto",
    overrides: Mapping[str, Override] | None = None,
    example_inputs: ExampleInputs | None = None,
    stats: Stats | None = None,
    guard: bool = True,
    multiple_of: int | None = None,
    runtime: Runtime | LatencyTable | None = None,
) -> Plan:
    """Choose for every layer: dense, or a scheme and a rank.

    Args:
        model: the dense model; it is not changed.
        rank: a rank rule (`Energy`, `Ratio`, …), applied layer by layer, or a `Budget` for the
            whole model.
        scheme: "auto" considers every scheme that fits a layer; "separable" those that make a
            depthwise and a 1×1 convolution of it, which learn much for their FLOPs and are slow in
            torch itself (others where neither fits); a scheme's name only that one for convolutions
            (linear layers always use `linear`).
        overrides: shell-style name patterns ("layer1.*") to a rule, a `LayerConfig`, or None to
            leave dense. Where several match, the last wins.
        example_inputs: what the model is called with. Needed for FLOPs; without it the guard looks
            at parameters only.
        stats: from `calibrate`. Ranks then follow the energy of the layers' outputs on those
            inputs, not that of their weights; give such to `factorize` too. Those with
            `sensitivity` let a budget compare layers by what their errors do to the answers.
        guard: leave layers dense where the chosen rank does not save both parameters and FLOPs.
            False factorises even so (a budget never does).
        multiple_of: ranks are rounded up to a multiple of this; None is 1, or what the runtime's
            kernels take at a time. Separable layers keep theirs, of which a unit has as many
            channels as the layer.
        runtime: where the network is to be fast. Layers are measured there (once: a cache keeps the
            times), and no plan makes a layer slower; under a budget the whole network is measured
            too, and is never slower. A `LatencyTable` shows progress and chooses the cache.

    Returns:
        A plan with an entry for every layer that has a matrix-like parameter.

    Raises:
        ConfigError: unknown scheme, a pattern that matches nothing, no layer to factorise.
        BudgetError: the budget cannot be met; the message and `.closest` say what can.
        NumericsError: a weight holds NaN or infinity.
        MissingExtraError: the runtime's backend is not installed.

    Example:
        >>> import torch
        >>> from rankprune import Energy
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        >>> plan = make_plan(model, Energy(0.5), example_inputs=torch.zeros(1, 64))
        >>> [layer.scheme for layer in plan.layers]
        ['linear', None]
    """
    check_scheme(scheme)
    if not isinstance(rank, (RankRule, Budget)):
        raise ConfigError(f"rank must be a rank rule or a Budget, got {rank!r}")
    table = as_table(runtime)
    step = multiple(multiple_of, table)
    budget = rank if isinstance(rank, Budget) else None
    if budget is not None and budget.timed and table is None:
        raise ConfigError("a latency budget needs runtime=Runtime(…), to measure on")
    check_inputs(rank, table, example_inputs)
    cost = None if example_inputs is None else profile(model, example_inputs)
    sites = survey(model, cost, check_stats(model, stats).moments)
    settings = resolve(sites, rank, scheme, overrides or {})
    sites = _comparable(sites, settings)
    if not any(not site.obstacle for site in sites):
        raise ConfigError(
            "the model has no layer that can be factorised: "
            + ("; ".join(f"{site.name}: {site.obstacle}" for site in sites[:5]) or "no weights")
        )
    groups = [_options(site, settings[site.name], guard=guard, multiple_of=step) for site in sites]
    dense_params = cost.params if cost else count_params(model)
    dense_flops = cost.flops if cost else None
    if table:
        groups = _timed(sites, groups, table, guard=guard)
    dense: dict[str, float] = {"params": dense_params, "flops": dense_flops or 0}
    metadata: dict[str, Any] = {}
    if budget is None:
        chosen = [group[0] for group in groups]
    elif table:
        assert example_inputs is not None
        clock = Clock(model, example_inputs, table.runtime)
        chosen = spend_time(groups, budget, dense, clock)
        metadata["latency"] = clock.result()
    else:
        chosen = spend(groups, budget, dense)
    return Plan(
        layers=tuple(option.layer for option in chosen),
        dense_params=dense_params,
        dense_flops=dense_flops,
        metadata=metadata,
    )


def check_inputs(
    rank: RankRule | Budget, table: LatencyTable | None, example_inputs: ExampleInputs | None
) -> None:
    """Refuse to count FLOPs, or to measure, without inputs.

    Raises:
        ConfigError: they are needed, and not given.
    """
    counted = table is not None or (isinstance(rank, Budget) and rank.flops is not None)
    if counted and example_inputs is None:
        what = "a runtime" if table else "a FLOPs budget"
        raise ConfigError(f"{what} needs example_inputs, to see the shapes that layers really get")


def _comparable(sites: list[Site], settings: Mapping[str, Settings]) -> list[Site]:
    """A budget cannot weigh layers by sensitivity against others of unknown sensitivity."""
    if not any(site.moment and site.moment.weighted for site in sites):
        return sites
    unknown = "its sensitivity was not measured"
    return [
        replace(site, obstacle=unknown)
        if isinstance(settings[site.name].rank, Budget) and not (site.moment or site.obstacle)
        else site
        for site in sites
    ]


def as_table(runtime: Runtime | LatencyTable | None) -> LatencyTable | None:
    """The table that measures on a runtime."""
    if runtime is None or isinstance(runtime, LatencyTable):
        return runtime
    if isinstance(runtime, Runtime):
        return LatencyTable(runtime)
    raise ConfigError(f"runtime must be a Runtime or a LatencyTable, got {runtime!r}")


def multiple(multiple_of: int | None, table: LatencyTable | None) -> int:
    """What ranks are rounded up to a multiple of.

    Raises:
        ConfigError: it is given, and no whole number ≥ 1.
    """
    if multiple_of is None:
        return table.runtime.rank_multiple() if table else 1
    if type(multiple_of) is not int or multiple_of < 1:
        raise ConfigError(f"multiple_of={multiple_of!r}: a whole number ≥ 1")
    return multiple_of


def rank_rules(
    model: nn.Module, rule: RankRule, *, overrides: Mapping[str, Override] | None = None
) -> dict[str, RankRule]:
    """The rule of every layer that is not left dense by an override, by name."""
    settings = resolve(survey(model), rule, "auto", overrides or {})
    return {name: own.rank for name, own in settings.items() if isinstance(own.rank, RankRule)}


def realise(
    model: nn.Module,
    ranks: Mapping[str, tuple[str, int, str]],
    *,
    example_inputs: ExampleInputs | None = None,
    energies: Mapping[str, float] | None = None,
    guard: bool = True,
    table: LatencyTable | None = None,
) -> Plan:
    """A plan with exactly these schemes and ranks, under the break-even guard.

    Args:
        model: the dense model.
        ranks: scheme, rank and reason, by layer name; other layers stay dense.
        example_inputs: to count FLOPs, as in `make_plan`.
        energies: share of energy kept, where it was measured before a projection.
        guard: as in `make_plan`.
        table: to tell what the layers and the network take; it changes nothing else.
    """
    cost = None if example_inputs is None else profile(model, example_inputs)
    layers = []
    sites = survey(model, cost)
    for site in sites:
        layer = _dense(site, site.obstacle or UNCHOSEN)
        if site.name in ranks and not site.obstacle:
            name, rank, reason = ranks[site.name]
            option = _LayerOption(site, SCHEMES[name])
            layer = option.at(rank, reason, (energies or {}).get(site.name))
            if guard:
                layer = option.guarded(layer)
        layers.append(layer)
    metadata: dict[str, Any] = {}
    if table is not None and example_inputs is not None:
        groups = _timed(sites, [[Option(layer, 0.0)] for layer in layers], table, guard=False)
        layers = [group[0].layer for group in groups]
        clock = Clock(model, example_inputs, table.runtime)
        clock.measure(layers)
        metadata["latency"] = clock.result()
    return Plan(
        layers=tuple(layers),
        dense_params=cost.params if cost else count_params(model),
        dense_flops=cost.flops if cost else None,
        metadata=metadata,
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


def _options(site: Site, wanted: Settings, *, guard: bool, multiple_of: int) -> list[Option]:
    """What can be done to a layer: one option under a rule, several under a budget."""
    if wanted.rank is None:
        return [Option(_dense(site, "left dense by an override"), 0.0)]
    if site.obstacle:
        return [Option(_dense(site, site.obstacle), 0.0)]
    assert site.spec is not None
    schemes, refusal = applicable(site.spec, wanted.scheme)
    if isinstance(wanted.rank, ExactRank):
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


def wanted_rank(rule: RankRule, spectrum: Spectrum, scheme: Scheme, multiple_of: int) -> int:
    """What a rule selects, rounded up to a multiple where it is not exact; at most the largest."""
    step = 1 if isinstance(rule, ExactRank) else scheme.rank_step(multiple_of)
    return min(math.ceil(rule.select(spectrum) / step) * step, spectrum.shape.max_rank)


def _by_rule(
    options: Sequence[_LayerOption], rule: RankRule, *, guard: bool, multiple_of: int
) -> Option:
    """The scheme that is cheapest at the rank that the rule wants."""
    layers = []
    for option in options:
        spectrum, kept, _ = option.site.assess(option.scheme)
        rank = wanted_rank(rule, spectrum, option.scheme, multiple_of)
        layers.append((option, option.at(rank, str(rule), float(kept[rank - 1]))))
    option, best = min(layers, key=lambda pair: (pair[1].flops or 0, pair[1].params))
    return Option(option.guarded(best) if guard else best, 0.0)


def _grid(option: _LayerOption, multiple_of: int) -> Iterator[Option]:
    """The ranks below break-even that a budget chooses from, at most `_GRID` of them."""
    last = min(option.break_even() - 1, option.max_rank)
    step = option.scheme.rank_step(multiple_of)
    ranks = list(range(step, last + 1, step))
    if not ranks:
        return
    _, energy, worth = option.site.assess(option.scheme)
    stride = math.ceil(len(ranks) / _GRID)
    # the smallest too, or a small budget might not be met
    for rank in sorted({ranks[0], *ranks[stride - 1 :: stride]}):
        kept = float(energy[rank - 1])
        yield Option(option.at(rank, "budget", kept), worth * (1 - kept))


def _timed(
    sites: Sequence[Site],
    groups: Sequence[Sequence[Option]],
    table: LatencyTable,
    *,
    guard: bool,
) -> list[list[Option]]:
    """The options with their times; under the guard without those that are not faster."""
    requests = []
    for site, group in zip(sites, groups, strict=True):
        ranks: dict[str, list[int]] = {}
        for option in group:
            if option.layer.scheme is not None and option.layer.rank is not None:
                ranks.setdefault(option.layer.scheme, []).append(option.layer.rank)
        if ranks:
            assert site.spec is not None
            few = {scheme: table.sample(sorted(values)) for scheme, values in ranks.items()}
            requests += [Request(site.spec, shape, few) for shape in site.input_shapes]
    table.measure(requests)
    timed = [
        [_with_times(site, option, table) for option in group]
        for site, group in zip(sites, groups, strict=True)
    ]
    return [_faster(group) for group in timed] if guard else timed


def _with_times(site: Site, option: Option, table: LatencyTable) -> Option:
    layer, shapes = option.layer, site.input_shapes
    if site.spec is None or not table.knows(site.spec, shapes):
        return option
    dense = table.dense(site.spec, shapes)
    own = dense
    if layer.scheme is not None and layer.rank is not None:
        own = table.factorized(site.spec, layer.scheme, layer.rank, shapes)
    return replace(option, layer=replace(layer, dense_latency_ms=dense, latency_ms=own))


def _faster(options: list[Option]) -> list[Option]:
    """Those that are faster than the dense layer, or the dense layer and why."""
    kept = [option for option in options if option.layer.dense or is_faster(option.layer)]
    slower = [option.layer for option in options if option not in kept]
    if not slower or any(not option.layer.dense for option in kept):
        return kept
    best = min(slower, key=lambda layer: layer.latency_ms or 0)
    reason = f"nothing is faster: {best.scheme} at rank {best.rank} takes {best.latency_ms:.3g} ms"
    return [Option(best.left_dense(f"{reason}, dense {best.dense_latency_ms:.3g} ms"), 0.0)]
