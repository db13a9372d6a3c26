"""Trained Rank Pruning: project, regularise, finish.

The controller knows no framework. It has two verbs, `project` and `regularise`, and counts
optimizer steps:

    before step t's forward     project, where t is due (t % every == 0 between start and end)
    gradients of step t ready   regularise: gradient += λ U Vᵀ
    after step t                count it, shrink (decoupled mode), project for step t + 1

Source: Xu et al. 2019, arXiv 1910.04576, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankprune import replay
from rankprune.budget import Budget
from rankprune.distributed import Team
from rankprune.engine import Job
from rankprune.errors import ConfigError
from rankprune.factorize import check_plan
from rankprune.layers import LayerSpec
from rankprune.options import TRP
from rankprune.plan import LayerPlan, Plan
from rankprune.planner import (
    as_table,
    check_inputs,
    make_plan,
    multiple,
    rank_rules,
    realise,
    wanted_rank,
)
from rankprune.profile import ExampleInputs, profile
from rankprune.ranks import RankRule, Spectrum
from rankprune.schemes import SCHEMES, get_scheme
from rankprune.sharded import full_tensor, local_part, reshard
from rankprune.targets import Target, carry_out, check_weights

# How often a descending budget is spent anew as the spectra move.
REPLANS = 8


class Controller:
    """Trained Rank Pruning of one model, counted in optimizer steps.

    Frameworks call, for every optimizer step: `before_step`, `regularise`, `after_step`. With
    `attach` that happens by itself.

    Attributes:
        options: the `TRP` options.
        step: number of optimizer steps done.

    Args:
        model: the dense model; wrappers (DDP, torch.compile) are looked through.
        options: what to do.
        example_inputs: what the model is called with, to count FLOPs; needed for a FLOPs budget.
        process_group: the processes that train this model together, where the model does not tell
            (it does when it is wrapped by DistributedDataParallel or sharded by `fully_shard`).
            Each then decomposes a part of the matrices.
        state: of another controller, to go on from; a budget is then not planned, nor measured,
            anew.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TRP,
        *,
        example_inputs: ExampleInputs | None = None,
        process_group: Any = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        reshard(model)
        self.team = Team.of(model, process_group)
        self.model = unwrap(model)
        self.options = options
        self.example_inputs = example_inputs
        self.step = 0
        self._table = as_table(options.runtime)
        if self._table is not None and self.team.size > 1:
            raise ConfigError(
                "TRP(runtime=…) measures in one process only, and this model is trained in "
                f"{self.team.size}: make the plan beforehand, TRP(plan=make_plan(…, runtime=…))"
            )
        self._multiple = multiple(options.multiple_of, self._table)
        self._handles: list[Any] = []
        self._finished: Plan | None = None
        self._replans = 0
        self._targets: list[Target] = []
        self._rules: dict[str, RankRule] = {}
        if isinstance(options.rank, RankRule):
            self._rules = rank_rules(self.model, options.rank, overrides=options.overrides)
        if state is None or not isinstance(options.rank, Budget):
            self._adopt(self._first_plan())
        else:
            check_inputs(options.rank, self._table, example_inputs)
        if state is not None:
            self.load_state_dict(state)

    # -- the two verbs ---------------------------------------------------------------------------

    def before_step(self) -> None:
        """Project where the coming step is due. Call before its first forward pass."""
        if self._active() and (self.step - self.options.start) % self.options.every == 0:
            self._replan()
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Replace every layer's weight by its low-rank approximation, in place.

        Raises:
            NumericsError: a weight holds NaN or infinity; the message names the layer, and no
                layer has been changed.
        """
        reshard(self.model)
        check_weights(self._targets, self.team)
        jobs = [self._job(target) for target in self._targets]
        for target, done in carry_out(self._targets, jobs, self.team):
            target.apply(done)

    @torch.no_grad()
    def regularise(self, scale: float | Tensor = 1.0) -> None:
        """Add λ U Vᵀ to the gradients, where this step is to be regularised.

        Args:
            scale: factor by which the gradients are still scaled (a GradScaler's, where it leaves
                the unscaling to the optimizer).
        """
        if self.options.nuclear_mode != "gradient":
            return
        gradients, polars = [], []
        for target, polar in self._polars():
            gradient = target.weight.grad
            if gradient is not None:
                gradients.append(local_part(gradient))
                polars.append(local_part(polar))
        if gradients:  # in one call, and a GPU's scale is waited for once
            torch._foreach_add_(gradients, polars, alpha=self.options.nuclear * float(scale))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step that the optimizer has really done.

        Args:
            optimizer: for the learning rates of the decoupled mode.
        """
        if self.options.nuclear_mode == "decoupled":
            rates = _learning_rates(optimizer) if optimizer is not None else {}
            for target, polar in self._polars():
                weight = target.weight
                rate = rates.get(id(weight), 0.0) if weight.requires_grad else 0.0
                weight.sub_((rate * self.options.nuclear * polar).to(weight.dtype))
        for target in self._targets:
            target.polar = None
        self.step += 1

    # -- the end ---------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> Plan:
        """Project a last time, take the hooks off, and return the realised plan.

        `factorize(model, plan)` then computes what the model computes, up to rounding. Layers in
        which the realised rank does not pay stay as they were trained.

        Returns:
            The plan; calling again returns the same one.
        """
        if self._finished is not None:
            return self._finished
        options = self.options
        reshard(self.model)  # a forward pass may have come since the last step
        check_weights(self._targets, self.team)
        if isinstance(options.rank, Budget) and self._replans < REPLANS and options.descent:
            self._adopt(self._plan_for(options.rank))
        before = {target.name: local_part(target.weight).clone() for target in self._targets}
        jobs = [self._job(target, final=True) for target in self._targets]
        for target, done in carry_out(self._targets, jobs, self.team):
            target.apply(done)
        plan = realise(
            self.model,
            {t.name: (t.scheme.name, t.rank, _reason(options)) for t in self._targets},
            example_inputs=self.example_inputs,
            energies=self.energies,
            guard=options.guard,
            table=self._table,
        )
        for target in self._targets:
            if plan[target.name].rank is None:
                local_part(target.weight).copy_(before[target.name])
        self.detach()
        self._finished = plan
        return plan

    def detach(self) -> None:
        """Take the hooks off the optimizer, without a last projection."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        replay.forget()  # other models' are soon recorded again

    # -- state -----------------------------------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """Rank to which each layer was last projected, or is to be first."""
        return {target.name: target.rank for target in self._targets}

    @property
    def energies(self) -> dict[str, float]:
        """Share of the energy that each layer kept at its last projection."""
        return {t.name: t.energy for t in self._targets if t.energy is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain numbers, strings and tensors.

        All processes must ask for that of a sharded model.
        """
        return {
            "version": 1,
            "step": self.step,
            "replans": self._replans,
            "layers": {
                t.name: {
                    "scheme": t.scheme.name,
                    "rank": t.rank,
                    "energy": t.energy,
                    "polar": None if t.polar is None else full_tensor(t.polar),
                    "start": t.start,
                }
                for t in self._targets
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model's weights are loaded by the caller.

        Raises:
            ConfigError: the state is not one of a controller of this model.
        """
        try:
            version, step, replans = state["version"], state["step"], state["replans"]
            layers = dict(state["layers"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a controller's state: {error!r}") from None
        if version != 1:
            raise ConfigError(f"controller state of version {version!r}; this rankprune reads 1")
        trained = {target.name for target in self._targets}
        known = isinstance(self.options.rank, Budget) or trained == set(layers)
        if self.options.plan is not None:
            planned = {target.name: target.scheme.name for target in self._targets}
            known &= planned == {name: item.get("scheme") for name, item in layers.items()}
        if not known:
            raise ConfigError("controller state: it was taken with other layers or options")
        modules = dict(self.model.named_modules())
        targets = []
        for name, item in layers.items():
            spec = LayerSpec.of(modules[name]) if name in modules else None
            if spec is None:
                raise ConfigError(f"controller state: the model has no layer {name!r}")
            try:
                scheme, rank = get_scheme(item["scheme"]), item["rank"]
                energy, polar, start = item["energy"], item["polar"], item["start"]
            except (KeyError, TypeError) as error:
                raise ConfigError(f"controller state of layer {name!r}: {error!r}") from None
            target = Target(name, modules[name], spec, scheme, rank, energy)
            device = target.weight.device
            target.polar = None if polar is None else target.like_weight(polar.to(device))
            target.start = None if start is None else start.to(device)
            targets.append(target)
        self.step, self._replans, self._targets = step, replans, targets
        self._finished = None

    # -- inside ----------------------------------------------------------------------------------

    def _first_plan(self) -> tuple[LayerPlan, ...]:
        options = self.options
        if options.plan is not None:
            check_plan(self.model, options.plan.factorized)
            if self.example_inputs is not None:
                profile(self.model, self.example_inputs)  # what fails at the end fails now
            return options.plan.factorized
        if isinstance(options.rank, Budget):
            layers = self._plan_for(options.rank)  # also where it descends: fail early
            return () if options.descent else layers
        assert options.rank is not None
        # at the start no rank need pay yet
        return self._plan_for(options.rank, guard=False)

    def _plan_for(self, rank: RankRule | Budget, *, guard: bool = True) -> tuple[LayerPlan, ...]:
        options = self.options
        plan = self.team.agree(
            lambda: make_plan(
                self.model,
                rank,
                scheme=options.scheme,
                overrides=options.overrides,
                example_inputs=self.example_inputs,
                guard=guard,
                multiple_of=self._multiple,
                runtime=self._table,
            )
        )
        return plan.factorized

    def _adopt(self, layers: tuple[LayerPlan, ...]) -> None:
        starts = {(t.name, t.scheme.name): t.start for t in self._targets}
        self._targets = []
        for layer in layers:
            assert layer.spec is not None
            assert layer.rank is not None
            module = self.model.get_submodule(layer.name)
            scheme = SCHEMES[str(layer.scheme)]
            target = Target(layer.name, module, layer.spec, scheme, layer.rank)
            target.start = starts.get((layer.name, scheme.name))
            self._targets.append(target)

    def _active(self) -> bool:
        options = self.options
        return options.start <= self.step and (options.end is None or self.step < options.end)

    def _progress(self) -> float:
        """How far the descent has come, 0 to 1."""
        if not self.options.descent:
            return 1.0
        return min(max(self.step - self.options.start, 0) / self.options.descent, 1.0)

    def _replan(self) -> None:
        """Spend a descending budget anew, at most `REPLANS` times, the last time in full."""
        budget = self.options.rank
        if not isinstance(budget, Budget) or not self.options.descent:
            return
        reached = int(self._progress() * REPLANS)
        if reached > self._replans:
            self._replans = reached
            left = (1 - reached / REPLANS) ** 3
            self._adopt(self._plan_for(budget.eased(left)))

    def _job(self, target: Target, *, final: bool = False) -> Job:
        """The projection of a layer to the rank that is due."""
        options, shape = self.options, target.scheme.matrix_shape(target.spec)
        leading = False
        rank: Any = target.rank
        if isinstance(options.rank, RankRule):
            rule = self._rules[target.name]

            def rank(spectrum: Spectrum) -> int:
                return wanted_rank(rule, spectrum, target.scheme, self._multiple)

            leading = rule.reads == "leading"
            if rule.reads == "shape":
                rank = rank(Spectrum(torch.empty(shape.batch, 0), shape))
        elif options.plan is not None:
            planned = options.plan[target.name].rank
            assert planned is not None
            left = 0.0 if final else (1 - self._progress()) ** 3
            rank = round(planned + (shape.max_rank - planned) * left)
        return Job(
            shape=shape,
            load=target.matrices,
            dtype=target.weight.dtype,
            device=target.weight.device,
            rank=rank,
            leading=leading,
            start=target.start,
            polar=bool(options.nuclear) and options.nuclear_when == "projection" and not final,
            layer=target.name,
        )

    def _polars(self) -> Iterator[tuple[Target, Tensor]]:
        """U Vᵀ of the layers that are regularised in this step, as the weights are."""
        if not self.options.nuclear or not self._active():
            return
        if self.options.nuclear_when == "projection":
            yield from ((t, t.polar) for t in self._targets if t.polar is not None)
            return
        jobs = []
        for target in self._targets:
            full = target.scheme.matrix_shape(target.spec).max_rank
            jobs.append(replace(self._job(target), rank=full, start=None, polar=True))
        check_weights(self._targets, self.team)
        for target, done in carry_out(self._targets, jobs, self.team):
            assert done.polar is not None
            yield target, target.spread(done.polar)


@torch.no_grad()
def project(model: nn.Module, plan: Plan) -> None:
    """Replace the planned layers' weights by their nearest ones of the planned ranks, in place.

    For weights that a controller has not projected itself, such as an exponential moving average:
    afterwards `factorize(model, plan)` computes what the model computes.

    Args:
        model: a dense model.
        plan: from a controller's `finish` or from `make_plan`.

    Raises:
        PlanError: a planned layer is missing or has another shape.
        NumericsError: a weight holds NaN or infinity; no layer has been changed.

    Example:
        >>> import rankprune as rp
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> trp = rp.attach(model, torch.optim.SGD(model.parameters()), rp.TRP(rank=rp.Ratio(0.2)))
        >>> plan = trp.finish()
        >>> rp.project(average.module, plan)
        >>> compact = rp.factorize(average.module, plan)
    """
    controller = Controller(model, TRP(plan=plan, guard=False))
    controller.project()


def unwrap(model: nn.Module) -> nn.Module:
    """Look through torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {
        id(parameter): float(group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _reason(options: TRP) -> str:
    if options.plan is not None:
        return "plan"
    return "budget" if isinstance(options.rank, Budget) else str(options.rank)
