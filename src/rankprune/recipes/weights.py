"""Reading weights that somebody has: a saved folder, safetensors, or a torch state dict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.errors import ConfigError, FileError
from rankprune.factorize import check_plan, factor_skeleton
from rankprune.files import reporting
from rankprune.low_rank import low_rank_layers
from rankprune.plan import Plan
from rankprune.recipes.checkpoint import is_checkpoint, read_checkpoint
from rankprune.serialize import compare_shapes, load, read_tensors, shapes

_NESTED = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load weights into a freshly built model.

    Args:
        model: the dense architecture; it is changed in place, or a copy is, once the file has
            been checked.
        path: a folder that `rankprune.save` wrote, a .safetensors file, a state dict written by
            torch.save (read without running code), or a training run's checkpoint.

    Returns:
        The model; factorised where the folder or the checkpoint holds a factorised one.

    Raises:
        FileError: missing, damaged, refused, or weights of another model.
    """
    if path.is_dir():
        return load(model, path)
    state, plan = _read(path)
    expected = model
    if plan is not None:
        expected = copy.deepcopy(model)
        check_plan(expected, plan.factorized)
        factor_skeleton(expected, plan.factorized)
    compare_shapes(shapes(expected.state_dict()), shapes(state), str(path))
    expected.load_state_dict(state)
    return expected


def require_dense(model: nn.Module) -> None:
    """Refuse a factorised model.

    Raises:
        ConfigError: it is one.
    """
    factorized = low_rank_layers(model)
    if factorized:
        raise ConfigError(
            f"the model is factorised already ({len(factorized)} layers, such as "
            f"{next(iter(factorized))!r}); give its dense weights"
        )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, without the prefixes that wrappers add.

    Raises:
        FileError: missing, damaged, or holding anything but tensors.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], Plan | None]:
    """The tensors, and the plan of a run that trains its factors by now."""
    state: Any
    plan: Plan | None = None
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    elif is_checkpoint(path):
        checkpoint = read_checkpoint(path)
        state, text = checkpoint.get("model"), checkpoint.get("plan")
        plan = Plan.from_json(text) if isinstance(text, str) else None
    else:
        state = _torch_file(path)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FileError(f"{path}: not a state dict: expected names with tensors")
    if not state:
        raise FileError(f"{path}: holds no weights")
    return {_plain(str(key)): value for key, value in state.items()}, plan


def _torch_file(path: Path) -> Any:
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with reporting(path, "read"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path}: refused, since reading it would run code from the file "
            f"({str(error).splitlines()[0][:120]}); save the model's state_dict() instead"
        ) from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f"{path}: not a torch state dict: {reason}") from None


def _plain(key: str) -> str:
    while (prefix := next(filter(key.startswith, _WRAPPERS), None)) is not None:
        key = key.removeprefix(prefix)
    return key
