"""Which process computes which matrix, and how the others get the result.

Under DistributedDataParallel every process holds every weight; under FSDP2 (`fully_shard`) a shard
of it. Either way each matrix has one owner, which computes; the others receive the owner's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankprune.engine import Job, Projected
from rankprune.errors import NumericsError, RankPruneError
from rankprune.plan import Plan
from rankprune.sharded import is_sharded


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

    def broadcast(self, tensor: Tensor, owner: int) -> Tensor:
        """Give every process the owner's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.group, owner), group=self.group)
        return tensor

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
        plan: Plan | RankPruneError
        try:
            plan = make()
            mine = (True, plan.to_json())
        except RankPruneError as error:
            plan, mine = error, (False, str(error))
        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, mine, group=self.group)
        if isinstance(plan, RankPruneError):
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
        if not sharded:
            yield [pair for items in pairs for pair in items]
            return
        for wave in range(max((len(items) for items in pairs), default=0)):
            yield [items[wave] for items in pairs if wave < len(items)]

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
        for (index, owner), (rank, energy, width) in zip(wave, told, strict=True):
            job, result = jobs[index], results.pop(index, None)
            own = result if isinstance(result, Projected) else Projected(None, 0, 0.0, None, None)
            small = min(job.shape.rows, job.shape.cols)
            nearest = polar = start = None
            if rank < job.shape.max_rank:
                nearest = own.nearest
                if nearest is None:
                    nearest = _room(job, in_place=not sharded)
                nearest = self.broadcast(nearest.contiguous(), owner)
            if job.polar:
                polar = own.polar
                if polar is None:
                    polar = _room(job)
                polar = self.broadcast(polar.contiguous(), owner)
            if width:
                start = own.start
                if start is None:
                    start = torch.empty(job.shape.batch, small, int(width), device=job.device)
                start = self.broadcast(start.contiguous(), owner)
            yield index, Projected(nearest, int(rank), energy, polar, start)


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
        "message says why"
    )
