"""What the peers of the CIFAR-10 comparison share: options, counting, and the file handed over.

Imports nothing of rankprune: a peer runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "cifar10"))
from compressed import fingerprint, load, location, save
from images import Part, accuracy
from images import load as load_images
from networks import NETWORKS, build

SHAPE = (1, 3, 32, 32)
OUT = Path(__file__).parent.parent / "cifar10" / "compressed"


@dataclass(frozen=True)
class Task:
    """What to compress, to which FLOPs, and the images to judge by.

    Attributes:
        peer: its name in the files' names.
        package: its name in the registry.
        network: name in `NETWORKS`.
        weights: of the dense network.
        targets: FLOPs of the dense network / FLOPs asked for.
        validation: the images kept back from training.
        images: how many of them to judge by while compressing.
        out: folder of the files.
    """

    peer: str
    package: str
    network: str
    weights: Path
    targets: list[float]
    validation: Part
    images: int
    out: Path

    def dense(self) -> nn.Module:
        """The network to compress, in eval mode."""
        return build(self.network, self.weights, 0).eval()

    def chosen(self) -> Part:
        """Some of the images kept back. They lie by class, so it takes a draw."""
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(self.validation), generator=generator)[: self.images]
        return Part(self.validation.pixels[index], self.validation.labels[index])

    def finish(self, compact: nn.Module, target: float, settings: dict[str, Any]) -> None:
        """Write the file, check that it gives the same network, and report."""
        dense = self.dense()
        before = flops(dense)
        about = {
            "peer": self.package,
            "version": importlib.metadata.version(self.package),
            "torch": torch.__version__,
            "target": target,
            "settings": settings,
        }
        path = location(self.out, self.peer, self.network, target, fingerprint(dense))
        save(path, compact, self.network, dense, about)
        loaded, _ = load(path)
        x = torch.randn(4, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = (loaded.eval()(x) - compact.eval()(x)).abs().max().item()
        reduction = before / flops(loaded)
        if error > 1e-4 or reduction < target:
            path.unlink()
            raise SystemExit(f"{path}: differs by {error:.1e}, {reduction:.3f} times fewer FLOPs")
        report = {
            **about,
            "network": self.network,
            "flops_reduction": round(reduction, 4),
            "params_reduction": round(_common.params(dense) / _common.params(loaded), 4),
            "validation_accuracy": round(accuracy(loaded, self.validation), 2),
            "file": str(path),
        }
        print(json.dumps(report), flush=True)


def options(description: str | None) -> argparse.ArgumentParser:
    """What every peer is asked."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--weights", type=Path, required=True, metavar="DENSE.safetensors")
    parser.add_argument("--model", choices=list(NETWORKS), required=True)
    parser.add_argument("--target", type=float, nargs="+", required=True)
    parser.add_argument("--data", required=True, help="as for benchmarks/cifar10/run.py")
    parser.add_argument(
        "--images", type=int, default=5000, help="of those kept back, to judge by (default: all)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the compressed networks")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def task(peer: str, package: str, args: argparse.Namespace) -> Task:
    """From the command line."""
    torch.set_num_threads(args.threads)
    return Task(
        peer,
        package,
        args.model,
        args.weights.resolve(),
        args.target,
        load_images(args.data).validation,
        args.images,
        args.out.resolve(),
    )


def flops(model: nn.Module) -> int:
    """FLOPs of one image."""
    return _common.flops(model, SHAPE)
