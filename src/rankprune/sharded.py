"""Weights that are spread over processes (DTensor, as FSDP2 makes them), beside plain ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    # not isinstance: importing DTensor costs as much as importing torch
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Drop the whole weights that FSDP2 keeps after a forward pass; the shards come back."""
    for module in model.modules():
        kind = type(module)  # a class tells faster than a module what it lacks
        if hasattr(kind, "reshard") and hasattr(kind, "unshard"):
            module.reshard()  # type: ignore[operator]


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Any) -> Tensor:
    """A whole tensor; all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread_like(tensor: Any, full: Tensor) -> Tensor:
    """A whole tensor, spread as another one is; every process has the same whole."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    # without a source each process cuts its shard from its own copy: nothing is sent
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
