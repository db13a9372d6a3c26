"""The block iteration, its certificate, and the polar factor, against NumPy's float64 SVD."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rankprune.linalg import RESIDUAL_PROMISE, Decomposition
from rankprune.subspace import Subspace, newton_schulz, random_start

EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _spectrum(kind: str, small: int, cut: int, noise: float, seed: int) -> Tensor:
    index = torch.arange(small).double()
    low = (index < cut).double()
    if kind == "levels":
        generator = np.random.default_rng(seed)
        heights = np.sort(10 ** generator.uniform(-7, 0, 4))[::-1]
        steps = np.sort(generator.integers(0, small + 1, 3))
        return torch.tensor(heights[np.searchsorted(steps, np.arange(small), side="right")])
    return {
        "flat": torch.ones(small).double(),
        "linear": small - index,
        "power law": (1 + index) ** -1.5,
        "low rank": low * (small - index),
        "low rank and noise": low * (small - index) + (1 - low) * noise,
        "gap": (small - index) * torch.where(low > 0, 1.0, noise),
        "cluster": low + (1 - low) * (1 - noise),
        "ill-conditioned": 10 ** (-6 * index / max(small - 1, 1)),
        "geometric": 10 ** (-index / 2),
        "one": (index < 1).double(),
        "zero": torch.zeros(small).double(),
    }[kind]


KINDS = (
    "flat", "linear", "power law", "low rank", "low rank and noise", "gap", "cluster",
    "ill-conditioned", "geometric", "levels", "one", "zero",
)  # fmt: skip


def _matrix(
    rows: int, cols: int, batch: int, kind: str, cut: int = 4, noise: float = 1e-3, seed: int = 0
) -> Tensor:
    """[batch, rows, cols], fp64, with a spectrum of the kind."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, cols)
    u = torch.linalg.qr(torch.randn(batch, rows, small, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(batch, cols, small, generator=generator).double()).Q
    return (u * _spectrum(kind, small, min(cut, small), noise, seed)) @ v.mT


STARTS = (
    "same", "near", "random", "graded", "orthogonal", "unrelated", "nan", "inf", "zero column",
    "repeated column", "near-dependent columns", "zero",
)  # fmt: skip


def _start(matrix: Tensor, size: int, kind: str, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    moved = torch.randn(matrix.shape, generator=generator)
    if kind == "near":
        moved *= noise * matrix.norm() / moved.norm()
        return Decomposition(matrix + moved).start(size)
    if kind == "unrelated":
        return Decomposition(moved).start(size)
    if kind == "orthogonal":
        return Decomposition(matrix).start(min(matrix.shape[-2:])).flip(-1)[..., :size]
    if kind == "random":
        return random_start(matrix, size, seed)
    if kind == "graded":
        scale = 10 ** (8 * torch.rand(size, generator=generator) - 4)
        return random_start(matrix, size, seed) * scale
    start = Decomposition(matrix).start(size)
    if kind == "near-dependent columns":
        # Kahan's matrix: its condition does not show on its diagonal
        sine = 0.1 ** (1 / max(size - 1, 1))
        mixed = torch.eye(size) - (1 - sine**2) ** 0.5 * torch.ones(size, size).triu(1)
        return start @ (sine ** torch.arange(size).unsqueeze(1) * mixed)
    column = seed % size
    if kind in ("nan", "inf"):
        start[..., column] = float(kind)
    elif kind == "zero column":
        start[..., column] = 0
    elif kind == "repeated column":
        start[..., -1] = start[..., 0]
    elif kind == "zero":
        start.zero_()
    return start


def _numpy(matrix: Tensor) -> NDArray[np.float64]:
    return matrix.double().numpy()


def _norms(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(matrix, axis=(-2, -1)))


def _project(subspace: Subspace, rank: int) -> Tensor:
    """`project_` of a copy."""
    whole = copy.copy(subspace)
    whole.matrix = subspace.matrix.clone()
    return whole.project_(rank)


def _checked(matrix: Tensor, subspace: Subspace, rank: int) -> Tensor:
    """Everything that must hold of a round, however bad the start; returns `certified`."""
    reference = _numpy(matrix)
    norm = _norms(reference)
    singular = np.linalg.svd(reference, compute_uv=False)
    optimum = np.sqrt((singular[:, rank:] ** 2).sum(-1))
    certified = subspace.certified(rank)
    assert certified.dtype is torch.bool
    assert certified.shape == matrix.shape[:1]
    sure = certified.numpy()
    measured = subspace.residual(rank).numpy()
    values = subspace.values.numpy()[sure]
    nearest = _project(subspace, rank)
    assert nearest.dtype is matrix.dtype
    assert nearest.shape == matrix.shape
    found = _numpy(nearest)
    residual = _norms(reference - found)
    info = torch.finfo(matrix.dtype)
    rounding = (4 * EPS + info.eps) * norm + info.smallest_normal * info.eps * matrix[0].numel()
    assert (residual <= RESIDUAL_PROMISE * optimum + rounding)[sure].all()
    off = np.abs(measured - residual**2) - 2e-6 * norm**2
    off -= rounding**2 + 2 * rounding * residual
    assert (off <= 1e-3 * residual**2)[sure].all()
    if matrix.dtype == torch.float32:
        left = np.linalg.svd(found[sure], compute_uv=False)[:, rank:]
        assert (left <= 8 * EPS * norm[sure, None]).all()
    assert (np.diff(values, axis=-1) <= 0).all()
    assert (values <= singular[sure, : subspace.size] * (1 + 1e-5) + 1e-3 * norm[sure, None]).all()
    return certified


@settings(max_examples=600)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    batch=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
    start=st.sampled_from(STARTS),
    dtype=st.sampled_from((torch.float32, torch.float32, *DTYPES)),
    cut=st.floats(0, 1),
    at_cut=st.booleans(),
    fraction=st.floats(0, 1),
    more=st.floats(0, 1),
    exponent=st.floats(-7, -0.3),
    seed=st.integers(0, 2**16),
)
def test_the_certificate_is_never_wrong(
    rows: int,
    cols: int,
    batch: int,
    kind: str,
    start: str,
    dtype: torch.dtype,
    cut: float,
    at_cut: bool,
    fraction: float,
    more: float,
    exponent: float,
    seed: int,
) -> None:
    """In no round, whatever the spectrum and the start."""
    small = min(rows, cols)
    edge = 1 + round(cut * (small - 1))
    rank = edge if at_cut else 1 + round(fraction * (small - 1))
    size = rank + round(more * (small - rank))
    matrix = _matrix(rows, cols, batch, kind, edge, 10**exponent, seed).to(dtype)
    subspace = Subspace(matrix, _start(matrix.float(), size, start, 10**exponent, seed))
    assert subspace.size == size
    for attempt in range(3):
        if attempt:
            subspace.refine()
        _checked(matrix, subspace, rank)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (40, 40), (5, 90)])
