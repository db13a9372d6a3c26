"""Separable layers: in ONNX with r kernels a channel as torch writes them, and with one; in torch.

A k×k convolution of as many inputs as outputs, between two 1×1 convolutions with ReLUs, as it
stands in a network; factorised by `decoupled` and `depthwise`, and by `spatial` at the FLOPs of
the former. Everything is timed by turns, on one thread; what is told is the dense chain's time over
the factorised one's.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from _harness import alternate, arguments, finish, ratios, say
from torch import nn

import rankprune as rp
from rankprune.runtimes import BACKENDS, OnnxBackend, Run, Runtime, fill_randomly

LAYERS = ((16, 32), (64, 8), (64, 56), (128, 28), (256, 14), (512, 7))
RANKS = (2, 3)
FORMS = ("decoupled", "depthwise")


def chain(channels: int) -> nn.Sequential:
    """The convolution and its neighbours."""
    first, last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), conv, nn.ReLU(), last).eval()
    fill_randomly(model)
    return model


def variants(channels: int, rank: int) -> dict[str, nn.Module]:
    """Dense and factorised, `spatial` with as many FLOPs as the others."""
    model = chain(channels)
    ranks = {"decoupled": rank, "depthwise": rank, "spatial": rank * (channels + 9) // 6}
    networks: dict[str, nn.Module] = {"dense": model}
    for scheme, own in ranks.items():
        layer = rp.LayerConfig(rank=own, scheme=scheme)
        plan = rp.make_plan(
            model, rp.Ratio(1.0), overrides={"0": None, "4": None, "2": layer}, guard=False
        )
        networks[scheme] = rp.factorize(model, plan)
    return networks


def ready(
    networks: dict[str, nn.Module], x: torch.Tensor, backend: str, threads: int
) -> dict[str, Run]:
    """Calls of all networks; in ONNX the separable ones also as torch's exporter writes them."""
    runtime = Runtime(backend=backend, threads=threads)
    calls = {name: runtime.prepare(network, x) for name, network in networks.items()}
    reader = BACKENDS[backend]
    if not isinstance(reader, OnnxBackend):
        return calls
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FORMS:
            path = Path(folder, f"{name}.onnx")
            program = torch.onnx.export(networks[name], (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(path)
            calls[f"{name} by torch"] = reader.load(path, x, runtime)
    return calls


def measure(
    backend: str, channels: int, side: int, rank: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One layer at one rank on one runtime."""
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    calls = ready(variants(channels, rank), x, backend, options.threads)
    alternate(calls, 3)
    seconds = alternate(calls, 20 if options.quick else 200)
    row = {"backend": backend, "channels": channels, "side": side, "rank": rank}
    speedups = {n: ratios(seconds["dense"], s) for n, s in seconds.items() if n != "dense"}
    shown = ", ".join(f"{name} {value['median']:.2f}" for name, value in speedups.items())
    say(options, f"{backend}, {channels} channels on {side}×{side}, rank {rank}: {shown}")
    return {**row, "speedups": speedups}


def main() -> None:
    options = arguments(__doc__).parse_args()
    layers = LAYERS[:2] if options.quick else LAYERS
    torch.set_num_threads(options.threads)
    backends = [b for b in ("onnxruntime", "openvino", "eager") if BACKENDS[b].installed()]
    rows = [
        measure(backend, channels, side, rank, options)
        for backend in backends
        for channels, side in layers
        for rank in RANKS
    ]
    finish("separable", {"layers": rows}, options)


if __name__ == "__main__":
    main()
