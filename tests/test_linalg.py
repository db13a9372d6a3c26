"""Truncation, projection and polar factor, against NumPy's float64 SVD and torch's autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankprune.errors import LayerError, NumericsError, RankPruneError
from rankprune.linalg import (
    _BLOCK_ROWS,
    RESIDUAL_PROMISE,
    Decomposition,
    check_finite,
    full_precision,
    gram_lower,
    singular_values,
    square_sum,
)

EPS = {
    torch.float64: torch.finfo(torch.float64).eps,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}


def _matrix(rows: int, cols: int, batch: int, kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """[batch, rows, cols] with a spectrum of the kind."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, cols)
    u = torch.linalg.qr(torch.randn(batch, rows, small, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(batch, cols, small, generator=generator).double()).Q
    index = torch.arange(small).double()
    spectra = {
        "flat": torch.ones(small).double(),
        "linear": small - index,
        "ill-conditioned": 10 ** (-index),
        "deficient": (index < max(1, small // 2)).double() * (small - index),
        "one": (index < 1).double(),
        "zero": torch.zeros(small).double(),
        "tiny": 1e-20 * (small - index),
        "large": 1e15 * (small - index),
    }
    return ((u * spectra[kind]) @ v.mT).to(dtype)


KINDS = ("flat", "linear", "ill-conditioned", "deficient", "one", "zero")
shapes: dict[str, Any] = {
    "rows": st.integers(1, 24),
    "cols": st.integers(1, 24),
    "batch": st.integers(1, 3),
    "kind": st.sampled_from(KINDS),
    "fraction": st.floats(0, 1),
    "seed": st.integers(0, 2**16),
}


def _checked_residual(
    matrix: Tensor,
    rank: int,
    *,
    working: torch.dtype = torch.float64,
    decomposition: Decomposition | None = None,
) -> None:
    """The residual of a projection equals the norm of the discarded singular values."""
    reference = matrix.double().numpy()
    values = np.linalg.svd(reference, compute_uv=False)
    optimum = np.sqrt((values[:, rank:] ** 2).sum(-1))
    norm = np.linalg.norm(reference, axis=(-2, -1))
    if decomposition is None:
        decomposition = Decomposition(matrix, working=working)
    projected = decomposition.project(rank)
    assert projected.dtype is matrix.dtype
    assert projected.shape == matrix.shape
    residual = np.linalg.norm(reference - projected.double().numpy(), axis=(-2, -1))
    # rounding of the result, and of the few sums that lead to it
    rounding = 4 * EPS[matrix.dtype] * norm * (8 if matrix.dtype == torch.float64 else 1)
    assert (residual <= RESIDUAL_PROMISE * optimum + rounding).all()
    assert (residual >= optimum - rounding).all()
    # LAPACK promises a modest multiple of eps in fp64; the Gram engine has digits to spare
    digits = 32 * EPS[torch.float64] if matrix.dtype == torch.float64 else 8 * EPS[torch.float32]
    kept = decomposition.truncate(rank)
    values = kept.s.double().numpy()
    assert (values[:, :-1] >= values[:, 1:] - digits * norm[:, None]).all()
    composed = (kept.u * kept.s.unsqueeze(-2)) @ kept.vh
    residual = np.linalg.norm(reference - composed.double().numpy(), axis=(-2, -1))
    assert (residual <= RESIDUAL_PROMISE * optimum + digits * norm).all()
    left, right = kept.balanced()
    assert np.allclose((left @ right).numpy(), composed.numpy(), atol=digits * norm.max())


@settings(max_examples=500)
@given(dtype=st.sampled_from((torch.float32, torch.float64)), **shapes)
@example(dtype=torch.float32, rows=1, cols=9, batch=1, kind="flat", fraction=1.0, seed=0)
@example(dtype=torch.float32, rows=9, cols=1, batch=2, kind="linear", fraction=0.0, seed=0)
@example(dtype=torch.float32, rows=8, cols=8, batch=3, kind="zero", fraction=0.5, seed=0)
@example(dtype=torch.float64, rows=1, cols=1, batch=1, kind="one", fraction=0.0, seed=0)
def test_residual_is_the_discarded_energy(
    dtype: torch.dtype, rows: int, cols: int, batch: int, kind: str, fraction: float, seed: int
) -> None:
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    _checked_residual(_matrix(rows, cols, batch, kind, dtype, seed), rank)


@settings(max_examples=60)
@given(dtype=st.sampled_from((torch.float16, torch.bfloat16)), **shapes)
def test_half_precision_is_computed_in_full(
    dtype: torch.dtype, rows: int, cols: int, batch: int, kind: str, fraction: float, seed: int
) -> None:
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    matrix = _matrix(rows, cols, batch, kind, dtype, seed)
    _checked_residual(matrix, rank)
    assert Decomposition(matrix).truncate(rank).u.dtype is torch.float32
    assert Decomposition(matrix).values.dtype is torch.float64


@pytest.mark.parametrize("kind", ["tiny", "large", "ill-conditioned"])
@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 64)])
def test_promise_holds_far_from_one(kind: str, shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape, 1, kind, torch.float32, 0)
    for rank in (1, 3, 7, 20, 39):
        _checked_residual(matrix, rank)


