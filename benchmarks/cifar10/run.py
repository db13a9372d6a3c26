"""Low-rank methods on CIFAR-10, all from the same dense weights and with the same training.

    .venv/bin/python benchmarks/cifar10/run.py --data DIR --weights FILE --model resnet20 \\
        --method ours --target 2.84 --epochs 6

Each row is written to results.json when it is done, in place of an older one; rows that are there
already are passed over unless --again is given, so a command that was killed can be run again.
`--validate` prints the accuracy on the 5,000 images kept back for choosing, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _harness import conditions  # noqa: E402
from case import Case, Result  # noqa: E402
from images import Part, load  # noqa: E402
from loop import Training, accuracy  # noqa: E402
from methods import METHODS, UNTARGETED, UNTRAINED  # noqa: E402
from networks import NETWORKS, build  # noqa: E402

import rankprune as rp  # noqa: E402

RESULTS = HERE / "results.json"
#: What tells rows apart.
KEY = ("model", "method", "target", "epochs", "seed")


def measured(case: Case, result: Result, part: Part) -> dict[str, Any]:
    """Costs against the dense network's, and accuracies in percent."""
    dense = rp.profile(case.trained.eval(), case.example)
    compact = rp.profile(result.compact.eval(), case.example)
    projected = None if result.projected is None else accuracy(result.projected, part)
    return {
        "flops_reduction": round(dense.flops / compact.flops, 3),
        "params_reduction": round(dense.params / compact.params, 3),
        "accuracy": round(accuracy(result.compact, part), 2),
        "projected_accuracy": None if projected is None else round(projected, 2),
    }


def keep(row: dict[str, Any]) -> None:
    """Put a row into results.json, and the dense network's accuracy beside all of its kind."""
    rows = [r for r in read() if any(r[k] != row[k] for k in KEY)] + [row]
    rows.sort(key=lambda r: [str(r[k]) for k in KEY])
    alike = ("model", "epochs", "seed")
    dense = {tuple(r[k] for k in alike): r["accuracy"] for r in rows if r["method"] == "dense"}
    for r in rows:
        r["dense_accuracy"] = dense.get(tuple(r[k] for k in alike))
    scratch = RESULTS.with_suffix(".tmp")
    scratch.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(scratch, RESULTS)


def read() -> list[dict[str, Any]]:
    """The rows so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", required=True, help="image folder, or torchvision:FOLDER")
    parser.add_argument("--weights", type=Path, help="dense .safetensors; default: from the seed")
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["ours"])
    parser.add_argument("--target", type=float, nargs="+", default=[2.84])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=Training.lr)
    parser.add_argument("--batch", type=int, default=Training.batch)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in training")
    parser.add_argument("--validate", action="store_true", help="for choosing: see above")
    parser.add_argument("--again", action="store_true", help="rows that are there already as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args.data)
    for seed in args.seed:
        for target in args.target:
            for method in args.method:
                key = {
                    "model": args.model,
                    "method": method,
                    "target": None if method in UNTARGETED else target,
                    "epochs": 0 if method in UNTRAINED else args.epochs,
                    "seed": seed,
                }
                if not (args.validate or args.again) and any(
                    all(row[k] == key[k] for k in KEY) for row in read()
                ):
                    print(f"{key}: there already", file=sys.stderr)
                    continue
                training = Training(
                    epochs=args.epochs,
                    lr=args.lr,
                    batch=args.batch,
                    seed=seed,
                    bf16=not args.fp32,
                )
                torch.manual_seed(seed)
                trained = build(args.model, args.weights, seed)
                case = Case(trained, data, training, target, args.model, args.data)
                started = time.perf_counter()
                result = METHODS[method](case)
                minutes = (time.perf_counter() - started) / 60
                part = data.validation if args.validate else data.test
                row = {**key, **measured(case, result, part), "minutes": round(minutes, 2)}
                print(json.dumps(row), flush=True)
                if not args.validate:
                    keep(
                        {
                            **row,
                            "lr": args.lr,
                            "batch": args.batch,
                            "precision": _precision(args),
                            **conditions(),
                        }
                    )


def _precision(args: argparse.Namespace) -> str:
    return "fp32" if args.fp32 else "bf16"


if __name__ == "__main__":
    main()
