"""Which process computes which matrix, and how the others get the result.

Under DistributedDataParallel every process holds every weight; under FSDP2 (`fully_shard`) a shard
of it. Either way each matrix has one owner, which computes; the others receive the owner's bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankprune.engine import Job, Projected
from rankprune.errors import NumericsError
from rankprune.plan import Plan
from rankprune.sharded import is_sharded

T = TypeVar("T")

# Layers whose results are sent while earlier ones are put into their weights.
_AHEAD = 16


@dataclass(frozen=True)
class Team:
    """The processes that train one model together.

    Attributes:
        group: their process group; None for one process alone.
    """

    group: Any = None

    @classmethod
    def of(cls, model: nn.Module, group: Any = None) -> Team:
        """The processes of a wrapped or sharded model.

        Args:
            model: as it is trained: bare, or wrapped by DDP or torch.compile, or `fully_shard`ed.
            group: what to use for a bare model, which does not tell.
        """
        if group is None:
            for module in model.modules():
                if isinstance(module, nn.parallel.DistributedDataParallel):
                    group = module.process_group
                    break
        if group is None:
            parameters: Iterable[Any] = model.parameters()
            meshes = [p.device_mesh for p in parameters if is_sharded(p)]
            if meshes:
                group = meshes[0].get_group() if meshes[0].ndim == 1 else dist.group.WORLD
        return cls(group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def broadcast(self, tensor: Tensor, owner: int) -> Any:
        """Begin to give every process the owner's values, in place; `wait()` for what returns."""
        source = dist.get_global_rank(self.group, owner)
        return dist.broadcast(tensor, source, group=self.group, async_op=True)

    def all_true(self, flags: Tensor) -> Tensor:
        """Elementwise: whether every process has true."""
        if self.size > 1:
            counts = flags.to(torch.int32)
            dist.all_reduce(counts, dist.ReduceOp.MIN, group=self.group)
            return counts.bool()
        return flags

    def agree(self, make: Callable[[], Plan]) -> Plan:
        """The first process's plan, in every process; a failure in one is a failure in all."""
        if self.size == 1:
            return make()
        plan: Plan | Exception
        try:
            plan = make()
            mine = (True, plan.to_json())
        except Exception as error:  # the others must not wait for what does not come
            plan, mine = error, (False, str(error))
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, mine, group=self.group)
        if isinstance(plan, Exception):
            raise plan
        for process, (done, text) in enumerate(texts):
            if not done:
                raise NumericsError(f"planning failed in process {process}: {text}")
        return plan if self.rank == 0 else Plan.from_json(texts[0][1])

    def waves(self, costs: Sequence[float], *, sharded: bool) -> Iterator[list[tuple[int, int]]]:
        """Share matrices out: (index, owner) of those that are worked on at the same time.

        The owners' loads are levelled: the costliest first, each to whoever has least to do
        (Graham 1969; at most 4/3 of the best possible). Sharded weights go in waves of one matrix
        a process, so that no more than that is in memory in full.

        Args:
            costs: expected time of each matrix; the same in all processes.
            sharded: whether the weights are sharded.
        """
        loads = [0.0] * self.size
        owned: list[list[int]] = [[] for _ in loads]
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owner = min(range(len(loads)), key=lambda i: (loads[i], i))
            loads[owner] += costs[index]
            owned[owner].append(index)
        pairs = [[(index, owner) for index in items] for owner, items in enumerate(owned)]
        rounds = zip_longest(*pairs)
        waves = [[pair for pair in wave if pair is not None] for wave in rounds]
        # owners take turns, so that what they send goes both ways at a time
        yield from waves if sharded else [[pair for wave in waves for pair in wave]]

    def share(
        self,
        jobs: Sequence[Job],
        wave: Sequence[tuple[int, int]],
        results: dict[int, Projected | Exception],
        *,
        sharded: bool,
    ) -> Iterator[tuple[int, Projected]]:
        """The owners' results, in every process of several.

        Args:
            jobs: what was done; of the same shapes, dtypes and devices everywhere.
            wave: (index of a job, its owner), in the same order everywhere.
            results: what this process's jobs have come to, by index; emptied.
            sharded: whether the weights are sharded. Where they are not, results are received in
                their place.

        Yields:
            A job's index with its result.

        Raises:
            NumericsError: an owner has failed; there, what it has failed with.
        """
        if not wave:
            return
        heads = torch.zeros(len(wave), 3, dtype=torch.float64)
        for place, (index, _) in enumerate(wave):
            result = results.get(index)
            if isinstance(result, Projected):
                width = 0 if result.start is None else result.start.shape[-1]
                heads[place] = heads.new_tensor([result.rank, result.energy, width])
        heads = heads.to(jobs[wave[0][0]].device)
        dist.all_reduce(heads, group=self.group)  # each line is zero but at its owner
        told = heads.tolist()
        for (index, owner), (rank, *_) in zip(wave, told, strict=True):
            if rank == 0:
                _fail(jobs[index], owner, results.get(index))
        sending = (
            (index, self._send(jobs[index], owner, head, results.pop(index, None), not sharded))
            for (index, owner), head in zip(wave, told, strict=True)
        )
        # whole sharded weights must be few at a time
        for index, (result, sent) in _ahead(sending, 0 if sharded else _AHEAD):
            for part in sent:
                part.wait()
            yield index, result

    def _send(
        self,
        job: Job,
        owner: int,
        head: Sequence[float],
        result: Projected | Exception | None,
        in_place: bool,
    ) -> tuple[Projected, list[Any]]:
        """A result on its way to all, and what to wait for before it is there."""
        rank, energy, width = head
        own = result if isinstance(result, Projected) else Projected(None, 0, 0.0, None, None)
        small = min(job.shape.rows, job.shape.cols)
        nearest = polar = start = None
        if rank < job.shape.max_rank:
            nearest = _room(job, in_place=in_place) if own.nearest is None else own.nearest
            nearest = nearest.contiguous()
        if job.polar:
            polar = (_room(job) if own.polar is None else own.polar).contiguous()
        if width:
            start = own.start
            if start is None:
                start = torch.empty(
                    job.shape.batch, small, int(width), dtype=torch.float32, device=job.device
                )
            start = start.contiguous()
        sent = [self.broadcast(part, owner) for part in (nearest, polar, start) if part is not None]
        return Projected(nearest, int(rank), energy, polar, start), sent


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, of which some are made before they are asked for."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def _room(job: Job, *, in_place: bool = False) -> Tensor:
    """Where another process's matrices can go: those of the weight itself, where that can be."""
    if in_place and (matrices := job.load()).is_contiguous():
        return matrices
    shape = (job.shape.batch, job.shape.rows, job.shape.cols)
    return torch.empty(shape, dtype=job.dtype, device=job.device)


def _fail(job: Job, owner: int, result: Projected | Exception | None) -> NoReturn:
    if isinstance(result, Exception):
        raise result
    shape = (job.shape.batch, job.shape.rows, job.shape.cols)
    raise NumericsError(
        f"layer {job.layer!r}: a decomposition of {shape} failed in process {owner}; its own "
        "message says why; go back to the last good checkpoint"
    )