def test_matrices_of_one_batch_differ_in_size() -> None:
    """A tiny matrix beside a large one keeps its own promise."""
    matrix = _matrix(12, 20, 3, "linear", torch.float32, 0)
    _checked_residual(matrix * torch.tensor([1e-6, 1.0, 1e6])[:, None, None], 5)


def test_exact_svd_takes_over_where_the_gram_engine_falls_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bad eigenvectors are noticed by the measured residual."""
    matrix = _matrix(12, 20, 2, "linear", torch.float32, 0)
    eigh = torch.linalg.eigh

    def wrong(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(gram)
        return values, vectors.roll(1, -1)

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    _checked_residual(matrix, 4)


@settings(max_examples=60)
@given(dtype=st.sampled_from((torch.float32, torch.float64)), **shapes)
def test_values_are_numpys(
    dtype: torch.dtype, rows: int, cols: int, batch: int, kind: str, fraction: float, seed: int
) -> None:
    matrix = _matrix(rows, cols, batch, kind, dtype, seed)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    # the square of a value is exact to eps of the largest square
    tolerance = 1e-13 if dtype == torch.float64 else 2e-7
    for values in (Decomposition(matrix).values, singular_values(matrix)):
        assert values.dtype is torch.float64
        assert np.allclose(values.numpy(), expected, rtol=0, atol=tolerance * expected.max())


@settings(max_examples=60)
@given(**shapes)
def test_projecting_twice_changes_nothing(
    rows: int, cols: int, batch: int, kind: str, fraction: float, seed: int
) -> None:
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    matrix = _matrix(rows, cols, batch, kind, torch.float32, seed)
    once = Decomposition(matrix).project(rank)
    twice = Decomposition(once).project(rank)
    assert torch.allclose(once, twice, rtol=0, atol=4e-6 * float(once.abs().max()) + 1e-30)


# -- the Gram engine in fp32 -----------------------------------------------------------------------


@settings(max_examples=300)
@given(
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    scale=st.sampled_from((1.0, 1.0, 1e-3, 1e3, 1e-20, 1e20)),
    **shapes,
)
@example(
    dtype=torch.float32, scale=1.0, rows=24, cols=24, batch=3, kind="zero", fraction=0.5, seed=0
)
def test_fp32_keeps_the_promise_or_hands_over(
    dtype: torch.dtype,
    scale: float,
    rows: int,
    cols: int,
    batch: int,
    kind: str,
    fraction: float,
    seed: int,
) -> None:
    """The same contract, also where the squares are out of fp32's range or digits are missing."""
    if dtype == torch.float16:
        scale = 1.0
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    matrix = (scale * _matrix(rows, cols, batch, kind, torch.float64, seed)).to(dtype)
    _checked_residual(matrix, rank, working=torch.float32)


@pytest.mark.parametrize("kind", ["tiny", "large", "ill-conditioned", "deficient", "linear"])
@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 64)])
def test_fp32_keeps_the_promise_far_from_one(kind: str, shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape, 2, kind, torch.float32, 0)
    for rank in (1, 3, 7, 20, 39, 40):
        _checked_residual(matrix, rank, working=torch.float32)


def test_fp32_is_really_used_and_left_where_it_must() -> None:
    """Half of the time is the point of it."""
    used: list[torch.dtype] = []
    eigh = torch.linalg.eigh

    def spied(gram: Tensor) -> Any:
        used.append(gram.dtype)
        return eigh(gram)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", spied)
        for kind, expected in (
            ("linear", [torch.float32]),
            ("flat", [torch.float32]),
            ("ill-conditioned", [torch.float32, torch.float64]),
            ("tiny", [torch.float64]),
        ):
            used.clear()
            matrix = _matrix(20, 30, 2, kind, torch.float32, 0)
            Decomposition(matrix, working=torch.float32).project(10)
            assert used == expected, kind


