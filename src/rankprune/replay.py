"""Functions of tensors as CUDA graphs, which are launched by one call.

On a GPU the hundreds of calls that project small layers take longer than what they ask for. The
second time that tensors of the same shapes come, the calls are recorded, and from then on replayed
on tensors that are copied into the places they were recorded with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Larger tensors take longer than their calls, and a graph keeps all that it computes.
MOST_BYTES = 128 * 2**20
# Graphs that a thread keeps: ranks that have been left do not come back.
KEPT = 8

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
    """What a thread has seen: recordings, or None before the second time and where none can be."""

    def __init__(self) -> None:
        self.seen: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self.tried: set[Hashable] = set()
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


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
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if held > MOST_BYTES or torch.cuda.is_current_stream_capturing():
        return None
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


def _record(
    compute: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]
) -> _Recording | None:
    """None where a library waits for the device in between."""
    device = tensors[0].device
    places = [torch.empty_like(tensor) for tensor in tensors]
    # one stream for all: what libraries allocate for a stream is never freed
    stream = _own.streams.setdefault(device, torch.cuda.Stream(device))
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
