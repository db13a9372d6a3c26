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

from rankprune import engine
from rankprune.engine import Job, project
from rankprune.linalg import RESIDUAL_PROMISE, Decomposition
from rankprune.lockstep import Round, Task, project_together
from rankprune.schemes import MatrixShape
from test_subspace import KINDS, STARTS
from test_subspace import _matrix as matrix_of
from test_subspace import _start as start_of

EPS = torch.finfo(torch.float32).eps


def _only(task: Task) -> Round:
    (found,) = project_together([task])
    return found


def _checked(matrices: Tensor, rank: int, nearest: Tensor) -> None:
    reference = matrices.double()
    singular = torch.linalg.svdvals(reference)
    optimum = singular[..., rank:].square().sum(-1).sqrt()
    residual = torch.linalg.matrix_norm(reference - nearest.double())
    norm = torch.linalg.matrix_norm(reference)
    rounding = (4 * EPS + torch.finfo(matrices.dtype).eps) * norm
    assert (residual <= RESIDUAL_PROMISE * optimum + rounding).all()


def _moved(matrices: Tensor, share: float, seed: int = 0) -> Tensor:
    noise = torch.randn(matrices.shape, generator=torch.Generator().manual_seed(seed))
    return matrices + share * noise * matrices.norm() / noise.norm()


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
    found = _only(Task(matrix.clone(), given, True))
    if found.certified:
        _checked(matrix, rank, found.nearest)
        assert found.polar is not None
        assert torch.isfinite(found.polar).all()
        assert torch.isfinite(found.start).all()


SHAPES = [(1, 16, 27), (1, 16, 144), (1, 144, 32), (2, 64, 576), (1, 128, 64), (1, 64, 64)]


@pytest.mark.parametrize("share", [1e-5, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("polar", [False, True])
def test_one_round_suffices_in_training(share: float, polar: bool) -> None:
    """All of different shapes at once: certified, and as the SVD has it."""
    tasks, expected = [], []
    for number, shape in enumerate(SHAPES):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        rank = min(shape[1:]) // 4
        moved = _moved(Decomposition(matrix).project(rank), share)
        tasks.append(Task(moved, Decomposition(matrix).start(rank), polar and number % 2 == 0))
        expected.append((rank, Decomposition(moved.double())))
    for task, found, (rank, exact) in zip(tasks, project_together(tasks), expected, strict=True):
        assert found.certified
        _checked(task.matrices, rank, found.nearest)
        kept = exact.values[..., :rank].square().sum() / exact.values.square().sum()
        assert found.energy == pytest.approx(float(kept), abs=1e-5)
        assert (found.polar is not None) == task.polar
        if found.polar is not None:
            assert (found.polar - exact.polar(rank)).abs().max() < 1e-3
        rows = found.start.mT @ task.orient(task.matrices)
        assert (rows @ rows.mT - torch.eye(rank)).abs().max() < 1e-3


def test_company_changes_nothing_but_rounding() -> None:
    tasks = []
    for number, shape in enumerate(SHAPES):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        rank = min(shape[1:]) // 4
        moved = _moved(Decomposition(matrix).project(rank), 0.01)
        tasks.append(Task(moved, Decomposition(matrix).start(rank), True))
    bad = [
        Task(torch.zeros(1, 16, 27), torch.ones(1, 16, 4), True),
        Task(torch.ones(1, 16, 144), torch.full((1, 16, 4), torch.nan), True),
    ]
    together = project_together([bad[0], *tasks, bad[1]])
    assert not together[0].certified
    assert not together[-1].certified
    for task, found in zip(tasks, together[1:-1], strict=True):
        alone = _only(task)
        assert torch.allclose(alone.nearest, found.nearest, rtol=0, atol=1e-5)
        assert found.polar is not None
        assert alone.polar is not None
        assert torch.allclose(alone.polar, found.polar, rtol=0, atol=1e-4)


@pytest.mark.parametrize("condition", [30.0, 3e4])
def test_polar_factors_of_ill_conditioned_matrices(condition: float) -> None:
    """The second one only from the factor itself."""
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), 8).double()
    u = torch.linalg.qr(torch.randn(20, 8).double()).Q
    v = torch.linalg.qr(torch.randn(30, 8).double()).Q
    matrix = ((u * values) @ v.T).float()[None]
    start = Decomposition(matrix).start(8)
    found = _only(Task(matrix.clone(), start, True))
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


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "in_lockstep", lambda device: True)


@pytest.mark.parametrize("wave", [1, 10**9])
def test_the_engine_falls_back(
    everywhere: None, monkeypatch: pytest.MonkeyPatch, wave: int
) -> None:
    """What is not certified goes to the other engines, whatever is in its wave."""
    monkeypatch.setattr(engine, "WAVE_BYTES", wave)
    steady = _moved(matrix_of(40, 60, 2, "gap", 6, 1e-3).float(), 1e-3)
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
        _checked(job.load(), int(job.rank), nearest)  # type: ignore[arg-type]
    assert results[4].nearest is None


def test_a_worse_start_takes_more_rounds(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(40, 60, 1, "gap", 6, 0.1).float()
    start = Decomposition(_moved(matrix, 1.0)).start(6)
    rounds: list[int] = []

    def counted(tasks: list[Task]) -> list[Round]:
        rounds.append(len(tasks))
        return project_together(tasks)

    monkeypatch.setattr(engine, "project_together", counted)
    monkeypatch.setattr(engine, "Decomposition", None)
    ((_, result),) = project([_job(matrix, 6, start=start)])
    assert result.nearest is not None
    _checked(matrix, 6, result.nearest)
    assert 1 < len(rounds) <= engine.ROUNDS


def test_waves_hold_similar_ranks(everywhere: None) -> None:
    """Not one large rank that hundreds of small ones are filled up to."""
    large = _job(torch.ones(1, 3000, 3000), 1000, start=torch.ones(1, 3000, 1000))
    small = [_job(torch.ones(1, 20, 20), 4, start=torch.ones(1, 20, 4)) for _ in range(100)]
    waves = list(engine._waves([*small, large]))
    assert sorted(index for wave in waves for index in wave) == list(range(101))
    assert len(waves) == 2
    assert 100 in waves[0]
    assert len(waves[0]) < 20
