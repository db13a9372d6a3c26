"""Compressed networks as files: what a peer hands over to the training loop.

A file has the weights, and in its metadata, as JSON, the layers that differ from the dense
network's. Reading one needs nothing of the peer and runs nothing that is in the file, so the
training can go on where the peer cannot be installed.

Imports nothing of rankprune: peers write these files in environments of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from networks import NETWORKS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

#: A layer's kind to the arguments that make one like it; `bias` is asked for apart.
_ARGUMENTS = {
    "Conv2d": (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ),
    "BatchNorm2d": ("num_features", "eps", "momentum"),
    "Linear": ("in_features", "out_features"),
}
_BIASED = ("Conv2d", "Linear")

#: A layer's name in the dense network to the layers that stand in its place, one after another.
Layers = dict[str, list[dict[str, Any]]]


def fingerprint(model: nn.Module) -> str:
    """Of the weights, wherever they lie."""
    digest = hashlib.sha256()
    for name, value in sorted(_plain(model).items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def location(folder: Path, peer: str, network: str, target: float, dense: str) -> Path:
    """Where the network that the peer made of these dense weights is kept."""
    return folder / f"{peer}-{network}-{target:g}-{dense[:8]}.safetensors"


def save(
    path: Path, compact: nn.Module, network: str, dense: nn.Module, about: Mapping[str, Any]
) -> None:
    """Write a network that differs from the dense one in its layers only.

    Args:
        path: the file; it is there as a whole or not at all.
        compact: what the peer made.
        network: name in `NETWORKS`.
        dense: what the peer started from.
        about: the peer's version and settings.
    """
    metadata = {
        "network": network,
        "dense": fingerprint(dense),
        "layers": json.dumps(_differences(NETWORKS[network](), compact)),
        "about": json.dumps(about),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(_plain(compact), scratch, metadata)
    os.replace(scratch, path)


def load(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and about it: `network`, `dense` (a fingerprint) and what the peer says."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = NETWORKS[metadata["network"]]()
    layers: Layers = json.loads(metadata["layers"])
    for name, parts in layers.items():
        made = [_layer(part) for part in parts]
        model.set_submodule(name, made[0] if len(made) == 1 else nn.Sequential(*made))
    model.load_state_dict(weights)
    known = {key: metadata[key] for key in ("network", "dense")}
    return model, {**known, **json.loads(metadata["about"])}


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}


def _differences(dense: nn.Module, compact: nn.Module) -> Layers:
    found: Layers = {}
    for name, module in dense.named_modules():
        if type(module).__name__ not in _ARGUMENTS:
            continue
        now = compact.get_submodule(name)
        parts = list(now) if isinstance(now, nn.Sequential) else [now]
        described = [_described(part) for part in parts]
        if described != [_described(module)]:
            found[name] = described
    return found


def _described(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    found: dict[str, Any] = {"kind": kind}
    found |= {argument: getattr(module, argument) for argument in _ARGUMENTS[kind]}
    if kind in _BIASED:
        found["bias"] = module.bias is not None
    return found


def _layer(described: Mapping[str, Any]) -> nn.Module:
    kind = described["kind"]
    if kind not in _ARGUMENTS:
        raise ValueError(f"a compressed network has no {kind}")
    arguments = {key: value for key, value in described.items() if key != "kind"}
    module: nn.Module = getattr(nn, kind)(**arguments)
    return module
