"""Processes of their own, and what a training run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_WORLD = 2
#: Marks of tests that fork, which need import nothing again.
FORKS = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # later Pythons warn of a fork beside threads
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def in_child(call: Callable[[], Any]) -> int:
    """Start a call in a forked process, which exits with 1 if it raises; returns its number."""
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        # torch mends its thread pool at its first call after a fork, and not if threads race to it
        torch.set_num_threads(torch.get_num_threads())
        call()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def apart(call: Callable[[], Any]) -> None:
    """Check something in a forked process: after torch.compile no fork computes gradients."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later Pythons warn of a fork beside threads
        child = in_child(call)
    assert exit_code(child) == 0


def command_line(*args: object) -> None:
    """What `rankprune` does with these arguments, in this process."""
    from rankprune.cli import main

    sys.argv = ["rankprune", *map(str, args)]
    main()


def exit_code(child: int) -> int:
    """Wait for a forked process; negative where a signal has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cli(*args: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a forked process, which need not import torch again."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def run() -> None:
            for stream, number in ((out, 1), (err, 2)):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = out, err
            os.chdir(cwd or os.getcwd())
            command_line(*args)

        status = exit_code(in_child(run))
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(args, status, out.read(), err.read())
    assert status == code, done
    return done


def wait_for(path: Path, alive: Callable[[], bool]) -> None:
    """Until a file is there, which a process writes that must live till then."""
    deadline = time.monotonic() + 600
    while not path.exists():
        assert alive(), "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def torchrun(processes: int, *args: object, out: Path, restarts: int = 0) -> list[str]:
    """The command of a run of several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += ["-m", "rankprune.cli", *map(str, args)]
    return [*command, "--out", str(out), "--json"]


def _start(rank: int, folder: str, worker: Callable[[int], Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=_WORLD,
        timeout=timedelta(minutes=3),  # a crowded machine may keep one of them waiting
    )
    try:
        torch.save(worker(rank, *args), f"{folder}/{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def in_two_processes(folder: Path, worker: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns in each of two forked processes."""
    arguments = (str(folder), worker, args)
    torch.multiprocessing.start_processes(_start, arguments, nprocs=_WORLD, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(_WORLD)]


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states agree to the bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def records(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, without those of the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clock = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
