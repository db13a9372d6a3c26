"""Functions of tensors as CUDA graphs, which are launched by one call.

On a GPU the hundreds of calls that project small layers take longer than what they ask for. The
second time that tensors of the same shapes come, the calls are recorded, and from then on replayed
on tensors that are copied into the places they were recorded with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor

# What a graph may do at a time.
BRANCHES = 3
# Graphs that a thread keeps, with all that they compute: those of two models, for ranks that have
# been left do not come back.
KEPT = 4

T = TypeVar("T")
_capturing = threading.Lock()


@dataclass(frozen=True)
class _Recording:
    """A graph with its inputs' places, and what it computes there."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    result: Any

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        torch._foreach_copy_(self.places, list(tensors))
        self.graph.replay()
        return self.result


class _Own(threading.local):
    """What a thread has seen: recordings, or None before the second time and where none can be.

    And its streams to record in, few, for what libraries allocate for a stream is never freed.
    """

    def __init__(self) -> None:
        self.seen: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self.tried: set[Hashable] = set()
        self.streams: dict[torch.device, list[torch.cuda.Stream]] = {}

    def on(self, device: torch.device) -> list[torch.cuda.Stream]:
        if device not in self.streams:
            self.streams[device] = [torch.cuda.Stream(device) for _ in range(1 + BRANCHES)]
        return self.streams[device]


_own = _Own()


def replayed(
    compute: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], *, key: Hashable
) -> Any:
    """What a function gives, by a replay; None where it is not recorded.

    Args:
        compute: does the same calls for all tensors of these shapes and dtypes, and waits for
            nothing.
        tensors: on one GPU.
        key: what else decides on the calls.

    Returns:
        What `compute` has returned when it was recorded. Its tensors are overwritten by the next
        replay.
    """
    key = (key, tensors[0].device, *((tensor.shape, tensor.dtype) for tensor in tensors))
    seen = _own.seen
    if key not in seen:
        seen[key] = None
        while len(seen) > KEPT:
            _own.tried.discard(seen.popitem(last=False)[0])
        return None
    seen.move_to_end(key)
    if key not in _own.tried:
        _own.tried.add(key)
        seen[key] = _record(compute, tensors)
    recording = seen[key]
    return None if recording is None else recording.replay(tensors)


def beside(items: Iterable[T]) -> Iterator[T]:
    """What a loop does for each item, without need of the others: a recording does it side by side.

    Tensors of an item may be used in another such loop for the item in the same place, and by
    everything after the loop.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        yield from items
        return
    main = torch.cuda.current_stream()
    branches = _own.on(main.device)[1:]
    begun = main.record_event()
    for branch in branches:
        branch.wait_event(begun)
    for item, branch in zip(items, cycle(branches)):
        with torch.cuda.stream(branch):
            yield item
    for branch in branches:
        main.wait_stream(branch)


def _record(
    compute: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]
) -> _Recording | None:
    """None where a library waits for the device in between."""
    device = tensors[0].device
    places = [torch.empty_like(tensor) for tensor in tensors]
    stream = _own.on(device)[0]
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with _capturing, torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = compute(places)
        except RuntimeError:
            result = None
        try:
            graph.capture_end()
        except RuntimeError:
            result = None
    return None if result is None else _Recording(graph, places, result)
