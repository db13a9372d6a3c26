"""What every benchmark here shares: fair timing, the conditions of a run, results on disk."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import rankprune
from rankprune.runtimes import alternate, processor

__all__ = [
    "RESULTS",
    "add_device",
    "alternate",
    "arguments",
    "conditions",
    "finish",
    "peak_memory",
    "ratios",
    "say",
    "spread",
    "suffix",
    "wait",
]
RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer cases")
    parser.add_argument("--json", action="store_true", help="print the result, and nothing else")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option of those benchmarks that run on a GPU too."""
    parser.add_argument("--device", default="cpu", help="such as cuda")


def suffix(options: argparse.Namespace) -> str:
    """What tells a result's file from the CPU's."""
    return "" if options.device == "cpu" else f"-{torch.device(options.device).type}"


def wait(device: str) -> None:
    """Until the device has done all that it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Of calls that were made one after the other, pair by pair."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which a call raises the process's resident memory at its highest."""
    process = psutil.Process()
    gc.collect()
    # what was freed before must go back to the system, or it would be used unseen
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = highest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return highest - before


def conditions() -> dict[str, Any]:
    """Versions, machine, date, commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "rankprune": rankprune.__version__,
        "torch": torch.__version__,
        "cpu": processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def finish(name: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result and, where asked, keep it."""
    result = {"benchmark": name, "quick": options.quick, **conditions(), **_rounded(result)}
    text = json.dumps(result, indent=1)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n")
    if options.json:
        print(text)


def say(options: argparse.Namespace, text: str) -> None:
    """A line of progress; on stderr where stdout is for the result."""
    print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value - 1) > 0.01 else round(value, 9)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
