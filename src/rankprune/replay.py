"""Functions of tensors as CUDA graphs, which are launched by one call.

On a GPU the hundreds of calls that project small layers take longer than what they ask for. When
tensors of the same shapes have come some times, the calls are recorded, and from then on replayed
on tensors that are copied into the places they were recorded with.
"""

from __future__ import annotations

import contextlib
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
# Calls of the same shapes before they are recorded, which costs more than it saves for fewer.
BEFORE = 4
# Graphs that a thread keeps, with all that they compute, or counts towards: a model's first round,
# and further ones for those layers that are open then. Ranks that have been left do not come back.
KEPT = 6

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
    """What a thread has seen: recordings, the number of calls before, or None where none can be.

    And its streams to record in, few, for what libraries allocate for a stream is never freed.
    """

    def __init__(self) -> None:
        self.seen: OrderedDict[Hashable, _Recording | int | None] = OrderedDict()
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
    if torch.cuda.is_current_stream_capturing():
        return None
    device, seen = tensors[0].device, _own.seen
    shapes = ((tensor.shape, tensor.dtype) for tensor in tensors)
    # replays on another stream would not wait for what still reads the last one's result
    where = torch.cuda.current_stream(device), torch.is_inference_mode_enabled()
    key = (key, device, *where, *shapes)
    found = seen.setdefault(key, 0)
    seen.move_to_end(key)
    if found == BEFORE:
        found = seen[key] = _record(compute, tensors)
    if isinstance(found, _Recording):
        return found.replay(tensors)
    if found is not None:
        seen[key] = found + 1
    while len(seen) > KEPT:
        seen.popitem(last=False)
    return None


def forget() -> None:
    """Give the memory of this thread's recordings back."""
    _own.seen.clear()


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
    result = None
    with _capturing, torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = compute(places)
        except RuntimeError:
            pass
        finally:
            try:
                graph.capture_end()
            except RuntimeError:
                result = None
                # torch up to 2.11 leaves the allocator as if the capture went on
                with contextlib.suppress(AttributeError, RuntimeError):
                    torch._C._cuda_endAllocateToPool(device.index, graph.pool())
    return None if result is None else _Recording(graph, places, result)
