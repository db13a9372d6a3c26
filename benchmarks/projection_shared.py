"""Projecting a network's layers in two processes against one, one thread each (gloo).

The weights move by small random steps between projections, the same ones in both processes.
"""

from __future__ import annotations

import argparse
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _harness import arguments, finish, ratios, say, spread
from _networks import NETWORKS

import rankprune as rp

RATIO = 0.25
MOVED = 1e-3  # of a weight's norm


def _worker(rank: int, port: int, name: str, repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = NETWORKS[name].build()
    options = rp.TRP(rank=rp.Ratio(RATIO), scheme="channel", guard=False)
    alone = rp.Controller(model, options)
    shared = rp.Controller(model, options, process_group=dist.group.WORLD)
    found: dict[str, dict[str, list[float]]] = {}
    weights = [w.detach().clone() for w in model.parameters()]
    alone.project()
    start = alone.state_dict()
    for phase in ("cold", "steady"):
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(repeats + 1):
            if phase == "steady":
                with torch.no_grad():
                    for moved, weight in zip(weights, model.parameters(), strict=True):
                        noise = torch.randn_like(weight)
                        moved.copy_(weight + noise * (MOVED * weight.norm() / noise.norm()))
            for kind, controller in (("one", alone), ("two", shared)):
                with torch.no_grad():
                    for weight, moved in zip(model.parameters(), weights, strict=True):
                        weight.copy_(moved)
                if phase == "cold":
                    for target in (state := controller.state_dict())["layers"].values():
                        target["start"] = None
                    controller.load_state_dict(state)
                elif not controller.state_dict()["layers"]:
                    controller.load_state_dict(start)
                dist.barrier()
                begin = time.perf_counter()
                if kind == "two" or rank == 0:
                    controller.project()
                dist.barrier()
                seconds[kind].append(time.perf_counter() - begin)
            if rank == 1:  # as it was left by process 0
                alone.load_state_dict(shared.state_dict())
        found[phase] = {kind: values[1:] for kind, values in seconds.items()}
    if rank == 0:
        results.put(found)
    dist.barrier()  # nobody leaves while the other still talks
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--repeats", type=int, default=5)
    options: argparse.Namespace = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    mp.spawn(_worker, (port, options.network, repeats, results), nprocs=2)
    found = results.get()
    entry = {
        phase: {
            "seconds": {kind: spread(values) for kind, values in seconds.items()},
            "two_by_one": ratios(seconds["two"], seconds["one"]),
        }
        for phase, seconds in found.items()
    }
    for phase, values in entry.items():
        say(
            options,
            f"{options.network} {phase}: {values['two_by_one']['median']:.2f} of one's time",
        )
    finish(f"projection_shared-{options.network}", {"threads_each": 1, **entry}, options)


if __name__ == "__main__":
    main()
