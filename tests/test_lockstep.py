"""Many matrices in lockstep, on the CPU: what is certified keeps the promise, and engine and all.

test_cuda.py runs the same where it belongs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from promise import keeps_promise, trained_on
from rankprune import engine, lockstep, rounds
from rankprune.engine import Job, project
from rankprune.linalg import Decomposition
from rankprune.lockstep import Outcome, Task, project_together
from rankprune.schemes import MatrixShape
from test_subspace import KINDS, STARTS
from test_subspace import _matrix as matrix_of
from test_subspace import _start as start_of

EPS = torch.finfo(torch.float32).eps


def _only(task: Task) -> Outcome | None:
    """What becomes of a task alone; its matrices are changed where there is an outcome."""
    before = task.matrices.clone()
    done, hopeless = project_together([task])
    assert not done or not hopeless
    if not done:
        assert torch.equal(before, task.matrices)
    return done.get(0)


@settings(max_examples=300)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    batch=st.integers(1, 3),
    rank=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
    start=st.sampled_from(STARTS),
    noise=st.floats(-5, -0.5),
    scale=st.integers(-8, 8),
    seed=st.integers(0, 999),
)
def test_what_is_certified_keeps_the_promise(
    rows: int,
    cols: int,
    batch: int,
    rank: int,
    kind: str,
    start: str,
    noise: float,
    scale: int,
    seed: int,
) -> None:
    rank = min(rank, rows, cols)
    matrix = (10.0**scale * matrix_of(rows, cols, batch, kind, 4, 10**noise, seed)).float()
    given = start_of(matrix, rank, start, 10**noise, seed)
    nearest = matrix.clone()
    found = _only(Task(nearest, given, True))
    if found is not None:
        keeps_promise(matrix, rank, nearest)
        assert found.polar is not None
        assert torch.isfinite(found.polar).all()
        assert torch.isfinite(found.start).all()


SHAPES = [(1, 16, 27), (1, 16, 144), (1, 144, 32), (2, 64, 576), (1, 128, 64), (1, 64, 64)]


def _tasks(share: float, polar: bool) -> tuple[list[Task], list[Tensor]]:
    """Projected matrices that have moved, and copies of them."""
    tasks = []
    for number, shape in enumerate(SHAPES):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        rank = min(shape[1:]) // 4
        moved = trained_on(Decomposition(matrix).project(rank), share)
        start = Decomposition(matrix).start(rank)
        tasks.append(Task(moved, start, polar and number % 2 == 0))
    return tasks, [task.matrices.clone() for task in tasks]


@pytest.mark.parametrize("share", [1e-6, 1e-5, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("polar", [False, True])
def test_one_round_suffices_in_training(
    monkeypatch: pytest.MonkeyPatch, share: float, polar: bool
) -> None:
    """All of different shapes at once: as the SVD has it."""
    monkeypatch.setattr(lockstep, "ROUNDS", 1)
    tasks, originals = _tasks(share, polar)
    done, hopeless = project_together(tasks)
    assert not hopeless
    for index, (task, original) in enumerate(zip(tasks, originals, strict=True)):
        found, rank, exact = done[index], task.rank, Decomposition(original.double())
        keeps_promise(original, rank, task.matrices)
        kept = exact.values[..., :rank].square().sum() / exact.values.square().sum()
        assert found.energy == pytest.approx(float(kept), abs=1e-5)
        assert (found.polar is not None) == task.polar
        if found.polar is not None:
            assert (found.polar - exact.polar(rank)).abs().max() < 1e-3
        rows = found.start.mT @ task.orient(original)
        assert (rows @ rows.mT - torch.eye(rank)).abs().max() < 0.05


def test_company_changes_nothing_but_rounding() -> None:
    tasks, originals = _tasks(0.01, True)
    bad = [
        Task(torch.zeros(1, 16, 27), torch.ones(1, 16, 4), True),
        Task(torch.ones(1, 16, 144), torch.full((1, 16, 4), torch.nan), True),
    ]
    done, hopeless = project_together([bad[0], *tasks, bad[1]])
    assert sorted(done) == list(range(1, len(tasks) + 1))
    assert not hopeless
    assert not bad[0].matrices.any()
    assert (bad[1].matrices == 1).all()
    for index, (task, original) in enumerate(zip(tasks, originals, strict=True)):
        alone = Task(original, task.start, task.polar)
        found = _only(alone)
        assert found is not None
        assert torch.allclose(alone.matrices, task.matrices, rtol=0, atol=1e-5)
        if found.polar is not None:
            other = done[index + 1].polar
            assert other is not None
            assert torch.allclose(found.polar, other, rtol=0, atol=1e-4)


def test_without_a_gap_another_engine_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certain already takes no part in the further rounds."""
    flat = matrix_of(30, 50, 1, "flat").float()
    gap = matrix_of(30, 50, 1, "gap", 5, 1e-3).float()
    starts = [Decomposition(flat).start(5), Decomposition(gap).start(5)]
    taken: list[list[int]] = []
    inner = lockstep._read

    def counted(groups: Any, looked: Any) -> Any:
        states = inner(groups, looked)
        taken.append([i for i, state in states.items() if not state.sure])
        return states

    monkeypatch.setattr(lockstep, "_read", counted)
    before = flat.clone()
    done, hopeless = project_together([Task(flat, starts[0], False), Task(gap, starts[1], False)])
    assert sorted(done) == [1]
    assert hopeless == {0}
    assert taken == [[0]] * lockstep.ROUNDS
    assert torch.equal(flat, before)


