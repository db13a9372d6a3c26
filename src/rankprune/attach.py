"""Trained Rank Pruning in a loop that knows nothing of it: the optimizer's hooks drive it.

Every framework ends in `optimizer.step`, so this one driver serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankprune.errors import ConfigError
from rankprune.options import TRP
from rankprune.planner import rank_rules
from rankprune.profile import ExampleInputs
from rankprune.ranks import Ratio
from rankprune.sharded import reshard
from rankprune.survey import survey
from rankprune.training import Controller, unwrap


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    options: TRP,
    *,
    example_inputs: ExampleInputs | None = None,
    process_group: Any = None,
    state: Mapping[str, Any] | None = None,
) -> Controller:
    """Add Trained Rank Pruning to an existing training loop.

    The controller hooks into `optimizer.step`; the loop stays as it is. Steps that a GradScaler
    skips do not count. The nuclear gradient is added after the loop's own gradient clipping. A
    closure that the step is called with gets it after each of its evaluations.

    Args:
        model: the dense model.
        optimizer: any torch optimizer over the model's parameters, or Accelerate's wrapper.
        options: what to do.
        example_inputs: what the model is called with, to count FLOPs; needed for a FLOPs budget.
        process_group: as for `Controller`; needed where a bare model is attached before DDP wraps
            it.
        state: a controller's `state_dict` to continue from, with the model's weights already
            loaded. Without it, a projection that is due at step 0 happens now.

    Returns:
        The controller; call its `finish` after the last step.

    Raises:
        ConfigError: the optimizer does not hold the model's weights, or as in `make_plan`.

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
    weights = trainable(unwrap(model), options)
    outside = [name for name, w in weights.items() if w.requires_grad and id(w) not in held]
    if outside:
        raise ConfigError(
            f"the optimizer does not hold layer {outside[0]!r}"
            + (f" and {len(outside) - 1} more" if outside[1:] else "")
            + ", and rankprune counts the steps of one optimizer; freeze what is not trained, or "
            f"leave what another one trains dense: {leaving_dense(options, outside[0])}"
        )
    controller = Controller(
        model, options, example_inputs=example_inputs, process_group=process_group, state=state
    )
    if state is None:
        controller.before_step()

    def regularise(optimizer: torch.optim.Optimizer) -> None:
        if not _skipped(optimizer):
            scale = getattr(optimizer, "grad_scale", None)
            controller.regularise(1.0 if scale is None else scale)

    def stepping(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args holds the optimizer itself, then what step was called with
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            regularise(optimizer)
            return None

        def regularised() -> Any:
            loss = closure()
            regularise(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], regularised, *args[2:]), kwargs
        return args, {**kwargs, "closure": regularised}

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not _skipped(optimizer):
            controller.after_step(optimizer)
            controller.before_step()

    controller._handles = [
        raw.register_step_pre_hook(stepping),
        raw.register_step_post_hook(stepped),
    ]
    return controller


def trainable(model: nn.Module, options: TRP) -> dict[str, nn.Parameter]:
    """The weights that options project, by layer; under a budget those that they may project."""
    reshard(model)
    if options.plan is not None:
        names = {layer.name for layer in options.plan.factorized}
    else:
        # which layers an override leaves dense does not depend on the rule
        wanted = rank_rules(model, Ratio(1.0), overrides=options.overrides)
        names = {site.name for site in survey(model) if not site.obstacle and site.name in wanted}
    weights = {name: module.weight for name, module in model.named_modules() if name in names}
    return {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}


def leaving_dense(options: TRP, name: str) -> str:
    """How to ask for a layer to be left dense."""
    call = "TRP(" if options.plan is None else "make_plan(…, "
    return f"{call}overrides={{{name!r}: None}})"


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer to leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
