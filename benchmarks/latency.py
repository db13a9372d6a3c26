"""Milliseconds kept: latency budgets, FLOPs budgets that never slow down, FLOPs that pay off.

Three parts. `budget`: Budget(latency=0.5), and what the network then really takes. `zoo`:
Budget(flops=0.5) with a runtime over torchvision's classifiers. `realised`: the speed-up over the
FLOPs reduction at half the FLOPs on every backend, beside AIMET's spatial SVD and Torch-Pruning at
the same FLOPs (their ONNX files come from `peers/`). Rows are written as they are measured.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from _harness import RESULTS, arguments, conditions, finish, ratios, say
from torch import nn

import rankprune as rp
from rankprune.export import feed, onnx_session
from rankprune.latency import timings
from rankprune.recipes.bench import bench

PARTS = ("budget", "zoo", "realised")
NETWORKS = ("resnet18", "resnet50", "vgg16", "vit_b_16")
ZOO = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11_bn",
    "wide_resnet50_2",
)
PEERS = ("aimet", "torch-pruning")


def network(name: str) -> nn.Module:
    """A torchvision classifier with random weights: no time depends on them."""
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    if getattr(model, "aux_logits", False):
        model.aux_logits = False
        for head in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, head):
                setattr(model, head, None)
    return model


def inputs(name: str, batch: int, options: argparse.Namespace) -> torch.Tensor:
    side = 64 if options.quick else 299 if name == "inception_v3" else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def latency_budget(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Plan to half the time, then measure anew with the real factors."""
    model, x = network(name), inputs(name, batch, options)
    table = rp.LatencyTable(rp.Runtime(threads=options.threads))
    try:
        plan = rp.make_plan(model, rp.Budget(latency=0.5), example_inputs=x, runtime=table)
    except rp.BudgetError as error:
        return {"network": name, "batch": batch, "budget": 0.5, "refused": str(error)}
    measured = _bench(rp.factorize(model, plan), x, options, ["onnxruntime"])
    row = measured["backends"]["onnxruntime"]
    return {
        "network": name,
        "batch": batch,
        "budget": 0.5,
        "latency": 1 / row["speedup"],
        "dense_ms": row["dense_ms"],
        "compact_ms": row["compact_ms"],
        "spread": row["spread"],
        "flops_reduction": measured["flops_reduction"],
        "realised": row["realised"],
        "variants_measured": table.measured,
        "variants_reused": table.reused,
    }


def flops_budget(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Half the FLOPs where that is never slower; what it says where it cannot be."""
    model, x = network(name), inputs(name, 1, options)
    runtime = rp.Runtime(threads=options.threads)
    try:
        plan = rp.make_plan(model, rp.Budget(flops=0.5), example_inputs=x, runtime=runtime)
    except rp.BudgetError as error:
        return {"network": name, "left_dense": str(error), "closest": error.closest}
    measured = _bench(rp.factorize(model, plan), x, options, ["onnxruntime"])
    row = measured["backends"]["onnxruntime"]
    return {
        "network": name,
        "latency": 1 / row["speedup"],
        "spread": row["spread"],
        "flops_reduction": measured["flops_reduction"],
        "realised": row["realised"],
        "factorised": len(plan.factorized),
        "layers": len(plan.layers),
    }


def realised(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Half the FLOPs on every backend, and the same by two peers on ONNX Runtime."""
    model, x = network(name), inputs(name, 1, options)
    # the FLOPs alone, and with the time that they should buy
    budgets = {
        "flops": rp.Budget(flops=0.5),
        "flops_and_latency": rp.Budget(flops=0.5, latency=0.54),
    }
    row: dict[str, Any] = {"network": name}
    for label, budget in budgets.items():
        runtime = rp.Runtime(threads=options.threads)
        try:
            plan = rp.make_plan(model, budget, example_inputs=x, runtime=runtime)
        except rp.BudgetError as error:
            row[label] = {"refused": str(error)}
            continue
        compact = rp.factorize(model, plan)
        row[label] = _bench(compact, x, options, ["onnxruntime"] if options.quick else [])
        if label == "flops":
            row["peers"] = _peers(name, model, x, options)
    return row


def _bench(
    compact: nn.Module, x: torch.Tensor, options: argparse.Namespace, backends: list[str]
) -> dict[str, Any]:
    result = bench(
        compact,
        example_inputs=x,
        backends=backends,
        threads=options.threads,
        seconds=2 if options.quick else 10,
        memory=False,
    )
    keep = ("dense_ms", "compact_ms", "speedup", "realised", "spread", "rounds")
    result["backends"] = {
        backend: {key: row[key] for key in keep} for backend, row in result["backends"].items()
    }
    return result


def _peers(
    name: str, model: nn.Module, x: torch.Tensor, options: argparse.Namespace
) -> dict[str, Any]:
    """The peers' networks against the dense one, where their files are at hand."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "dense.onnx")
        rp.export_onnx(model, dense, example_inputs=x, check=False)
        for peer in PEERS:
            made = options.peers / f"{peer}-{name}.onnx"
            described = options.peers / f"{peer}-{name}.json"
            if not (made.exists() and described.exists()):
                say(options, f"  no {made} and {described.name}: {peer} is left out")
                continue
            sessions = {"dense": onnx_session(dense, options.threads)}
            sessions[peer] = onnx_session(made, options.threads)
            calls = {k: partial(s.run, None, feed(x, s)) for k, s in sessions.items()}
            seconds = timings(calls, 2 if options.quick else 10)
            speedup = ratios(seconds["dense"], seconds[peer])
            about = json.loads(described.read_text())
            found[peer] = {
                "speedup": speedup,
                "flops_reduction": 1 / about["flops_fraction"],
                "realised": speedup["median"] * about["flops_fraction"],
                "version": about["version"],
                "settings": about["settings"],
            }
    return found


def keep(part: str, row: dict[str, Any], options: argparse.Namespace) -> None:
    """Add a row to the results, in place of an older one of the same case."""
    if not options.save:
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latency.json"
    with open(path, "a+") as stream:  # several parts may run at the same time
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        document = json.loads(stream.read() or "{}")
        rows = document.setdefault(part, [])
        case = (row["network"], row.get("batch"), row["threads"])
        rows[:] = [r for r in rows if (r["network"], r.get("batch"), r["threads"]) != case]
        rows.append(row)
        rows.sort(key=lambda r: (r["network"], r.get("batch") or 0, r["threads"]))
        stream.truncate(0)
        stream.write(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--networks", nargs="+", help="instead of the part's own")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--peers", type=Path, default=Path("peers-onnx"), help="the peers' files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {}
    for part in options.part or PARTS:
        names = options.networks or {"budget": NETWORKS, "zoo": ZOO, "realised": NETWORKS[:3]}[part]
        batches: list[int] = options.batch if part == "budget" else [1]
        if options.quick:
            names, batches = ("resnet18",), [1]
        for name in names:
            for batch in batches:
                if part == "budget":
                    row = latency_budget(name, batch, options)
                elif part == "zoo":
                    row = flops_budget(name, options)
                else:
                    row = realised(name, options)
                row |= {"quick": options.quick, **conditions()}
                say(options, json.dumps(row))
                keep(part, row, options)
                result.setdefault(part, []).append(row)
    options.save = False  # rows are kept already
    finish("latency", result, options)


if __name__ == "__main__":
    main()