def test_a_bad_start_hides_the_gap_at_first() -> None:
    """A gap of two, and a start from a matrix that half of is noise: later rounds see it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.linspace(3, 1, 8), torch.linspace(0.5, 0.01, 24)]).double()
    u = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(96, 32, generator=generator, dtype=torch.float64)).Q
    matrix = (u * values) @ v.mT
    noise = torch.randn(32, 96, generator=generator, dtype=torch.float64)
    noise *= 0.5 * matrix.norm() / noise.norm()
    start = Decomposition((matrix + noise)[None].float()).start(8)
    projected = matrix[None].float()
    done, _ = project_together([Task(projected, start, False)])
    assert sorted(done) == [0]
    residual = (matrix - projected[0].double()).norm()
    assert residual <= 1.0001 * values[8:].square().sum().sqrt()


@pytest.mark.parametrize("condition", [30.0, 3e4])
def test_polar_factors_of_ill_conditioned_matrices(condition: float) -> None:
    """The second one only from the factor itself."""
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), 8).double()
    u = torch.linalg.qr(torch.randn(20, 8).double()).Q
    v = torch.linalg.qr(torch.randn(30, 8).double()).Q
    matrix = ((u * values) @ v.T).float()[None]
    start = Decomposition(matrix).start(8)
    found = _only(Task(matrix.clone(), start, True))
    assert found is not None
    assert found.polar is not None
    assert (found.polar[0].double() - u @ v.T).abs().max() < 1e-2


# -- in the engine ---------------------------------------------------------------------------------


def _job(matrices: Tensor, rank: int, **options: Any) -> Job:
    return Job(
        shape=MatrixShape(*matrices.shape),
        load=matrices.clone,
        dtype=matrices.dtype,
        device=matrices.device,
        rank=rank,
        **options,
    )


@pytest.mark.parametrize("wave", [1, 10**9])
def test_the_engine_falls_back(monkeypatch: pytest.MonkeyPatch, wave: int) -> None:
    """What is not certified goes to the other engines, whatever is in its wave."""
    monkeypatch.setattr(engine, "CHUNK_BYTES", wave)
    monkeypatch.setattr(engine, "ENOUGH", 1)
    steady = trained_on(matrix_of(40, 60, 2, "gap", 6, 1e-3).float(), 1e-3)
    flat = matrix_of(30, 50, 1, "flat").float()
    zero = torch.zeros(1, 20, 20)
    half = steady.to(torch.bfloat16)
    start = Decomposition(steady).start(6)
    jobs = [
        _job(steady, 6, start=start),
        _job(flat, 5, start=torch.randn(1, 30, 5)),
        _job(zero, 3, start=torch.ones(1, 20, 3), polar=True),
        _job(half, 6, start=start, polar=True),
        _job(steady, 40, start=torch.randn(2, 40, 40), polar=True),
    ]
    results = dict(project(jobs))
    assert sorted(results) == list(range(len(jobs)))
    for index, job in enumerate(jobs[:-1]):
        nearest = results[index].nearest
        assert nearest is not None
        assert nearest.dtype is job.dtype
        keeps_promise(job.load(), int(job.rank), nearest)  # type: ignore[arg-type]
    assert results[4].nearest is None


def test_a_worse_start_takes_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(100, 120, 1, "gap", 6, 0.1).float()
    start = Decomposition(trained_on(matrix, 1.5)).start(6)
    counts: list[int] = []
    inner = lockstep.one_round

    def counted(groups: Any) -> Any:
        counts.append(len(groups))
        return inner(groups)

    monkeypatch.setattr(lockstep, "one_round", counted)
    monkeypatch.setattr(engine, "Decomposition", None)
    ((_, result),) = project([_job(matrix, 6, start=start)])
    assert result.nearest is not None
    keeps_promise(matrix, 6, result.nearest)
    assert 1 < len(counts) <= lockstep.ROUNDS


def test_few_small_ones_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known to be quick, where there is nothing to share calls with."""
    calls: list[int] = []

    def counted(tasks: list[Task]) -> Any:
        calls.append(len(tasks))
        return project_together(tasks)

    monkeypatch.setattr(engine, "project_together", counted)
    tasks, originals = _tasks(0.01, False)
    jobs = [_job(o, t.rank, start=t.start) for o, t in zip(originals, tasks, strict=True)]
    for count, expected in ((engine.ENOUGH, [engine.ENOUGH]), (engine.ENOUGH - 1, [])):
        calls.clear()
        for index, result in project(jobs[:count]):
            assert result.nearest is not None
            keeps_promise(originals[index], tasks[index].rank, result.nearest)
        assert calls == expected


