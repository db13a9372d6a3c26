"""Trained Rank Pruning: project, regularise, finish.

The controller knows no framework. It has two verbs, `project` and `regularise`, and counts
optimizer steps. `attach` drives it from a torch optimizer's step hooks:

    before step t's forward     project, where t is due (t % every == 0 between start and end)
    gradients of step t ready   regularise: gradient += λ U Vᵀ
    after step t                count it, shrink (decoupled mode), project for step t + 1

Source: Xu et al. 2019, arXiv 1910.04576, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.errors import ConfigError
from rankprune.factorize import check_plan
from rankprune.layers import LayerSpec
from rankprune.linalg import Decomposition, check_finite
from rankprune.plan import LayerPlan, Plan
from rankprune.planner import Budget, Override, make_plan, rank_rules, realise, round_rank
from rankprune.profile import ExampleInputs
from rankprune.ranks import RankRule, Spectrum
from rankprune.schemes import SCHEMES, Scheme, get_scheme

NUCLEAR_MODES = ("gradient", "decoupled")
NUCLEAR_WHEN = ("projection", "step")
# How often a descending budget is spent anew as the spectra move.
REPLANS = 8


@dataclass(frozen=True, kw_only=True)
class TRP:
    """Options of Trained Rank Pruning.

    Attributes:
        rank: a rank rule, applied to the spectra as they are at each projection, or a `Budget`.
        plan: fixed schemes and ranks, instead of `rank`.
        scheme: as in `make_plan`.
        overrides: as in `make_plan`.
        multiple_of: as in `make_plan`.
        guard: as in `make_plan`; applied at the end, since training is what makes it pay.
        every: m, the period of projections in optimizer steps.
        start: first step that is projected and regularised.
        end: first step that no longer is; None for no end. `finish` projects in any case.
        descent: number of steps after `start` over which a plan's ranks, or a budget, come down
            from full to their target (cubic, fast first); 0 is at once.
        nuclear: λ, weight of the nuclear norm; 0 switches it off.
        nuclear_mode: "gradient" adds λ U Vᵀ to the gradient (the paper's); "decoupled" subtracts
            lr · λ · U Vᵀ from the weight after the step, which no optimizer rescales.
        nuclear_when: "projection" regularises in the steps that are projected and over the kept
            directions only, as the paper's experiments did: nearly free. "step" does so in every
            step over all directions, at the price of a decomposition a step.
    """

    rank: RankRule | Budget | None = None
    plan: Plan | None = None
    scheme: str = "auto"
    overrides: Mapping[str, Override] | None = None
    multiple_of: int = 1
    guard: bool = True
    every: int = 20
    start: int = 0
    end: int | None = None
    descent: int = 0
    nuclear: float = 0.0
    nuclear_mode: str = "gradient"
    nuclear_when: str = "projection"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.plan is None):
            raise ConfigError("TRP: give either rank=… (a rule or a Budget) or plan=…")
        for name, least in (("every", 1), ("start", 0), ("descent", 0), ("end", 0)):
            value = getattr(self, name)
            if value is None and name == "end":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"TRP({name}={value!r}): a whole number ≥ {least}")
        if self.end is not None and self.end <= self.start:
            raise ConfigError(f"TRP(start={self.start}, end={self.end}): end must come after start")
        if not isinstance(self.nuclear, (int, float)) or not 0 <= self.nuclear < float("inf"):
            raise ConfigError(f"TRP(nuclear={self.nuclear!r}): a finite weight ≥ 0")
        for name, known in (("nuclear_mode", NUCLEAR_MODES), ("nuclear_when", NUCLEAR_WHEN)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"TRP({name}={getattr(self, name)!r}): one of {', '.join(map(repr, known))}"
                )
        if self.descent and isinstance(self.rank, RankRule):
            raise ConfigError("TRP(descent=…) needs a plan or a Budget; a rank rule has no target")


@dataclass
class _Target:
    """A layer in training: what it is projected to, and its share of the nuclear gradient."""

    name: str
    module: nn.Module
    spec: LayerSpec
    scheme: Scheme
    rank: int
    energy: float | None = None
    polar: Tensor | None = None

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def decompose(self) -> Decomposition:
        check_finite(self.weight.detach(), self.name)
        return Decomposition(self.scheme.to_matrix(self.spec, self.weight.detach()))

    def spectrum(self, decomposition: Decomposition) -> Spectrum:
        return Spectrum(decomposition.values, self.scheme.matrix_shape(self.spec))


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
    """

    def __init__(
        self,
        model: nn.Module,
        options: TRP,
        *,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.options = options
        self.example_inputs = example_inputs
        self.step = 0
        self._handles: list[Any] = []
        self._finished: Plan | None = None
        self._replans = 0
        self._targets: list[_Target] = []
        self._rules: dict[str, RankRule] = {}
        if isinstance(options.rank, RankRule):
            self._rules = rank_rules(self.model, options.rank, overrides=options.overrides)
        self._adopt(self._first_plan())

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
        for target in self._targets:
            check_finite(target.weight.detach(), target.name)
        for target in self._targets:
            decomposition = target.decompose()
            self._project(target, decomposition, self._rank_now(target, decomposition))

    @torch.no_grad()
    def regularise(self, scale: float | Tensor = 1.0) -> None:
        """Add λ U Vᵀ to the gradients, where this step is to be regularised.

        Args:
            scale: factor by which the gradients are still scaled (a GradScaler's, where it leaves
                the unscaling to the optimizer).
        """
        if self.options.nuclear_mode != "gradient":
            return
        for target, polar in self._polars():
            gradient = target.weight.grad
            if gradient is not None:
                gradient.add_((self.options.nuclear * scale * polar).to(gradient.dtype))

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
        self.detach()
        options = self.options
        if isinstance(options.rank, Budget) and self._replans < REPLANS and options.descent:
            self._adopt(self._plan_within(options.rank))
        decompositions = {target.name: target.decompose() for target in self._targets}
        ranks = {
            target.name: (
                target.scheme.name,
                self._rank_now(target, decompositions[target.name], final=True),
                _reason(options),
            )
            for target in self._targets
        }
        energies = {
            target.name: _energy(target, decompositions[target.name], ranks[target.name][1])
            for target in self._targets
        }
        plan = realise(
            self.model,
            ranks,
            example_inputs=self.example_inputs,
            energies=energies,
            guard=options.guard,
        )
        for target in self._targets:
            rank = plan[target.name].rank
            if rank is not None:
                self._project(target, decompositions[target.name], rank)
        self._finished = plan
        return plan

    def detach(self) -> None:
        """Take the hooks off the optimizer, without a last projection."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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
        """Everything that a resumed run needs, as plain numbers, strings and tensors."""
        return {
            "version": 1,
            "step": self.step,
            "replans": self._replans,
            "layers": {
                t.name: {
                    "scheme": t.scheme.name,
                    "rank": t.rank,
                    "energy": t.energy,
                    "polar": t.polar,
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
        if not isinstance(self.options.rank, Budget) and trained != set(layers):
            raise ConfigError("controller state: it was taken with other layers or options")
        modules = dict(self.model.named_modules())
        targets = []
        for name, item in layers.items():
            spec = LayerSpec.of(modules[name]) if name in modules else None
            if spec is None:
                raise ConfigError(f"controller state: the model has no layer {name!r}")
            try:
                scheme, rank = get_scheme(item["scheme"]), item["rank"]
                energy, polar = item["energy"], item["polar"]
            except (KeyError, TypeError) as error:
                raise ConfigError(f"controller state of layer {name!r}: {error!r}") from None
            target = _Target(name, modules[name], spec, scheme, rank, energy)
            target.polar = None if polar is None else polar.to(target.weight.device)
            targets.append(target)
        self.step, self._replans, self._targets = step, replans, targets

    # -- inside ----------------------------------------------------------------------------------

    def _first_plan(self) -> tuple[LayerPlan, ...]:
        options = self.options
        if options.plan is not None:
            check_plan(self.model, options.plan.factorized)
            return options.plan.factorized
        if isinstance(options.rank, Budget):
            plan = self._plan_within(options.rank)  # also where it descends: fail early
            return () if options.descent else plan
        assert options.rank is not None
        # at the start no rank need pay yet
        return make_plan(
            self.model,
            options.rank,
            scheme=options.scheme,
            overrides=options.overrides,
            example_inputs=self.example_inputs,
            guard=False,
            multiple_of=options.multiple_of,
        ).factorized

    def _plan_within(self, budget: Budget) -> tuple[LayerPlan, ...]:
        options = self.options
        return make_plan(
            self.model,
            budget,
            scheme=options.scheme,
            overrides=options.overrides,
            example_inputs=self.example_inputs,
            multiple_of=options.multiple_of,
        ).factorized

    def _adopt(self, layers: tuple[LayerPlan, ...]) -> None:
        self._targets = []
        for layer in layers:
            assert layer.spec is not None
            assert layer.rank is not None
            module = self.model.get_submodule(layer.name)
            scheme = SCHEMES[str(layer.scheme)]
            self._targets.append(_Target(layer.name, module, layer.spec, scheme, layer.rank))

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
            bounds = {name: f + (1 - f) * left for name, f in budget.bounds().items()}
            self._adopt(self._plan_within(Budget(**bounds)))

    def _rank_now(
        self, target: _Target, decomposition: Decomposition, *, final: bool = False
    ) -> int:
        options = self.options
        if isinstance(options.rank, RankRule):
            rank = self._rules[target.name].select(target.spectrum(decomposition))
            return round_rank(rank, options.multiple_of, decomposition.max_rank)
        if options.plan is not None:
            planned = options.plan[target.name].rank
            assert planned is not None
            left = 0.0 if final else (1 - self._progress()) ** 3
            return round(planned + (decomposition.max_rank - planned) * left)
        return target.rank

    def _project(self, target: _Target, decomposition: Decomposition, rank: int) -> None:
        projected = decomposition.project(rank)
        target.weight.copy_(target.scheme.from_matrix(target.spec, projected))
        target.rank = rank
        target.energy = _energy(target, decomposition, rank)
        if self.options.nuclear and self.options.nuclear_when == "projection":
            target.polar = target.scheme.from_matrix(target.spec, decomposition.polar(rank))

    def _polars(self) -> list[tuple[_Target, Tensor]]:
        """U Vᵀ of the layers that are regularised in this step, in the weights' shapes."""
        if not self.options.nuclear or not self._active():
            return []
        if self.options.nuclear_when == "step":
            return [
                (target, target.scheme.from_matrix(target.spec, target.decompose().polar()))
                for target in self._targets
            ]
        return [(target, target.polar) for target in self._targets if target.polar is not None]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    options: TRP,
    *,
    example_inputs: ExampleInputs | None = None,
    state: Mapping[str, Any] | None = None,
) -> Controller:
    """Add Trained Rank Pruning to an existing training loop.

    The controller hooks into `optimizer.step`; the loop stays as it is. Steps that a GradScaler
    skips do not count. The nuclear gradient is added after the loop's own gradient clipping.

    Args:
        model: the dense model.
        optimizer: any torch optimizer over the model's parameters, or Accelerate's wrapper.
        options: what to do.
        example_inputs: what the model is called with, to count FLOPs; needed for a FLOPs budget.
        state: a controller's `state_dict` to continue from, with the model's weights already
            loaded. Without it, a projection that is due at step 0 happens now.

    Returns:
        The controller; call its `finish` after the last step.

    Raises:
        ConfigError: the optimizer holds none of the model's weights, or as in `make_plan`.

    Example:
        >>> import rankprune as rp
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trp = rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(4), every=2))
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 16)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> compact = rp.factorize(model, trp.finish())
        >>> [layer.rank for layer in trp.finish().layers]
        [4, 4]
    """
    inner = getattr(optimizer, "optimizer", None)
    raw = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    if not isinstance(raw, torch.optim.Optimizer):
        raise ConfigError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    held = {id(parameter) for group in raw.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ConfigError(
            "the optimizer holds none of the model's parameters; create it from this model, after "
            "moving or wrapping it"
        )
    controller = Controller(model, options, example_inputs=example_inputs)
    if state is None:
        controller.before_step()
    else:
        controller.load_state_dict(state)

    def gradients_ready(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not _skipped(optimizer):
            scale = getattr(optimizer, "grad_scale", None)
            controller.regularise(1.0 if scale is None else scale)

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not _skipped(optimizer):
            controller.after_step(optimizer)
            controller.before_step()

    controller._handles = [
        raw.register_step_pre_hook(gradients_ready),
        raw.register_step_post_hook(stepped),
    ]
    return controller


def unwrap(model: nn.Module) -> nn.Module:
    """Look through torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer to leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {
        id(parameter): float(group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _energy(target: _Target, decomposition: Decomposition, rank: int) -> float:
    return float(target.spectrum(decomposition).energy()[rank - 1])


def _reason(options: TRP) -> str:
    if options.plan is not None:
        return "plan"
    return "budget" if isinstance(options.rank, Budget) else str(options.rank)