@pytest.mark.parametrize("start", ["same", "near", "random"])
@pytest.mark.parametrize("more", [0, 1])
def test_what_it_is_made_for_is_certified(shape: tuple[int, int], start: str, more: int) -> None:
    """Low rank and small noise, of the same spectrum as a moment ago."""
    for kind, noise in (("low rank and noise", 1e-3), ("gap", 1e-3), ("gap", 3e-3)):
        matrix = _matrix(*shape, 2, kind, 4, noise).float()
        subspace = Subspace(matrix, _start(matrix, 4 + more, start, 1e-3, 0))
        for _ in range(3 if start == "random" else 0):
            subspace.refine()
        assert _checked(matrix, subspace, 4).all(), kind
        singular = np.linalg.svd(_numpy(matrix), compute_uv=False)[:, :4]
        values = subspace.values[:, :4].numpy()
        assert np.allclose(values, singular, rtol=1e-5)
        assert (values <= singular * (1 + 4 * EPS)).all()


@pytest.mark.parametrize("kind", ["flat", "linear", "cluster"])
def test_no_gap_is_no_promise(kind: str) -> None:
    """Where another direction may be as good as a kept one nothing is certified."""
    matrix = _matrix(30, 40, 2, kind, 10, 1e-6).float()
    subspace = Subspace(matrix, _start(matrix, 4, "orthogonal", 0, 0))
    assert not subspace.certified(4).any()


