"""Projection of many matrices: which engine takes which, in batches of equal shape.

| engine | takes | cost of an n × m matrix, n ≤ m, to rank r |
|---|---|---|
| lockstep | a given rank, with a start from the last time | 8 n m r, 4 n m r a further round |
| block iteration | the same where the spectrum decides | 6 n m r, 2 n m r a further step |
| Gram, fp32, then fp64 | everything else in fp32 or less | n² m + eigh(n) + 4 n m r |
| SVD | fp64, and what the others cannot promise | svd(n, m) |

Every result keeps the residual's promise of `linalg`: an engine that cannot say so hands over to
the next one. The choice depends on the matrices, ranks and starts alone, so that a run which is
resumed with its starts takes the same path.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rankprune.errors import naming
from rankprune.linalg import Decomposition, full_precision
from rankprune.lockstep import Task, project_together
from rankprune.ranks import Spectrum
from rankprune.schemes import MatrixShape
from rankprune.subspace import Subspace, newton_schulz

# Matrices of equal shape are stacked up to this many bytes: small ones gain, large ones do not.
CHUNK_BYTES = 8 * 2**20
# Steps of the block iteration, of one product each, before another engine takes over.
STEPS = 8
# Below this side the Gram matrix is decomposed in less time than the iteration's calls take, if not
# on a GPU, nor in lockstep with some others.
SMALLEST_SIDE = 96
ENOUGH = 6
# So few matrices below that side, of so many entries, a CPU decomposes before a GPU has.
FEW = 2
LITTLE = 2**16
# What goes in lockstep at a time: bytes of matrices (on a GPU; elsewhere the above), and of what is
# rank × rank, filled up.
WAVE_BYTES = 512 * 2**20
WAVE_FILLED = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Job:
    """Matrices of one layer, to be projected to one rank.

    Attributes:
        shape: batch, rows and columns.
        load: gives the matrices, [batch, rows, cols], finite; the result may take their place.
        dtype: their dtype.
        device: their device.
        rank: the rank, or what chooses it by the spectrum.
        leading: whether the leading singular values suffice to choose.
        start: what the block iteration starts from, of the last result; None without.
        polar: whether U Vᵀ is wanted, over the kept directions.
        layer: its name, for messages.
    """

    shape: MatrixShape
    load: Callable[[], Tensor]
    dtype: torch.dtype
    device: torch.device
    rank: int | Callable[[Spectrum], int]
    leading: bool = False
    start: Tensor | None = None
    polar: bool = False
    layer: str = ""

    @property
    def warm(self) -> bool:
        """Whether the block iteration is to be tried."""
        if self.start is None or self.dtype == torch.float64:
            return False
        if isinstance(self.rank, int):
            return self.rank <= self.start.shape[-1]
        return self.leading

    @property
    def together(self) -> bool:
        """Whether it can be done in lockstep with others."""
        if self.start is None or not self.warm:
            return False
        return self.rank == self.start.shape[-1] < self.shape.max_rank

    @property
    def little(self) -> bool:
        """Whether calls cost more than arithmetic, and a decomposition takes few."""
        small = min(self.shape.rows, self.shape.cols)
        return small < SMALLEST_SIDE and self.device.type != "cuda"

    @property
    def rough(self) -> bool:
        """Whether fp32 may do; a rule that reads every singular value gets the digits of fp64."""
        return isinstance(self.rank, int) or self.leading

    def cost(self) -> float:
        """Expected time, in operations of a CPU's matrix products, to share jobs out."""
        small, large = sorted((self.shape.rows, self.shape.cols))
        if self.warm:
            assert self.start is not None
            size = self.start.shape[-1]
            operations = 6.0 * size * large * (small + size)
        else:
            operations = small * small * (1.2 * large + 6.4 * small)
        # beside them, going through the matrix's entries several times, and calls
        return self.shape.batch * (operations + 150.0 * small * large) + 2e7


