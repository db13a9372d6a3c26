"""Jobs of all kinds in one list: the promise, whatever else is in the list and whoever computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankprune import Energy, MatrixShape, NumericsError, RankRule, Spectrum, StableRank, Threshold
from rankprune import engine as engine_module
from rankprune.engine import SMALLEST_SIDE, Job, Projected, project
from rankprune.linalg import RESIDUAL_PROMISE, Decomposition
from rankprune.subspace import gaussian

EPS = torch.finfo(torch.float32).eps
HALF = SMALLEST_SIDE // 2


def _matrix(
    rows: int, cols: int, batch: int = 1, *, seed: int = 0, decay: float = 0.7, noise: float = 1e-4
) -> Tensor:
    """[batch, rows, cols], fp32: a spectrum that falls by a factor each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, cols)
    u = torch.linalg.qr(torch.randn(batch, rows, small, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(batch, cols, small, generator=generator)).Q
    signal = (u * decay ** torch.arange(small)) @ v.mT
    return signal + noise * torch.randn(batch, rows, cols, generator=generator) / small**0.5


def _job(matrix: Tensor, rank: int | RankRule | Callable[[Spectrum], int], **options: Any) -> Job:
    chooses = rank.select if isinstance(rank, RankRule) else rank
    return Job(
        shape=MatrixShape(*matrix.shape),
        load=matrix.clone,
        dtype=matrix.dtype,
        device=matrix.device,
        rank=chooses,
        **{"leading": isinstance(rank, RankRule) and rank.reads == "leading", **options},
    )


def _done(jobs: Sequence[Job]) -> list[Projected]:
    results = dict(project(jobs))
    assert sorted(results) == list(range(len(jobs)))
    return [results[index] for index in range(len(jobs))]


def _checked(matrix: Tensor, job: Job, result: Projected) -> None:
    """The promise, the energy and the polar factor of one result, against NumPy."""
    reference = matrix.double().numpy()
    u, singular, vh = np.linalg.svd(reference, full_matrices=False)
    rank, most = result.rank, job.shape.max_rank
    assert 1 <= rank <= most
    if isinstance(job.rank, int):
        assert rank == job.rank
    optimum = np.sqrt((singular[:, rank:] ** 2).sum(-1))
    norm = np.linalg.norm(reference, axis=(-2, -1))
    if rank == most:
        assert result.nearest is None
    else:
        assert result.nearest is not None
        assert result.nearest.dtype is matrix.dtype
        assert result.nearest.shape == matrix.shape
        found = result.nearest.double().numpy()
        residual = np.linalg.norm(reference - found, axis=(-2, -1))
        rounding = (4 * EPS + torch.finfo(matrix.dtype).eps) * norm
        assert (residual <= RESIDUAL_PROMISE * optimum + rounding).all()
    kept = (singular[:, :rank] ** 2).sum() / (singular**2).sum()
    assert result.energy == pytest.approx(kept, abs=1e-5 + 2e-4 * (1 - kept))
    assert (result.polar is not None) == job.polar
    if result.polar is not None:
        assert result.polar.dtype is matrix.dtype
        assert result.polar.shape == matrix.shape
        expected = u[..., :rank] @ vh[..., :rank, :]
        if (singular[:, rank - 1] > 1e-3 * singular[:, 0]).all():
            # what may be missed of the energy turns the directions by as much
            gap = 1.0 if rank == most else float((singular[:, rank - 1] - singular[:, rank]).min())
            loose = 0.02 * float(optimum.max()) / max(gap, 1e-9)
            close = 1e-3 + loose + 2 * torch.finfo(matrix.dtype).eps
            assert np.abs(result.polar.double().numpy() - expected).max() <= close
    if result.start is not None:
        assert result.start.dtype is torch.float32
        assert result.start.shape[:2] == (job.shape.batch, min(job.shape.rows, job.shape.cols))
        assert result.start.shape[2] >= rank
        assert torch.isfinite(result.start).all()


def _mixed() -> list[tuple[Tensor, Job]]:
    """Every kind of job, with and without a start."""
    pairs = []
    shapes = [(1, 7, 5), (3, 7, 5), (1, 96, 120), (2, 120, 96), (1, 128, 128), (1, 1, 9)]
    ranks: list[Any] = [1, 4, Energy(0.95), Threshold(0.05, relative=True), lambda s: 3]
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for seed, ((batch, rows, cols), rank, dtype) in enumerate(
        itertools.product(shapes, ranks, dtypes)
    ):
        matrix = _matrix(rows, cols, batch, seed=seed).to(dtype)
        most = min(rows, cols)
        rank = min(rank, most) if isinstance(rank, int) else rank
        if not isinstance(rank, (int, RankRule)):
            rank = (lambda s, m=most: min(3, m)) if seed % 2 else most
        job = _job(matrix, rank, polar=seed % 3 == 0)
        if seed % 2:
            moved = matrix.float() * 1.001
            job = replace(job, start=Decomposition(moved).start(min(12, most)))
        pairs.append((matrix, job))
    return pairs


def _same(one: Projected, other: Projected, close: float) -> None:
    assert one.rank == other.rank
    assert one.energy == pytest.approx(other.energy, abs=1e-6)
    for name in ("nearest", "polar"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if first is not None:
            assert torch.allclose(first.double(), second.double(), rtol=0, atol=close), name
    assert (one.start is None) == (other.start is None)


def test_every_job_of_a_mixed_list_keeps_the_promise() -> None:
    pairs = _mixed()
    results = _done([job for _, job in pairs])
    for (matrix, job), result in zip(pairs, results, strict=True):
        _checked(matrix, job, result)


def test_company_and_order_change_nothing() -> None:
    jobs = [job for _, job in _mixed()]
    together = _done(jobs)
    order = torch.randperm(len(jobs)).tolist()
    shuffled = _done([jobs[index] for index in order])
    for position, index in enumerate(order):
        close = 1e-2 if jobs[index].dtype == torch.bfloat16 else 2e-4
        _same(together[index], shuffled[position], close)
        _same(together[index], _done([jobs[index]])[0], close)


def test_the_same_jobs_twice_are_the_same_bits() -> None:
    jobs = [job for _, job in _mixed()]
    for one, other in zip(_done(jobs), _done(jobs), strict=True):
        assert one.rank == other.rank
        assert one.energy == other.energy
        for name in ("nearest", "polar", "start"):
            first, second = getattr(one, name), getattr(other, name)
            assert first is second or torch.equal(first, second)


@pytest.mark.parametrize("size", [1, 200_000])
def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    pairs = _mixed()
    jobs = [job for _, job in pairs]
    before = _done(jobs)
    monkeypatch.setattr(engine_module, "CHUNK_BYTES", size)
    for (matrix, job), one, other in zip(pairs, _done(jobs), before, strict=True):
        _checked(matrix, job, one)
        _same(one, other, 1e-2 if job.dtype == torch.bfloat16 else 2e-4)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 30),
    cols=st.integers(1, 30),
    batch=st.integers(1, 3),
    rank=st.floats(0, 1),
    size=st.floats(0, 1),
    decay=st.floats(0.1, 1.0),
    drift=st.floats(-6, 0),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 999),
)
def test_starts_of_all_kinds(
    rows: int,
    cols: int,
    batch: int,
    rank: float,
    size: float,
    decay: float,
    drift: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Too few directions, too many, near and far."""
    matrix = _matrix(rows, cols, batch, seed=seed, decay=decay)
    most = min(rows, cols)
    moved = matrix + 10**drift * torch.randn(
        matrix.shape, generator=torch.Generator().manual_seed(seed)
    )
    start = Decomposition(moved).start(1 + round(size * (most - 1)))
    matrix = matrix.to(dtype)
    for chosen in (1 + round(rank * (most - 1)), Energy(0.9)):
        job = _job(matrix, chosen, start=start, polar=True)
        (result,) = _done([job])
        _checked(matrix, replace(job, polar=False), replace(result, polar=None))


def _counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Decompositions from now on, and the largest eigenproblem."""
    counts = {"decompositions": 0, "largest": 0}

    class Spy(Decomposition):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            counts["decompositions"] += 1
            super().__init__(*args, **kwargs)

    eigh = torch.linalg.eigh

    def counting(matrix: Tensor) -> Any:
        counts["largest"] = max(counts["largest"], matrix.shape[-1])
        return eigh(matrix)

    monkeypatch.setattr(engine_module, "Decomposition", Spy)
    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return counts


@pytest.mark.parametrize("start", ["unrelated", "zero", "nan"])
def test_a_start_gone_bad_is_noticed(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    matrix = _matrix(100, 130, seed=1)
    job = _job(_matrix(100, 130, seed=2), 6)
    (before,) = _done([job])
    assert before.start is not None
    bad = {
        "unrelated": before.start,
        "zero": torch.zeros_like(before.start),
        "nan": torch.full_like(before.start, float("nan")),
    }[start]
    counts = _counted(monkeypatch)
    good = _job(_matrix(100, 130, seed=3), 6)
    good = replace(good, start=_done([good])[0].start)
    counts["decompositions"] = 0
    job = _job(matrix, 6, start=bad, polar=True)
    results = _done([good, job])
    _checked(matrix, job, results[1])
    _checked(good.load(), good, results[0])
    if start != "unrelated":
        assert counts["decompositions"] == 1
    # and the next time all is well
    counts["decompositions"] = 0
    _done([replace(job, start=results[1].start, polar=False)])
    assert counts["decompositions"] == 0


@pytest.mark.parametrize("shape", [(128, 128), (96, 400), (400, 96)])
@pytest.mark.parametrize("rank", [16, Energy(0.98), StableRank(4.0)])
def test_training_takes_the_warm_path(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: Any
) -> None:
    """After the first projection nothing is decomposed that is larger than what is followed."""
    weight = _matrix(*shape, decay=0.8)
    start, widest = None, 0
    counts = _counted(monkeypatch)
    for step in range(12):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight = weight + 1e-3 * noise / shape[0] ** 0.5
        if step == 2:
            counts.update(decompositions=0, largest=0)
        job = _job(weight, rank, start=start, polar=True)
        (result,) = _done([job])
        _checked(weight, job, result)
        assert result.start is not None
        start = result.start
        widest = max(widest, start.shape[-1])
        assert result.nearest is not None
        weight = result.nearest
    assert counts["decompositions"] == 0
    assert counts["largest"] <= widest <= HALF


RULES = [Energy(0.95), Energy(0.995), Threshold(0.05), Threshold(0.02, relative=True)]


@pytest.mark.parametrize("rule", [*RULES, StableRank(2.0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 100, 130), (1, 160, 96)])
def test_ranks_by_leading_values_are_those_by_all(
    rule: RankRule, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the spectrum drifts, so that the rank grows and shrinks."""
    batch, rows, cols = shape
    generator = torch.Generator().manual_seed(4)
    u = torch.linalg.qr(torch.randn(batch, rows, min(rows, cols), generator=generator)).Q
    v = torch.linalg.qr(torch.randn(batch, cols, min(rows, cols), generator=generator)).Q
    counts = _counted(monkeypatch)
    start, found = None, []
    for step in range(24):
        decay = 0.6 + 0.2 * np.sin(step / 4)
        matrix = (u * decay ** torch.arange(u.shape[-1])) @ v.mT
        matrix += 1e-5 * torch.randn(matrix.shape, generator=generator)
        job = _job(matrix, rule, start=start)
        (result,) = _done([job])
        _checked(matrix, job, result)
        values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        assert result.rank == rule.select(Spectrum(torch.tensor(values), job.shape))
        found.append(result.rank)
        start = result.start
        assert start is not None
    assert len(set(found)) >= 3
    assert counts["decompositions"] < 12


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [6, 40, Energy(0.9)], ids=str)
def test_the_default_dtype_changes_nothing(default: torch.dtype, rank: Any) -> None:
    matrix = _matrix(120, 130, 2, seed=4)
    moved = matrix + 1e-4 * torch.randn(matrix.shape)
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        gaussian.cache_clear()
        (first,) = _done([_job(matrix, rank, polar=True)])
        found += _done([_job(moved, rank, start=first.start, polar=True)])
        torch.set_default_dtype(torch.float32)
    for name in ("nearest", "polar", "start"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.parametrize("scale", [1e-13, 1e-15, 1e-17, 1e-20, 1e-30])
@pytest.mark.parametrize("rank", [5, Energy(0.9)], ids=str)
def test_what_has_all_but_vanished_is_projected(rank: Any, scale: float) -> None:
    """As in a layer that is dead, and decays."""
    matrix = _matrix(100, 130, seed=5, noise=0.0)
    (first,) = _done([_job(matrix, rank)])
    assert first.nearest is not None
    faint = first.nearest * scale
    job = _job(faint, rank, start=first.start)
    (second,) = _done([job])
    _checked(faint, job, second)


def test_full_rank_changes_nothing_and_loads_nothing() -> None:
    def unread() -> Tensor:
        raise AssertionError("loaded for nothing")

    matrix = _matrix(9, 6)
    idle = replace(_job(matrix, 6), load=unread)
    polar = _job(matrix, 6, polar=True)
    chosen = _job(matrix, Energy(1.0))
    first, second, third = _done([idle, polar, chosen])
    for result in (first, second, third):
        assert result.nearest is None
        assert (result.rank, result.energy) == (6, 1.0)
    _checked(matrix, polar, second)


def test_zeros_keep_all_their_energy() -> None:
    for size in (8, 120):
        matrix = torch.zeros(2, size, size)
        start = torch.ones(2, size, 3)
        for job in (_job(matrix, 2), _job(matrix, Energy(0.9)), _job(matrix, 2, start=start)):
            (result,) = _done([replace(job, polar=True)])
            assert result.energy == 1.0
            assert result.nearest is not None
            assert result.polar is not None
            assert not result.nearest.any()
            assert not result.polar.any()


def test_a_rule_that_reads_all_values_gets_them() -> None:
    """In fp64's digits, and never from the iteration."""
    matrix = _matrix(100, 120, decay=0.8, noise=0)
    seen: list[Spectrum] = []

    def rule(spectrum: Spectrum) -> int:
        seen.append(spectrum)
        return 10

    start = Decomposition(matrix).start(20)
    _done([_job(matrix, rule, start=start)])
    (spectrum,) = seen
    assert spectrum.total is None
    assert spectrum.values.shape == (1, 100)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert np.allclose(spectrum.values.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_only_what_is_asked_for_is_loaded() -> None:
    """One chunk after the other, so that few matrices are in memory at once."""
    loaded: list[int] = []

    def job(index: int) -> Job:
        matrix = _matrix(64, 64, seed=index)

        def load() -> Tensor:
            loaded.append(index)
            return matrix

        return replace(_job(matrix, 3), load=load)

    jobs = [job(index) for index in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CHUNK_BYTES", 1)
        results: Iterator[tuple[int, Projected]] = project(jobs)
        for count, _ in enumerate(results, 1):
            assert len(loaded) == count


def test_a_failed_decomposition_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, fails)
    with pytest.raises(NumericsError, match="did not converge"):
        _done([_job(_matrix(9, 6), 2)])