@pytest.mark.parametrize("start", ["nan", "inf", "zero", "orthogonal"])
def test_a_bad_start_is_noticed_in_its_matrix_alone(start: str) -> None:
    matrix = _matrix(20, 30, 3, "low rank and noise", 3).float()
    good = Decomposition(matrix).start(3)
    mixed = good.clone()
    mixed[1] = _start(matrix, 3, start, 1e-3, 0)[1]
    assert _checked(matrix, Subspace(matrix, mixed), 3).tolist() == [True, False, True]


def test_members_of_a_batch_may_differ_in_size() -> None:
    matrix = _matrix(20, 30, 3, "low rank and noise", 3).float()
    matrix = matrix * torch.tensor([1e-8, 1.0, 1e8])[:, None, None]
    subspace = Subspace(matrix, Decomposition(matrix).start(3))
    for index in range(3):
        part = slice(index, index + 1)
        assert _checked(matrix[part], subspace.part(part), 3).all()
        assert _checked(matrix[part], Subspace(matrix[part], subspace.start(3)[part]), 3).all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_what_fp32_cannot_square_is_not_certified(scale: float) -> None:
    matrix = (_matrix(20, 30, 1, "low rank", 3) * scale).float()
    assert not Subspace(matrix, Decomposition(matrix).start(3)).certified(3).any()


@pytest.mark.parametrize("rank", [3, 5])
def test_its_own_start_keeps_it_converged(rank: int) -> None:
    matrix = _matrix(24, 30, 2, "low rank and noise", rank).float()
    subspace = Subspace(matrix, Decomposition(matrix).start(rank))
    first = _project(subspace, rank)
    for _ in range(5):
        subspace = Subspace(matrix, subspace.start(rank))
        assert subspace.certified(rank).all()
        assert torch.allclose(_project(subspace, rank), first, rtol=0, atol=1e-5)
    repeated = Subspace(matrix, random_start(matrix, rank))
    for _ in range(8):
        repeated.refine()
    assert torch.allclose(_project(repeated, rank), first, rtol=0, atol=1e-4)


def test_it_follows_a_matrix_that_moves() -> None:
    matrix = _matrix(40, 60, 1, "low rank and noise", 6).float()
    start = Decomposition(matrix).start(6)
    for step in range(10):
        matrix = matrix + 1e-4 * torch.randn(
            matrix.shape, generator=torch.Generator().manual_seed(step)
        )
        subspace = Subspace(matrix, start)
        assert _checked(matrix, subspace, 6).all()
        start = subspace.start(6)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("shape", [(18, 31), (31, 18), (20, 20)])
@pytest.mark.parametrize("size", [5, 8])
def test_polar_is_numpys(shape: tuple[int, int], rank: int, size: int) -> None:
    matrix = _matrix(*shape, 2, "low rank and noise", rank, 1e-3).float()
    subspace = Subspace(matrix, Decomposition(matrix).start(max(rank, size)))
    assert subspace.certified(rank).all()
    u, _, vh = np.linalg.svd(_numpy(matrix), full_matrices=False)
    polar = subspace.polar(rank)
    assert polar.dtype is torch.float32
    assert np.allclose(polar.numpy(), u[..., :rank] @ vh[..., :rank, :], rtol=0, atol=1e-4)


def test_polar_leaves_zero_directions_out() -> None:
    matrix = _matrix(18, 31, 2, "low rank", 3).float()
    polar = Subspace(matrix, Decomposition(matrix).start(6)).polar(6)
    values = np.linalg.svd(_numpy(polar), compute_uv=False)
    assert np.allclose(values, np.arange(18) < 3, rtol=0, atol=1e-2)


def test_transposed_matrices_have_transposed_results() -> None:
    wide = _matrix(12, 30, 2, "low rank and noise", 4).float()
    start = random_start(wide, 6)
    one, other = Subspace(wide, start), Subspace(wide.mT, start)
    for verb in (_project, Subspace.polar):
        expected, found = verb(one, 4).mT, verb(other, 4)
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(one.certified(4), other.certified(4))
    assert torch.allclose(one.values, other.values)


