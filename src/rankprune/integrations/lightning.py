"""Trained Rank Pruning under Lightning's Trainer.

Lightning ends in `optimizer.step` of the torch optimizer, with forward and backward pass in its
closure; `attach` serves it as it is. This callback attaches, keeps the state in Lightning's
checkpoints, and finishes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch

from rankprune.attach import attach, leaving_dense, trainable
from rankprune.errors import ConfigError, MissingExtraError
from rankprune.options import TRP
from rankprune.plan import Plan
from rankprune.profile import ExampleInputs
from rankprune.training import Controller


def _framework() -> Any:
    """The Lightning that the program uses already, else the one that is installed."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # it is installed, but lacks something itself
    raise MissingExtraError("RankPruneCallback", "pytorch-lightning", "lightning")


_Callback: Any = _framework().Callback


class RankPruneCallback(_Callback):
    """Adds Trained Rank Pruning to a `Trainer`, of `lightning` or `pytorch_lightning`.

    Works with automatic and manual optimisation, gradient accumulation, clipping and mixed
    precision. Checkpoints hold the state under `state_key`; a resumed run goes on bit by bit. One
    that was taken without this callback starts the schedule anew. `plan` names layers as the
    LightningModule does, so factorise that: `rp.factorize(module, callback.plan)`.

    Attributes:
        controller: the controller, during training; after an exception the one that was, without
            its hooks.
        plan: what was reached, once training has ended; the module is projected to it.

    Args:
        options: what to do.
        example_inputs: what the LightningModule is called with, to count FLOPs; needed for a FLOPs
            budget.

    Raises:
        MissingExtraError: Lightning is not installed; raised on import of this module.

    Example:
        >>> import rankprune as rp
        >>> from rankprune.integrations.lightning import RankPruneCallback
        >>> callback = RankPruneCallback(rp.TRP(rank=rp.Energy(0.98), nuclear=3e-4))
        >>> trainer = Trainer(callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
        >>> compact = rp.factorize(module, callback.plan)  # doctest: +SKIP
    """

    def __init__(self, options: TRP, *, example_inputs: ExampleInputs | None = None) -> None:
        self.options = options
        self.example_inputs = example_inputs
        self.controller: Controller | None = None
        self.plan: Plan | None = None
        self._state: Mapping[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Where checkpoints hold the state; the same whatever the options are."""
        return "rankprune.RankPruneCallback"

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and the plan once there is one."""
        if self.controller is not None:
            return {"controller": self.controller.state_dict(), "plan": None}
        if self._state is None:
            return {}
        return {
            "controller": self._state,
            "plan": None if self.plan is None else self.plan.to_json(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts.

        Raises:
            ConfigError: the state is not one of this callback.
        """
        try:
            state, plan = state_dict["controller"], state_dict["plan"]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a RankPruneCallback's state: {error!r}") from None
        self._state = state
        self.plan = None if plan is None else Plan.from_json(plan)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier run; a checkpoint is loaded after this."""
        if stage == "fit":
            self._detach()
            self.controller = self.plan = self._state = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, with the checkpoint's state where there is one.

        Raises:
            ConfigError: no optimizer, or more than one, holds weights to factorise; or as in
                `attach`.
        """
        self.plan = None
        self.controller = attach(
            pl_module,
            _optimizer(pl_module, trainer.optimizers, self.options),
            self.options,
            example_inputs=self.example_inputs,
            process_group=_group(trainer),
            state=self._state,
        )
        self._state = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Project a last time and take the hooks off."""
        if self.controller is not None:
            # a checkpoint that is saved from now on continues from here as well
            self._state = self.controller.state_dict()
            self.plan = self.controller.finish()
            self.controller = None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish a resumed run in which no step was left; Lightning starts no training for it."""
        if self.plan is None and self.controller is None and self._state is not None:
            controller = Controller(
                pl_module,
                self.options,
                example_inputs=self.example_inputs,
                process_group=_group(trainer),
                state=self._state,
            )
            self.plan = controller.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off; the module stays as it was trained."""
        # the controller stays, for callbacks that save a checkpoint now
        self._detach()

    def _detach(self) -> None:
        if self.controller is not None:
            self.controller.detach()


def _group(trainer: Any) -> Any:
    """The module is bare; only the strategy knows that DDP wraps it."""
    return torch.distributed.group.WORLD if trainer.world_size > 1 else None


def _optimizer(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], options: TRP
) -> torch.optim.Optimizer:
    """The one whose steps are counted: it holds the weights that are to be factorised."""
    weights = {id(weight) for weight in trainable(model, options).values()}
    holders = [
        optimizer
        for optimizer in optimizers
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"])
    ]
    if len(holders) > 1:
        raise ConfigError(
            f"{len(holders)} of the module's {len(optimizers)} optimizers hold layers to "
            "factorise, and rankprune counts the steps of one; leave the others' layers dense: "
            f"{leaving_dense(options, 'discriminator.*')}"
        )
    if not holders and len(optimizers) != 1:
        raise ConfigError(
            f"none of the module's {len(optimizers)} optimizers holds a layer to factorise"
        )
    return (holders or optimizers)[0]
