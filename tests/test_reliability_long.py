"""A long run, and processes that die in a run of several."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import rankprune as rp
from conftest import Trials
from rankprune.recipes.bench import _status_bytes
from runs import FORKS, equal, in_two_processes, torchrun, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), *FORKS]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _held() -> int:
    """Bytes of this process's own; how much of files is in memory depends on what else runs."""
    own = _status_bytes("RssAnon")
    if own is None:
        return psutil.Process().memory_info().rss
    return own + (_status_bytes("VmSwap") or 0)


def test_memory_and_ranks(trials: Trials) -> None:
    """10,000 steps of TRP: memory does not grow, ranks are exact at the end."""
    steps = 10_000 if trials.full else 1500
    model = _network()
    x = torch.randn(8, 3, 8, 8)
    labels = torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = rp.TRP(
        rank=rp.Budget(flops=0.4), every=2, start=steps // 10, descent=steps // 2, nuclear=1e-3
    )
    trp = rp.attach(model, optimizer, options, example_inputs=x)
    memory = []
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        if step % (steps // 100) == 0 and step >= steps // 5:  # what is made once has been made
            gc.collect()
            memory.append(_held())
    with trials.one():
        slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] * 100 / steps
        trials.note = f"{slope:.0f} bytes a step"
        # keeping the smallest weight of each projection would be 860 bytes a step
        assert slope < (100 if trials.full else 500)
    plan = trp.finish()
    for layer in plan.factorized:
        with trials.one():
            assert layer.spec is not None
            module: Any = model.get_submodule(layer.name)
            matrix = rp.SCHEMES[str(layer.scheme)].to_matrix(layer.spec, module.weight.detach())
            sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
            assert (sigma[..., layer.rank :] <= 1e-6 * sigma[..., :1]).all()
    with trials.one(), torch.no_grad():
        model.eval()
        compact = rp.factorize(model, plan).eval()
        assert torch.allclose(compact(x), model(x), rtol=1e-5, atol=1e-5 * float(model(x).max()))


def _replica(rank: int, steps: int) -> dict[str, Any]:
    model = _network()
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = rp.TRP(rank=rp.Budget(params=0.4), every=2, descent=steps // 2, nuclear=1e-3)
    trp = rp.attach(replica, optimizer, options)
    generator = torch.Generator().manual_seed(rank)
    history = []
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(replica(x), torch.arange(4)).backward()
        optimizer.step()
        if step % (steps // 10) == 0:
            history.append([p.detach().clone() for p in model.parameters()])
    plan = trp.finish()
    history.append([p.detach().clone() for p in model.parameters()])
    return {"history": history, "plan": plan.to_json()}


def test_replicas(tmp_path: Path, trials: Trials) -> None:
    """10,000 steps in two processes: weights and plan are the same bits, at eleven moments."""
    steps = 10_000 if trials.full else 200
    one, other = in_two_processes(tmp_path, _replica, steps)
    assert one["plan"] == other["plan"]
    for mine, yours in zip(one["history"], other["history"], strict=True):
        with trials.one():
            assert equal(mine, yours)


# -- a process that dies ---------------------------------------------------------------------------

OPTIONS = ["train", "--data=fake", "--model=digits_cnn", "--flops=0.4", "--scheme=spatial"]
OPTIONS += ["--image-size=16", "--batch-size=64", "--checkpoint-every=2"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    # else restarted workers may find the addresses of the dead ones, as docs/reliability.md says
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def _workers(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "rankprune.cli" in child.cmdline()
    ]


def test_a_dead_worker_ends_the_run(tmp_path: Path, trials: Trials) -> None:
    """One of two processes killed: the run ends within a minute, and says so."""
    for victim in trials.count(4, 1):
        out, workers = tmp_path / f"out{victim}", []
        command = torchrun(2, *OPTIONS, "--epochs=1000", out=out)
        with trials.one(), (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
            try:
                wait_for(out / "checkpoint.pt", lambda p=process: p.poll() is None)  # type: ignore[misc]
                workers = sorted(_workers(process), key=lambda worker: worker.pid)
                assert len(workers) == 2
                workers[victim % 2].kill()
                began = time.monotonic()
                assert process.wait(600) != 0
                # a crowded machine may take longer, and is not asked
                assert not trials.full or time.monotonic() - began < 60
                assert not any(worker.is_running() for worker in workers)
                text = (tmp_path / "log").read_text()
                assert re.search(r"exitcode *: -9|Signal 9 \(SIGKILL\)", text), text
            finally:
                process.kill()
                process.wait()
                for worker in workers:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()


def test_torchrun_restarts(tmp_path: Path, trials: Trials) -> None:
    """One of two killed, with --max-restarts=1 and --resume auto: ends as the undisturbed run."""
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    for out in (straight, disturbed):
        command = torchrun(2, *OPTIONS, "--epochs=6", "--resume=auto", out=out, restarts=1)
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
        )
        if out == disturbed:
            wait_for(out / "checkpoint.pt", lambda p=process: p.poll() is None)  # type: ignore[misc]
            os.kill(_workers(process)[-1].pid, signal.SIGKILL)
        _, log = process.communicate()
        assert process.returncode == 0, log
    with trials.one():
        states = [
            rp.load(_digits_cnn(), out / "compact").state_dict() for out in (straight, disturbed)
        ]
        assert equal(*states)
        reports = [json.loads((out / "report.json").read_text()) for out in (straight, disturbed)]
        assert reports[0] == reports[1]


def _digits_cnn() -> nn.Module:
    from rankprune.recipes.models import build_model

    return build_model("digits_cnn", classes=10, channels=3)
