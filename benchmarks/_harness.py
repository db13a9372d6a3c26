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
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer cases")
    parser.add_argument("--json", action="store_true", help="print the result, and nothing else")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def alternate(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    prepare: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call; the variants take turns, so that a slow minute slows all of them.

    Args:
        variants: what to time, by name.
        repeats: calls of each.
        prepare: done before every call, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            prepare()
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


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
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run(
        [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "python": platform.python_version(),
        "rankprune": version("rankprune"),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


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
