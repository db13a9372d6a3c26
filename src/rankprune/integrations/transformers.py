"""Trained Rank Pruning under Hugging Face's Trainer.

The Trainer ends in `optimizer.step` of the torch optimizer that Accelerate wraps; `attach` serves
it as it is. This callback attaches, keeps the state beside the Trainer's checkpoints, and finishes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rankprune.attach import attach
from rankprune.errors import FileError, MissingExtraError
from rankprune.options import TRP
from rankprune.plan import Plan
from rankprune.profile import ExampleInputs
from rankprune.recipes.checkpoint import read_checkpoint, write_checkpoint
from rankprune.training import Controller

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is installed, but lacks something itself
    raise MissingExtraError("RankPruneCallback", "transformers", "transformers") from None

_STATE_NAME = "rankprune.pt"


class RankPruneCallback(TrainerCallback):
    """Adds Trained Rank Pruning to a `transformers.Trainer`.

    Works with gradient accumulation, clipping and mixed precision. Every checkpoint folder gets a
    file `rankprune.pt`; `trainer.train(resume_from_checkpoint=…)` goes on from it bit by bit. The
    Trainer does not tell callbacks of an exception: after one, call `detach`, or train again.

    Attributes:
        controller: the controller, during training.
        plan: what was reached, once training has ended; the model is projected to it.

    Args:
        options: what to do.
        example_inputs: what the model is called with, to count FLOPs; needed for a FLOPs budget.
        resume_from: the folder that `resume_from_checkpoint` names, where it is not the one of that
            step in `output_dir`. Read only if the Trainer resumes.

    Raises:
        MissingExtraError: transformers is not installed; raised on import of this module.

    Example:
        >>> import rankprune as rp
        >>> from rankprune.integrations.transformers import RankPruneCallback
        >>> callback = RankPruneCallback(rp.TRP(rank=rp.Energy(0.98), nuclear=3e-4))
        >>> trainer = Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
        >>> _ = trainer.train()  # doctest: +SKIP
        >>> compact = rp.factorize(model, callback.plan)  # doctest: +SKIP
    """

    def __init__(
        self,
        options: TRP,
        *,
        example_inputs: ExampleInputs | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.options = options
        self.example_inputs = example_inputs
        self.resume_from = resume_from
        self.controller: Controller | None = None
        self.plan: Plan | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, with the checkpoint's state where the Trainer resumes.

        By now the Trainer has loaded the model and the optimizer.

        Raises:
            FileError: the checkpoint holds no `rankprune.pt`, or a damaged one.
            ConfigError: as in `attach`.
        """
        self.detach()  # of a run that was broken off
        self.plan = None
        saved = None
        if state.global_step > 0:
            path = _folder(args, state) / _STATE_NAME
            if self.resume_from is not None:
                path = Path(self.resume_from) / _STATE_NAME
            if not path.exists():
                raise FileError(
                    f"{path}: no such file; pass the folder of the checkpoint that you resume from "
                    "as RankPruneCallback(resume_from=…), or start anew if it was saved without "
                    "this callback"
                )
            saved = read_checkpoint(path)
        self.controller = attach(
            kwargs["model"],
            kwargs["optimizer"],
            self.options,
            example_inputs=self.example_inputs,
            # callbacks get the bare model, not the one that DDP wraps
            process_group=_group(args),
            state=saved,
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the checkpoint's folder.

        Raises:
            FileError: it cannot be written.
        """
        # trials of a hyperparameter search have folders of their own, and are not resumed
        if self.controller is None or state.is_hyper_param_search:
            return
        saved = self.controller.state_dict()  # of a sharded model it takes all processes
        # the main process's, or with save_on_each_node each node's
        if args.should_save:
            write_checkpoint(_folder(args, state) / _STATE_NAME, saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Project a last time and take the hooks off."""
        if self.controller is not None:
            self.plan = self.controller.finish()
            self.controller = None

    def detach(self) -> None:
        """Take the hooks off without a last projection, after an exception."""
        if self.controller is not None:
            self.controller.detach()
            self.controller = None


def _folder(args: Any, state: Any) -> Path:
    """Where the Trainer keeps the checkpoint of the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _group(args: Any) -> Any:
    distributed = torch.distributed
    if args.world_size > 1 and distributed.is_available() and distributed.is_initialized():
        return distributed.group.WORLD
    return None
