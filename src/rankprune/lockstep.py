"""Block iterations of many matrices in lockstep: one look at the device a round.

On a GPU, and for small layers everywhere, the arithmetic of a projection takes less time than the
calls that ask for it, and every question whether a result will do waits for all that was asked
before. So the matrices of all layers take their steps together (`rounds`), until all are sure. On a
GPU rounds are recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from rankprune.replay import beside, replayed
from rankprune.rounds import (
    FAINTEST,
    SURE,
    UNSOUND,
    Group,
    Result,
    Task,
    on_gpu,
    one_round,
    results_of,
)
from rankprune.subspace import newton_schulz

# Rounds, of two products each, before another engine takes over.
ROUNDS = 4
# Filling up may double what is stored on a GPU, and little is always let pass.
_FILLED, _LITTLE = 2, 2**20
_LITTLE_ON_CPU = 2**16
# On a CPU matrices of so many entries gain less by a stack than copying them costs.
_STACKED = 2**18
# On a GPU rounds of no more entries in all are recorded, which keeps several copies of them.
_REPLAYED = 2**24


@dataclass(frozen=True)
class Outcome:
    """What has become of a task that keeps the residual's promise, now in the matrices' place.

    Attributes:
        energy: kept share of the energy, pooled over the batch.
        polar: [batch, rows, cols], in the matrices' dtype; None where it was not wanted.
        start: for the next projection.
    """

    energy: float
    polar: Tensor | None
    start: Tensor


def project_together(tasks: Sequence[Task]) -> tuple[dict[int, Outcome], set[int]]:
    """Project in lockstep, in place.

    Args:
        tasks: with matrices and starts on one device.

    Returns:
        The outcome of those tasks that surely keep the promise, by their number; the others'
        matrices are as they were. And which of the others have too small a gap at the rank, so that
        more such steps are of no use.
    """
    done: dict[int, Outcome] = {}
    states: dict[int, _State] = {}
    replay = on_gpu(tasks[0].start) and sum(task.matrices.numel() for task in tasks) <= _REPLAYED
    groups, looked, results = _first_round(tasks, replay)
    for number in range(1, ROUNDS + 1):
        states.update(_read(groups, looked))
        finished = [any(states[i].sure for i in group.places) for group in groups]
        taken = list(compress(groups, finished))
        if results is None:
            ready = results_of(taken)
        else:  # in the memory of a recording: what is left behind must outlast the next replay
            ready = [result.kept() for result in compress(results, finished)]
        done.update(_take(tasks, taken, ready, states, done))
        # what is not sound now is not waited for
        settled = {i for i, state in states.items() if not state.sound} | done.keys()
        if number == ROUNDS or states.keys() <= settled:
            break
        groups = [group for group in groups if not group.places.keys() <= settled]
        groups, looked, results = _further_round(groups, replay)
    return done, {i for i, state in states.items() if state.sound and i not in done}


@dataclass(frozen=True)
class _State:
    """Of a task after a round.

    Attributes:
        sure: whether P keeps the promise.
        sound: whether the bound is one, as for rows that are far from dependent.
        energy: kept share.
        faint: whether σ_r is too small to be squared.
    """

    sure: bool
    sound: bool
    energy: float
    faint: bool


#: Groups, what a round says of them, and its results where they are there already.
_Round = tuple[list["Group"], Tensor, "list[Result] | None"]


def _first_round(tasks: Sequence[Task], replay: bool) -> _Round:
    if not replay:
        groups = _grouped(tasks)
        return groups, one_round(groups), None
    wanted = tuple(task.polar for task in tasks)

    def compute(tensors: Sequence[Tensor]) -> _Round:
        own = [Task(*each) for each in zip(tensors[::2], tensors[1::2], wanted, strict=True)]
        groups = _grouped(own)
        return groups, one_round(groups), results_of(groups)

    tensors = [tensor for task in tasks for tensor in (task.matrices, task.start)]
    return _by_graph(compute, tensors, ("first", wanted))


def _further_round(groups: Sequence[Group], replay: bool) -> _Round:
    tensors = [tensor for g in groups for tensor in (g.matrices, g.factor, g.total)]

    def begun(tensors: Sequence[Tensor]) -> list[Group]:
        each = zip(groups, tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        return [group.again(*own) for group, *own in beside(each)]

    def compute(tensors: Sequence[Tensor]) -> _Round:
        others = begun(tensors)
        return others, one_round(others), results_of(others)

    if not replay:
        others = begun(tensors)
        return others, one_round(others), None
    where = [(i, p.start, p.stop) for g in groups for i, p in g.places.items()]
    polar = tuple(group.polar for group in groups)
    return _by_graph(compute, tensors, ("further", polar, *where))


def _by_graph(
    compute: Callable[[Sequence[Tensor]], _Round], tensors: Sequence[Tensor], key: Hashable
) -> _Round:
    found: _Round | None = replayed(compute, tensors, key=key)
    return compute(tensors) if found is None else found


def _grouped(tasks: Sequence[Task]) -> list[Group]:
    return [Group({i: tasks[i] for i in members}) for members in beside(_alike(tasks))]


def _read(groups: Sequence[Group], looked: Tensor) -> dict[int, _State]:
    """What a round says, by task; waits for a GPU."""
    found: dict[int, _State] = {}
    values, first = looked.tolist(), 0
    for group in groups:
        here = [row[first : first + group.count] for row in values]
        first += group.count
        for i, place in group.places.items():
            states, energies, norms, faint = (row[place] for row in here)
            whole = sum(size * size for size in norms)
            share = sum(e * size * size for e, size in zip(energies, norms, strict=True))
            found[i] = _State(
                sure=min(states) == SURE,
                sound=min(states) != UNSOUND,
                energy=max(0.0, share / whole) if whole else 1.0,
                faint=not min(faint) > 4 * FAINTEST,
            )
    return found


def _take(
    tasks: Sequence[Task],
    groups: Sequence[Group],
    results: Sequence[Result],
    states: dict[int, _State],
    done: dict[int, Outcome],
) -> dict[int, Outcome]:
    """What is sure of some groups, and not done before, put into its place."""
    found: dict[int, Outcome] = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for group, result in zip(groups, results, strict=True):
        for i, place in group.places.items():
            if not states[i].sure or i in done:
                continue
            task, own = tasks[i], None
            if result.polar is not None and task.polar:
                own = result.polar[place]
                if states[i].faint:
                    own = group.left[place].mT @ newton_schulz(group.factor[place])
                own = task.orient(own[..., : task.large]).to(task.matrices.dtype)
            found[i] = Outcome(states[i].energy, own, result.start[place])
            if result.near is not group.matrices:
                targets.append(task.matrices)
                sources.append(task.orient(result.near[place, :, : task.large]))
    if targets:
        torch._foreach_copy_(targets, sources)
    return found


def _alike(tasks: Sequence[Task]) -> list[list[int]]:
    """Tasks that go in one stack: the same smaller side and rank, similar larger sides."""
    alike: list[list[int]] = []
    order = sorted(
        range(len(tasks)), key=lambda i: (tasks[i].small, tasks[i].rank, -tasks[i].large)
    )
    used = stored = 0
    filled, little = (_FILLED, _LITTLE) if on_gpu(tasks[0].start) else (1, _LITTLE_ON_CPU)
    for i in order:
        task = tasks[i]
        head = tasks[alike[-1][0]] if alike else task
        used += len(task.matrices) * task.small * task.large
        stored += len(task.matrices) * task.small * head.large
        same = (head.small, head.rank) == (task.small, task.rank)
        large = task.small * task.large >= _STACKED and not on_gpu(task.start)
        if alike and same and not large and stored <= filled * used + little:
            alike[-1].append(i)
        else:
            alike.append([i])
            used = stored = len(task.matrices) * task.small * task.large
    return alike
