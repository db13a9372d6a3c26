"""What the peers share: the networks, counting, the search for a budget, ONNX files, the report.

Imports nothing of rankprune: a peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NETWORKS = ("resnet18", "resnet50", "vgg16")
SHAPE = (1, 3, 224, 224)
OPSET = 20
# A network this far below the budget, relatively, ends the search.
CLOSE = 0.005
STEPS = 14
# Largest difference, relative to the largest output, of the ONNX file from the network.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Candidate:
    """A compressed network and what of the dense network's FLOPs it costs."""

    model: nn.Module
    knob: float
    fraction: float


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every peer has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--flops", type=float, default=0.5, help="compact/dense (default: 0.5)")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="relative, of --flops (default: 0.01)"
    )
    parser.add_argument(
        "--round-to", type=int, default=8, help="widths or ranks are multiples of this (default: 8)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx")
    return parser


def build(name: str) -> nn.Module:
    """The dense network, from the same random weights every time, in eval mode."""
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def flops(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> int:
    """FLOPs of one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(shape))
    return counter.get_total_flops()


def params(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def search(
    compress: Callable[[float], nn.Module],
    dense: int,
    budget: float,
    tolerance: float,
    low: float,
    high: float,
) -> Candidate:
    """Bisects the peer's knob until the compact network costs `budget` of the dense one's FLOPs.

    Args:
        compress: makes the compact network; a larger knob never costs fewer FLOPs.
        dense: FLOPs of the dense network.
        budget: compact FLOPs / dense FLOPs asked for.
        tolerance: how far from the budget a network may be, relatively.
        low: a knob that costs too little.
        high: a knob that costs too much.

    Returns:
        The candidate nearest to the budget, one within it where that is within the tolerance.

    Raises:
        SystemExit: nothing came within the tolerance.
    """
    seen: list[Candidate] = []
    for _ in range(STEPS):
        knob = (low + high) / 2
        model = compress(knob)
        candidate = Candidate(model, knob, flops(model) / dense)
        seen.append(candidate)
        print(f"knob {knob:.5f}: {candidate.fraction:.4f} of the FLOPs", file=sys.stderr)
        if candidate.fraction > budget:
            high = knob
        else:
            low = knob
            if candidate.fraction >= budget * (1 - CLOSE):
                break
    near = [c for c in seen if abs(c.fraction / budget - 1) <= tolerance]
    if not near:
        raise SystemExit(f"no knob gives {budget} of the FLOPs within {tolerance:.1%}")
    return min(near, key=lambda c: (c.fraction > budget, abs(c.fraction - budget)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's prints off stdout, which is the report's, and drops its warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export(model: nn.Module, path: Path) -> None:
    """Writes the network as one ONNX file of any batch size; BatchNorm is left to the runtime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, *SHAPE[1:]),),
            path,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def difference(model: nn.Module, path: Path) -> float:
    """Largest difference of the ONNX file from the network, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        x = torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected: Tensor = model(x)
        got = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        if not expected.isfinite().all():
            raise SystemExit("the compact network's outputs are not finite")
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return worst


def finish(
    peer: str, network: str, dense: nn.Module, found: Candidate, settings: Any, path: Path
) -> None:
    """Writes and checks the ONNX file, then prints the report."""
    export(found.model, path)
    error = difference(found.model, path)
    if not error <= AGREEMENT:
        raise SystemExit(f"{path}: differs from the network by {error:.2e}")
    report = {
        "peer": peer,
        "version": importlib.metadata.version(peer),
        "torch": torch.__version__,
        "network": network,
        "settings": settings,
        "flops_fraction": round(found.fraction, 5),
        "params_fraction": round(params(found.model) / params(dense), 5),
        "opset": OPSET,
        "onnx_difference": float(f"{error:.2e}"),
    }
    print(json.dumps(report))


logging.getLogger("torch.onnx").setLevel(logging.ERROR)