@pytest.mark.parametrize("rank", [3, 6])
def test_a_part_is_the_matrix_alone(rank: int) -> None:
    matrix = _matrix(20, 30, 4, "gap", 3, 0.01).float()
    start = _start(matrix, 6, "near", 1e-3, 0)
    whole = Subspace(matrix, start)
    whole.certified(rank)
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        one, alone = whole.part(part), Subspace(matrix[part], start[part])
        assert torch.equal(one.matrix, matrix[part])
        assert torch.equal(one.certified(rank), alone.certified(rank))
        for verb in (_project, Subspace.polar, Subspace.residual):
            found, expected = verb(one, rank), verb(alone, rank)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert torch.allclose(one.values, alone.values, rtol=1e-4)
        one.refine()
        assert torch.allclose(_project(one, 3), _project(alone, 3), rtol=0, atol=1e-3)
    assert whole.matrix.shape == matrix.shape


def test_random_starts_repeat() -> None:
    matrix = torch.zeros(3, 7, 5)
    start = random_start(matrix, 4, seed=1)
    assert start.shape == (3, 5, 4)
    assert start.dtype is torch.float32
    torch.manual_seed(99)
    assert torch.equal(start, random_start(matrix, 4, seed=1))
    assert torch.equal(start[0], start[2])
    assert not torch.equal(start, random_start(matrix, 4, seed=2))


# -- Newton–Schulz ---------------------------------------------------------------------------------


def _polar(matrix: Tensor, zero: float) -> NDArray[np.float64]:
    u, s, vh = np.linalg.svd(_numpy(matrix), full_matrices=False)
    kept = s > zero * s[..., :1]
    return np.asarray((u * kept[..., None, :]) @ vh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 9), (6, 17), (17, 6), (1, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["flat", "linear", "low rank", "one", "zero"])
def test_newton_schulz_is_the_polar_factor(
    dtype: torch.dtype, shape: tuple[int, int], kind: str
) -> None:
    """Zero singular values stay zero."""
    for scale in (1e-6, 1.0, 1e6):
        matrix = (scale * _matrix(*shape, 2, kind, 3)).to(dtype)
        found = newton_schulz(matrix)
        assert found.dtype is dtype
        assert found.shape == matrix.shape
        assert np.allclose(found.numpy(), _polar(matrix, 1e-5), rtol=0, atol=1e-4)
        assert torch.allclose(newton_schulz(matrix[0]), found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-18, 1e18, 1e30])
def test_newton_schulz_knows_no_scale(scale: float) -> None:
    matrix = torch.randn(7, 12)
    expected = newton_schulz(matrix)
    assert torch.allclose(newton_schulz(matrix * scale), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-2), (torch.float64, 1e-9)])
def test_newton_schulz_reaches_small_values(dtype: torch.dtype, close: float) -> None:
    """A condition of 10,000; fp32 knows the small directions to three digits."""
    values = torch.logspace(0, -4, 12, dtype=torch.float64)
    matrix = (_matrix(12, 20, 2, "flat") * 1.0).double()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = ((u * values) @ vh).to(dtype)
    found = newton_schulz(matrix, tolerance=1e-6 if dtype == torch.float32 else 1e-12)
    assert np.allclose(found.numpy(), _polar(matrix, 0), rtol=0, atol=close)
    singular = np.linalg.svd(_numpy(found), compute_uv=False)
    assert np.allclose(singular, 1, rtol=0, atol=1e-4)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    kind=st.sampled_from(("flat", "linear", "power law", "low rank", "cluster")),
    seed=st.integers(0, 999),
)
@example(rows=20, cols=20, kind="linear", seed=0)
def test_newton_schulz_everywhere(rows: int, cols: int, kind: str, seed: int) -> None:
    matrix: Any = _matrix(rows, cols, 2, kind, 3, 0.1, seed)
    assert np.allclose(newton_schulz(matrix).numpy(), _polar(matrix, 1e-9), rtol=0, atol=1e-5)
