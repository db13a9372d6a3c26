"""Low-rank methods on CIFAR-10, all from the same dense weights and with the same training.

    .venv/bin/python benchmarks/cifar10/run.py --data DIR --weights FILE --model resnet20 \\
        --method ours --target 2.84 --epochs 6

Each row is written to results.json when it is done, in place of an older one; rows that are there
already are passed over unless --again is given, so a command that was killed can be run again.
`--validate` prints the accuracy on the 5,000 images kept back for choosing, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _harness import conditions  # noqa: E402
from case import Case, Result  # noqa: E402
from images import Cifar, Part, load  # noqa: E402
from loop import Training, accuracy  # noqa: E402
from methods import METHODS, UNTARGETED, UNTRAINED  # noqa: E402
from networks import NETWORKS, build  # noqa: E402

import rankprune as rp  # noqa: E402

RESULTS = HERE / "results.json"
#: What tells rows apart.
KEY = ("model", "start", "method", "target", "epochs", "seed")


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


_KEEPING = threading.Lock()


def keep(row: dict[str, Any]) -> None:
    """Put a row into results.json, and the dense network's accuracy beside all of its kind."""
    with _KEEPING:
        rows = [r for r in read() if any(r[k] != row[k] for k in KEY)] + [row]
        rows.sort(key=lambda r: [str(r[k]) for k in KEY])
        alike = ("model", "start", "epochs", "seed")
        dense = {tuple(r[k] for k in alike): r["accuracy"] for r in rows if r["method"] == "dense"}
        for r in rows:
            r["dense_accuracy"] = dense.get(tuple(r[k] for k in alike))
        scratch = RESULTS.with_suffix(".tmp")
        scratch.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(scratch, RESULTS)


def read() -> list[dict[str, Any]]:
    """The rows so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def run(key: dict[str, Any], target: float, data: Cifar, args: argparse.Namespace) -> None:
    """Make one row: train, measure, print, and keep it unless validating."""
    training = Training(
        epochs=args.epochs, lr=args.lr, batch=args.batch, seed=key["seed"], bf16=not args.fp32
    )
    with _own_stream(args.device):
        model = build(args.model, args.weights, key["seed"]).to(args.device)
        case = Case(model, data, training, target)
        started = time.perf_counter()
        result = METHODS[key["method"]](case)
        minutes = (time.perf_counter() - started) / 60
        part = data.validation if args.validate else data.test
        row = {**key, **measured(case, result, part), "minutes": round(minutes, 2)}
    print(json.dumps(row), flush=True)
    if args.out:
        state = {k: v.cpu().contiguous() for k, v in result.compact.state_dict().items()}
        save_file(state, args.out)
    if not args.validate:
        precision = "fp32" if args.fp32 else "bf16"
        settings = {"lr": args.lr, "batch": args.batch, "precision": precision, "jobs": args.jobs}
        keep({**row, **settings, **conditions()})


def _own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """What runs beside other rows on a GPU must not wait for them."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


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
    parser.add_argument("--out", type=Path, help="keep a row's weights, as .safetensors")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, for a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # accuracies are read in fp32
    data = load(args.data, workers=max(2, args.threads)).to(args.device)
    rows = []
    for seed, target, method in itertools.product(args.seed, args.target, args.method):
        key = {
            "model": args.model,
            "start": args.weights.stem if args.weights else "random",
            "method": method,
            "target": None if method in UNTARGETED else target,
            "epochs": 0 if method in UNTRAINED else args.epochs,
            "seed": seed,
        }
        known = () if args.validate or args.again else read()
        if any(all(row[k] == key[k] for k in KEY) for row in known):
            print(f"{key}: there already", file=sys.stderr)
        elif key not in [other for other, _ in rows]:
            rows.append((key, target))
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = [pool.submit(run, key, target, data, args) for key, target in rows]
        for row in pending:
            row.result()


if __name__ == "__main__":
    main()