@dataclass(frozen=True)
class Projected:
    """What a job has become.

    Attributes:
        nearest: [batch, rows, cols], in the job's dtype; None at full rank, where nothing changes.
        rank: the rank of all matrices.
        energy: kept share of the squared singular values, pooled over the batch.
        polar: U Vᵀ over the kept directions where it was wanted.
        start: for the next job of these matrices; None where none pays.
    """

    nearest: Tensor | None
    rank: int
    energy: float
    polar: Tensor | None
    start: Tensor | None

    def to(self, device: torch.device) -> Projected:
        """The same on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            nearest=moved(self.nearest),
            polar=moved(self.polar),
            start=moved(self.start),
        )


def project(jobs: Sequence[Job]) -> Iterator[tuple[int, Projected]]:
    """Carry jobs out, in an order that suits them.

    Args:
        jobs: any matrices.

    Yields:
        A job's index with its result, as they are done; only a few matrices are held at a time.

    Raises:
        NumericsError: a decomposition did not converge.
    """
    left = dict(enumerate(jobs))
    for wave in _waves(jobs):
        with full_precision():
            done, hopeless = _in_lockstep(jobs, wave)
        for index in wave:
            if index in done:
                del left[index]
            elif index in hopeless:
                left[index] = replace(jobs[index], start=None)
        yield from done.items()
        del done
    groups: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, job in left.items():
        if job.little and isinstance(job.rank, int):
            job = left[index] = replace(job, start=None)
        key: tuple[object, ...] = (
            job.shape.rows,
            job.shape.cols,
            job.dtype,
            job.device,
            job.warm,
            job.rough,
        )
        if job.warm:
            assert job.start is not None
            key += (job.start.shape[-1],)
        groups[key].append(index)
    for members in groups.values():
        for chunk in _chunks(left, members):
            with naming(*(left[index].layer for index in chunk if jobs[index].layer)):
                with full_precision():
                    results = list(_project_chunk(left, chunk))
                yield from results
                del results


def _waves(jobs: Sequence[Job]) -> Iterator[list[int]]:
    """Jobs that are done in lockstep, those of similar ranks together."""
    together = [index for index, job in enumerate(jobs) if job.together]
    if sum(jobs[index].little for index in together) < ENOUGH:
        together = [index for index in together if not jobs[index].little]
    devices: defaultdict[torch.device, list[int]] = defaultdict(list)
    for index in together:
        devices[jobs[index].device].append(index)
    for device, members in devices.items():
        most = WAVE_BYTES if device.type == "cuda" else CHUNK_BYTES
        wave: list[int] = []
        held = count = used = largest = 0
        for index in sorted(members, key=lambda i: -_followed(jobs[i])):
            shape, rank = jobs[index].shape, _followed(jobs[index])
            size = 4 * shape.batch * shape.rows * shape.cols
            square = 4 * shape.batch * rank * rank
            filled = 4 * (count + shape.batch) * largest * largest
            if wave and (held + size > most or filled > WAVE_FILLED + 4 * (used + square)):
                yield wave
                wave, held, count, used = [], 0, 0, 0
            largest = largest if wave else rank
            wave.append(index)
            held, count, used = held + size, count + shape.batch, used + square
        yield wave


def _followed(job: Job) -> int:
    return 0 if job.start is None else job.start.shape[-1]


def _in_lockstep(jobs: Sequence[Job], wave: Sequence[int]) -> tuple[dict[int, Projected], set[int]]:
    """Results of the jobs for which lockstep can promise them, and those that have no gap."""
    tasks: list[Task] = []
    for index in wave:
        start = jobs[index].start
        assert start is not None
        tasks.append(Task(jobs[index].load(), start, jobs[index].polar))
    outcomes, hopeless = project_together(tasks)
    done = {
        wave[i]: Projected(tasks[i].matrices, tasks[i].rank, found.energy, found.polar, found.start)
        for i, found in outcomes.items()
    }
    return done, {wave[i] for i in hopeless}


def _chunks(jobs: Mapping[int, Job], members: Sequence[int]) -> Iterator[list[int]]:
    chunk: list[int] = []
    held = 0
    for index in members:
        shape = jobs[index].shape
        size = shape.batch * shape.rows * shape.cols * jobs[index].dtype.itemsize
        if chunk and held + size > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(index)
        held += size
    yield chunk


def _project_chunk(jobs: Mapping[int, Job], chunk: list[int]) -> Iterator[tuple[int, Projected]]:
    unchanged = [index for index in chunk if jobs[index].rank == jobs[index].shape.max_rank]
    for index in unchanged:
        polar = _full_polar(jobs[index]) if jobs[index].polar else None
        yield index, Projected(None, jobs[index].shape.max_rank, 1.0, polar, None)
    chunk = [index for index in chunk if index not in unchanged]
    if not chunk:
        return
    loaded = [jobs[index].load() for index in chunk]
    matrix = loaded[0] if len(chunk) == 1 else torch.cat(loaded)
    del loaded
    offset, parts = 0, []
    for index in chunk:
        parts.append((index, slice(offset, offset + jobs[index].shape.batch)))
        offset += jobs[index].shape.batch
    if jobs[chunk[0]].warm:
        starts = [jobs[index].start for index in chunk]
        start = torch.cat([start for start in starts if start is not None])
        done = _by_iteration(jobs, parts, Subspace(matrix, start))
        yield from done.items()
        parts = [(index, part) for index, part in parts if index not in done]
    if not parts:
        return
    device = matrix.device
    few = len(matrix) <= FEW and matrix.numel() <= LITTLE
    if matrix.is_cuda and min(matrix.shape[-2:]) < SMALLEST_SIDE and few:
        matrix = matrix.cpu()
    for index, projected in _by_decomposition(jobs, parts, matrix):
        yield index, projected.to(device)


def _full_polar(job: Job) -> Tensor:
    matrix = job.load()
    if job.device.type == "cuda" and job.dtype != torch.float64:
        # products are what a GPU does best, and its eigh what it does worst
        return newton_schulz(matrix.float()).to(job.dtype)
    return Decomposition(matrix).polar()


def _by_iteration(
    jobs: Mapping[int, Job], parts: Sequence[tuple[int, slice]], subspace: Subspace
) -> dict[int, Projected]:
    """Results of the jobs for which the block iteration can promise them."""
    done: dict[int, Projected] = {}
    missed: dict[int, float] = {}
    for step in range(1, STEPS + 1):
        for index, part in parts:
            if index in done:
                continue
            found = _certified(jobs[index], subspace.part(part))
            if isinstance(found, Projected):
                done[index] = found
                continue
            # every step gains about as much as the last: will the steps left be enough?
            last = missed.get(index, math.inf)
            gained = min(found / last, 2.0) if last else math.inf
            missed[index] = found if found * gained ** (STEPS - step) < 1 else math.inf
        open_ = [index for index, _ in parts if index not in done]
        if not open_ or (step > 1 and all(missed[index] == math.inf for index in open_)):
            break
        if step < STEPS:
            subspace.refine()
    return done


def _certified(job: Job, subspace: Subspace) -> Projected | float:
    """The result, or what is missed as a multiple of what may be."""
    rank = job.rank
    if not isinstance(rank, int):
        rank = rank(Spectrum(subspace.values, job.shape, subspace.total))
        if rank >= subspace.size:
            return math.inf  # more directions might be wanted than the iteration follows
    if not bool(subspace.certified(rank).all()):
        return float(subspace.missed(rank).max())
    total = float(subspace.total.sum())
    lost = float(subspace.residual(rank).sum())
    size = min(_start_size(job, rank) or 0, subspace.size)
    polar = subspace.polar(rank) if job.polar else None
    start = subspace.start(size).contiguous() if size >= rank else None
    energy = max(0.0, 1 - lost / total) if total else 1.0
    return Projected(subspace.project_(rank), rank, energy, polar, start)


def _by_decomposition(
    jobs: Mapping[int, Job], parts: Sequence[tuple[int, slice]], matrix: Tensor
) -> Iterator[tuple[int, Projected]]:
    rough = jobs[parts[0][0]].rough  # as all of a group are
    # fp64 takes no longer for small sides, and on a GPU half as long as an fp32 that falls short
    double = not rough or matrix.is_cuda or min(matrix.shape[-2:]) < SMALLEST_SIDE
    whole = Decomposition(matrix, working=torch.float64 if double else torch.float32)
    for index, part in parts:
        job, decomposition = jobs[index], whole.part(part)
        spectrum = Spectrum(decomposition.values, job.shape)
        rank = job.rank if isinstance(job.rank, int) else job.rank(spectrum)
        full = rank == job.shape.max_rank
        size = _start_size(job, rank)
        if not double and not full and not decomposition.keeps(rank):
            # eigenvectors that fp32 has spoilt are still a good start
            subspace = Subspace(decomposition.matrix, decomposition.start(size or rank, rough=True))
            # a rule has chosen, and its job goes on to follow some directions more
            chosen = replace(job, rank=rank if size in (None, rank) else partial(_same, rank))
            done = _by_iteration({0: chosen}, [(0, slice(None))], subspace)
            if done:
                yield index, done[0]
                continue
        yield (
            index,
            Projected(
                nearest=None if full else decomposition.project(rank),
                rank=rank,
                # not left to the order in which energies are added up
                energy=1.0 if full else float(spectrum.energy()[rank - 1]),
                polar=decomposition.polar(rank) if job.polar else None,
                start=None if size is None else decomposition.start(size),
            ),
        )


def _same(rank: int, _: Spectrum) -> int:
    return rank


def _start_size(job: Job, rank: int) -> int | None:
    """How many directions the block iteration is to follow next time; None where it is no gain."""
    small = min(job.shape.rows, job.shape.cols)
    if job.dtype == torch.float64:
        return None
    if not isinstance(job.rank, int):
        if not job.leading or small < SMALLEST_SIDE:
            return None
        rank += max(4, rank // 8)  # so that a rule can choose more
    return rank if rank <= small // 2 else None
