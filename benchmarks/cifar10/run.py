"""Low-rank methods on CIFAR-10, all from the same dense weights and with the same training.

    .venv/bin/python benchmarks/cifar10/run.py --data DIR --weights FILE --model resnet20 \\
        --method ours --target 2.84 --epochs 6

Each row is written to results.json when it is done, in place of an older one; rows that are there
already are passed over unless --again is given, so a command that was killed can be run again.
`--validate` reads the accuracy on the 5,000 images kept back for choosing, and writes to
validation.json. `--grid FILE` makes the rows of many commands, one a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from _harness import conditions  # noqa: E402
from case import Case, Result  # noqa: E402
from images import Cifar, Part, accuracy, load  # noqa: E402
from loop import Training  # noqa: E402
from methods import METHODS, UNTARGETED, UNTRAINED  # noqa: E402
from networks import NETWORKS, build  # noqa: E402

import rankprune as rp  # noqa: E402

#: What tells rows apart.
KEY = ("model", "start", "method", "target", "epochs", "lr", "seed")


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


def keep(row: dict[str, Any], file: Path) -> None:
    """Put a row into a file of results, and the dense network's accuracy beside all of its kind."""
    rows = [r for r in read(file) if any(r.get(k) != row[k] for k in KEY)] + [row]
    rows.sort(key=lambda r: [str(r.get(k)) for k in KEY])
    alike = ("model", "start", "epochs", "lr", "seed")
    dense = {tuple(r[k] for k in alike): r["accuracy"] for r in rows if r["method"] == "dense"}
    for r in rows:
        r["dense_accuracy"] = dense.get(tuple(r[k] for k in alike))
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(scratch, file)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return json.loads(file.read_text()) if file.exists() else []


@dataclass(frozen=True)
class Row:
    """What is to be made: what tells it from other rows, and how.

    Attributes:
        key: values of `KEY`.
        target: FLOPs reduction, also for a method whose row has none.
        args: the options it was asked for by.
    """

    key: dict[str, Any]
    target: float
    args: argparse.Namespace

    @property
    def there(self) -> bool:
        """Whether the file of results has it, and its weights are where they are to be."""
        lost = self.args.out and not self.args.out.exists()
        known = () if self.args.again or lost else read(self.args.results)
        return any(all(row.get(k) == self.key[k] for k in KEY) for row in known)

    def make(self, data: Cifar) -> dict[str, Any]:
        """Train and measure."""
        args, seed = self.args, self.key["seed"]
        training = Training(
            epochs=args.epochs, lr=args.lr, batch=args.batch, seed=seed, bf16=not args.fp32
        )
        model = build(args.model, args.weights, seed).to(args.device)
        case = Case(model, data, training, self.target, args.model, args.data)
        started = time.perf_counter()
        result = METHODS[self.key["method"]](case)
        minutes = (time.perf_counter() - started) / 60
        part = data.validation if args.validate else data.test
        if args.out:
            state = {k: v.cpu().contiguous() for k, v in result.compact.state_dict().items()}
            save_file(state, args.out)
        return {
            **self.key,
            **measured(case, result, part),
            "minutes": round(minutes, 2),
            "batch": args.batch,
            "precision": "fp32" if args.fp32 else "bf16",
            "jobs": args.jobs,
            **conditions(),
        }


def prepared(args: argparse.Namespace) -> Cifar:
    """The data on its device, and torch set up for what follows."""
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # accuracies are read in fp32
    return load(args.data, workers=max(2, args.threads)).to(args.device)


_worker: dict[str, Cifar] = {}


def _prepare_worker(args: argparse.Namespace) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["data"] = prepared(args)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, whose rows nobody would write down."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make_in_worker(row: Row) -> dict[str, Any]:
    return row.make(_worker["data"])


def made(rows: list[Row], args: argparse.Namespace) -> Iterator[tuple[Row, Future[dict[str, Any]]]]:
    """Rows as they are done: one after the other here, or several at a time in processes."""
    if args.jobs == 1:
        data = prepared(args)
        for row in rows:
            future: Future[dict[str, Any]] = Future()
            try:
                future.set_result(row.make(data))
            except Exception as error:  # the other rows go on
                future.set_exception(error)
            yield row, future
        return
    with ProcessPoolExecutor(
        args.jobs, mp_context=get_context("spawn"), initializer=_prepare_worker, initargs=(args,)
    ) as pool:
        pending = {pool.submit(_make_in_worker, row): row for row in rows}
        for future in as_completed(pending):
            yield pending[future], future


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help="image folder, what images.py made of it, torchvision:DIR")
    parser.add_argument("--weights", type=Path, help="dense .safetensors; default: from the seed")
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["ours"])
    parser.add_argument("--target", type=float, nargs="+", default=[2.84])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--lr", type=float, default=Training.lr, help="peak of the one-cycle schedule"
    )
    parser.add_argument("--batch", type=int, default=Training.batch)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in training")
    parser.add_argument("--validate", action="store_true", help="for choosing: see above")
    parser.add_argument("--again", action="store_true", help="rows that are there already as well")
    parser.add_argument("--results", type=Path, help="default: results.json or validation.json")
    parser.add_argument("--out", type=Path, help="keep a row's weights, as .safetensors")
    parser.add_argument("--grid", type=Path, help="options for rows, a line each; # and $NAME work")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in a process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def _asked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[Row]:
    """The rows that a command or the lines of a grid ask for."""
    if args.grid:
        for line in args.grid.read_text().splitlines():
            words = shlex.split(os.path.expandvars(line), comments=True)
            if words:
                common = argparse.Namespace(**{**vars(args), "grid": None})
                yield from _asked(parser, parser.parse_args(words, common))
        return
    if args.results is None:
        args.results = HERE / ("validation.json" if args.validate else "results.json")
    for seed, target, method in itertools.product(args.seed, args.target, args.method):
        epochs = 0 if method in UNTRAINED else args.epochs
        key = {
            "model": args.model,
            "start": args.weights.stem if args.weights else "random",
            "method": method,
            "target": None if method in UNTARGETED else target,
            "epochs": epochs,
            "lr": args.lr if epochs else None,
            "seed": seed,
        }
        yield Row(key, target, args)


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if not args.data:
        parser.error("--data is needed")
    rows: dict[tuple[Any, ...], Row] = {}
    for row in _asked(parser, args):
        if row.there:
            print(f"{row.key}: there already", file=sys.stderr)
        else:  # a method without a target is asked for with each
            rows.setdefault((row.args.results, *row.key.values()), row)
    failed = 0
    for row, future in made(list(rows.values()), args):
        error = future.exception()
        if error is None:
            print(json.dumps(future.result()), flush=True)
            keep(future.result(), row.args.results)
        else:
            failed += 1
            traceback.print_exception(error)
            print(f"{row.key}: failed", file=sys.stderr, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