@pytest.mark.parametrize("working", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_what_is_tried_first_suffices_at_every_size(working: torch.dtype, size: float) -> None:
    matrix = size * _matrix(20, 30, 2, "linear", torch.float32, 0) / 100
    decomposition = Decomposition(matrix, working=working)
    decomposition.project(10)
    assert decomposition._working is working
    assert "_svd" not in vars(decomposition)


@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_ranks_may_be_asked_for_in_any_order(working: torch.dtype) -> None:
    matrix = _matrix(12, 20, 2, "linear", torch.float32, 0)
    decomposition = Decomposition(matrix, working=working)
    for rank in (5, 2, 7, 12, 1):
        _checked_residual(matrix, rank, decomposition=decomposition)


@settings(max_examples=100)
@given(working=st.sampled_from((torch.float32, torch.float64)), **shapes)
def test_parts_of_a_batch_keep_the_promise_each(
    working: torch.dtype,
    rows: int,
    cols: int,
    batch: int,
    kind: str,
    fraction: float,
    seed: int,
) -> None:
    """Of matrices of all kinds, in one decomposition."""
    matrix = torch.cat(
        [_matrix(rows, cols, batch, k, torch.float32, seed) for k in ("linear", kind, "deficient")]
    )
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    whole = Decomposition(matrix, working=working)
    for index in range(3):
        part = slice(index * batch, (index + 1) * batch)
        one, alone = whole.part(part), Decomposition(matrix[part], working=working)
        _checked_residual(matrix[part], rank, decomposition=one)
        size = float(alone.values.max()) + 1e-30
        assert torch.allclose(one.values, alone.values, rtol=0, atol=1e-3 * size)
        assert one.polar(rank).shape == matrix[part].shape
    assert torch.equal(whole.matrix, matrix)
    _checked_residual(matrix, rank, decomposition=whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_parts_answer_as_the_whole(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = _matrix(*shape, 3, "linear", dtype, 0)
    whole = Decomposition(matrix)
    for rank in (2, 5):
        part = whole.part(slice(1, 3))
        for verb in ("project", "polar", "start"):
            expected = getattr(whole, verb)(rank)[1:3]
            assert torch.allclose(getattr(part, verb)(rank), expected, rtol=0, atol=1e-6), verb


@pytest.mark.parametrize("working", [torch.float32, torch.float64])
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("kind", ["linear", "deficient", "zero", "one"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_start_holds_the_leading_vectors_over_their_values(
    working: torch.dtype, rough: bool, kind: str, shape: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        matrix = _matrix(*shape, 2, kind, dtype, 0)
        start = Decomposition(matrix, working=working).start(4, rough=rough)
        assert start.dtype is torch.float32
        assert start.shape == (2, 12, 4)
        assert torch.isfinite(start).all()
        oriented = matrix.double() if shape[0] < shape[1] else matrix.double().mT
        singular = np.linalg.svd(oriented.numpy(), compute_uv=False)[:, :4]
        # Xᵀ M is orthonormal already where there is anything
        rows = start.double().mT @ oriented
        least = 1e-2 if rough else 1e-3
        alive = torch.tensor(singular > least * singular[:, :1]).double()
        expected = torch.diag_embed(alive)
        mask = alive.unsqueeze(-1) * alive.unsqueeze(-2)
        assert torch.allclose(rows @ rows.mT * mask, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5, _BLOCK_ROWS - 1, _BLOCK_ROWS, _BLOCK_ROWS + 1, 501])
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)])
def test_gram_is_the_product_on_the_lower_triangle(rows: int, batch: tuple[int, ...]) -> None:
    for cols in (1, 7):
        matrix = torch.randn(*batch, rows, cols, dtype=torch.float64)
        found = gram_lower(matrix).numpy()
        expected = matrix.numpy() @ np.swapaxes(matrix.numpy(), -1, -2)
        assert np.allclose(np.tril(found), np.tril(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_large_matrices_go_by_blocks(working: torch.dtype) -> None:
    matrix = _matrix(_BLOCK_ROWS + 3, _BLOCK_ROWS + 40, 1, "linear", torch.float32, 0)
    _checked_residual(matrix, 100, working=working)


# -- polar factor ----------------------------------------------------------------------------------


def _nuclear_gradient(matrix: Tensor) -> Tensor:
    leaf = matrix.clone().requires_grad_()
    torch.linalg.matrix_norm(leaf, "nuc").sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@settings(max_examples=100)
@given(
    rows=st.integers(1, 16),
    cols=st.integers(1, 16),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_polar_is_the_nuclear_norms_gradient(rows: int, cols: int, batch: int, seed: int) -> None:
    """At full rank, in float64, to 1e-8."""
    generator = torch.Generator().manual_seed(seed)
    # well apart from rank-deficient, where the gradient is not defined
    matrix = torch.randn(batch, rows, cols, generator=generator, dtype=torch.float64)
    matrix = matrix + 8 * torch.eye(rows, cols, dtype=torch.float64)
    expected = _nuclear_gradient(matrix)
    assert torch.allclose(Decomposition(matrix).polar(), expected, rtol=0, atol=1e-8)
    single = Decomposition(matrix.float()).polar()
    assert torch.allclose(single.double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=60)
@given(dtype=st.sampled_from((torch.float32, torch.float64)), **shapes)
def test_polar_has_singular_values_of_one_or_zero(
    dtype: torch.dtype, rows: int, cols: int, batch: int, kind: str, fraction: float, seed: int
) -> None:
    matrix = _matrix(rows, cols, batch, kind, dtype, seed)
    rank = 1 + int(fraction * (min(rows, cols) - 1))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    polar = Decomposition(matrix).polar(rank)
    assert polar.dtype is dtype
    assert torch.isfinite(polar).all()
    found = np.linalg.svd(polar.double().numpy(), compute_uv=False)
    clear = 1e-3 * values[:, :1]
    ones = ((values > clear) & (np.arange(values.shape[1]) < rank)).sum(1)
    most = np.minimum((values > 1e-9 * values[:, :1]).sum(1), rank)
    for own, least, largest in zip(found, ones, most, strict=True):
        assert np.allclose(own[:least], 1, atol=1e-3)
        assert np.allclose(own[largest:], 0, atol=1e-6)


def test_polar_of_zero_is_zero() -> None:
    for dtype in EPS:
        polar = Decomposition(torch.zeros(2, 4, 3, dtype=dtype)).polar()
        assert torch.equal(polar, torch.zeros(2, 4, 3, dtype=dtype))


def test_polar_of_a_rank_is_over_the_kept_directions() -> None:
    matrix = _matrix(6, 9, 2, "linear", torch.float64, 3)
    u, _, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    expected = u[..., :2] @ vh[..., :2, :]
    assert np.allclose(Decomposition(matrix).polar(2).numpy(), expected, atol=1e-12)
    single = Decomposition(matrix.float()).polar(2)
    assert np.allclose(single.numpy(), expected, atol=1e-5)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 4, 100])
@pytest.mark.parametrize("method", ["project", "truncate", "polar"])
def test_rank_out_of_range_is_named(method: str, rank: int) -> None:
    decomposition = Decomposition(torch.randn(1, 3, 5))
    with pytest.raises(LayerError, match=f"rank {rank} is out of range for a 3×5 matrix"):
        getattr(decomposition, method)(rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_failed_decomposition_is_never_hidden(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    for name in ("svd", "eigh", "svdvals", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fails)
    matrix = torch.randn(1, 3, 5, dtype=dtype)
    with pytest.raises(NumericsError, match="1×3×5 matrix failed: did not converge"):
        Decomposition(matrix).project(2)
    with pytest.raises(NumericsError, match="did not converge"):
        Decomposition(matrix).values.sum()
    with pytest.raises(NumericsError, match="did not converge"):
        singular_values(matrix)


def test_non_finite_weights_are_counted_and_named() -> None:
    weight = torch.zeros(3, 4)
    check_finite(weight, "stem.conv")
    weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(NumericsError, match=r"'stem.conv'.* 1 NaN and 2 infinite values of 12"):
        check_finite(weight, "stem.conv")


def test_numerics_error_is_one_of_ours_and_arithmetic() -> None:
    assert issubclass(NumericsError, RankPruneError)
    assert issubclass(NumericsError, ArithmeticError)


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_products_are_in_full_precision_whatever_is_allowed(asked: str) -> None:
    """And the setting comes back, from within, after an error, and with others inside."""
    a, b = torch.randn(2, 64, 64)
    expected = a.double() @ b.double()

    def compute() -> None:
        with full_precision():
            with full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
            assert ((a @ b) - expected).abs().max() < 1e-4
            raise KeyError

    torch.set_float32_matmul_precision(asked)
    try:
        with pytest.raises(KeyError):
            compute()
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_newer_setting_of_precision_is_heeded() -> None:
    backend: Any = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("this torch has the older setting only")
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 512, 4608), (2, 1000, 2048)])
def test_norms_of_large_matrices_have_all_digits(
    shape: tuple[int, int, int], transposed: bool
) -> None:
    """Where torch's own norm, on a CPU, is wrong in the fifth."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = matrix.double().square().sum((-2, -1))
    found = square_sum(matrix.mT if transposed else matrix)
    assert torch.allclose(found, expected, rtol=5e-7, atol=0)