def test_waves_hold_similar_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one large rank that hundreds of small ones are filled up to."""
    monkeypatch.setattr(engine, "CHUNK_BYTES", engine.WAVE_BYTES)
    large = _job(torch.ones(1, 3000, 3000), 1000, start=torch.ones(1, 3000, 1000))
    small = [_job(torch.ones(1, 20, 20), 4, start=torch.ones(1, 20, 4)) for _ in range(100)]
    waves = list(engine._waves([*small, large]))
    assert sorted(index for wave in waves for index in wave) == list(range(101))
    assert len(waves) == 2
    assert 100 in waves[0]
    assert len(waves[0]) < 20


class _Replayed:
    """What a graph does: the calls of the first time, on other numbers in the same places."""

    def __init__(self) -> None:
        self.recorded: dict[Any, tuple[list[Tensor], Any, Any]] = {}
        self.replays = 0

    def __call__(self, compute: Any, tensors: list[Tensor], *, key: Any) -> Any:
        key = (key, *(tensor.shape for tensor in tensors))
        if key not in self.recorded:
            places = [tensor.clone() for tensor in tensors]
            self.recorded[key] = places, compute(places), compute
            return None
        places, result, compute = self.recorded[key]
        torch._foreach_copy_(places, [tensor.clone() for tensor in tensors])
        groups, looked, results = compute(places)
        old_groups, old_looked, old_results = result
        old_looked.copy_(looked)
        for old, new in zip(old_groups, groups, strict=True):
            for name in ("matrices", "factor", "total", "left"):
                getattr(old, name).copy_(getattr(new, name))
        for old, new in zip(old_results, results, strict=True):
            old.near.copy_(new.near)
            old.start.copy_(new.start)
            if old.polar is not None:
                old.polar.copy_(new.polar)
        self.replays += 1
        return result


def test_replayed_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing of one projection is left in the next one's result."""
    replays = _Replayed()
    for module in (lockstep, rounds):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(lockstep, "replayed", replays)
    starts: list[Tensor] = []
    kept: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        # the last two need several rounds, and one never has a gap
        matrices = [
            matrix_of(30, 50, 1, "gap", 5, 1e-3, seed=step).float(),
            matrix_of(30, 70, 2, "gap", 5, 1e-3, seed=step).float(),
            trained_on(matrix_of(100, 120, 1, "gap", 6, 0.1).float(), 1.0, seed=step),
            matrix_of(30, 50, 1, "flat").float(),
        ]
        if not starts:
            starts = [
                Decomposition(trained_on(m, 1.0)).start(r)
                for m, r in zip(matrices, (5, 5, 6, 5), strict=True)
            ]
        before = [matrix.clone() for matrix in matrices]
        tasks = [Task(m, s, True) for m, s in zip(matrices, starts, strict=True)]
        done, _ = project_together(tasks)
        assert sorted(done) == [0, 1, 2]
        assert torch.equal(matrices[3], before[3])
        for index, rank in enumerate((5, 5, 6)):
            keeps_promise(before[index], rank, matrices[index])
            polar = done[index].polar
            assert polar is not None
            kept.append((polar, polar.clone()))
            starts[index] = done[index].start
            kept.append((starts[index], starts[index].clone()))
    assert replays.replays > 4
    assert all(torch.equal(tensor, copied) for tensor, copied in kept)


def test_replays_of_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks move from one layer to another of the same shape: the stacks' shapes are the same."""
    for module in (lockstep, rounds):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(lockstep, "replayed", _Replayed())
    shapes = ((100, 144), (100, 110), (100, 144))
    for ranks in ((4, 4, 6), (4, 4, 6), (6, 4, 4)):
        matrices = [
            matrix_of(*shape, 1, "gap", rank, 0.1, seed=index).float()
            for index, (shape, rank) in enumerate(zip(shapes, ranks, strict=True))
        ]
        poor = [trained_on(matrix, 1.5) for matrix in matrices]
        starts = [Decomposition(m).start(rank) for m, rank in zip(poor, ranks, strict=True)]
        before = [matrix.clone() for matrix in matrices]
        tasks = [Task(m, start, False) for m, start in zip(matrices, starts, strict=True)]
        done, _ = project_together(tasks)
        assert len(done) == len(ranks)
        for matrix, rank, nearest in zip(before, ranks, matrices, strict=True):
            keeps_promise(matrix, rank, nearest)
