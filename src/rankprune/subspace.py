"""Block iteration for leading singular subspaces: warm-started, or from a random start.

Between two projections a weight moves little, so the subspace of the last one is nearly right.
The iteration then takes three matrix products, and no decomposition is larger than rank × rank:

    V = orth(Xᵀ M)        right basis, from the start X
    Z = M Vᵀ              left factor: the best one for this V
    P = Z V               the projection

Every further step costs one product: it takes the orthonormal basis of the last factor, on
alternating sides, and finds the best factor for it. X is the pseudo-inverse of the left factor,
transposed: with it Xᵀ M is nearly orthonormal already, and one Cholesky QR makes it so to fp32's
precision. A Gaussian X makes the first step a randomised range finder (Halko, Martinsson, Tropp
2011, arXiv 0909.4061).

`certified` bounds how far a residual is from the optimum without knowing it. With T = ZᵀZ, the
rest D = M − Z V and the coupling B = Dᵀ Z, the energy that the subspace misses is at most
‖B‖² / (λ_min(T) − ‖D‖₂²) (from [T Bᵀ; B DᵀD] ⪯ diag(T + BᵀB/η, DᵀD + η I), and Ky Fan's theorem).
A spectrum without a gap at the rank cannot be certified so; other engines take over there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankprune.linalg import RESIDUAL_PROMISE, in_safe_range, square_sum

# Gaussian probes for the norms in the certificate, and what their estimates are multiplied by: at
# rank one, 16 probes underestimate a squared norm by more than 4 less than once in 1,000 times.
PROBES = 16
SAFETY = 4.0

_EPS = torch.finfo(torch.float32).eps
_TINY = torch.finfo(torch.float32).tiny


# what a step computes, one entry a matrix
_TENSORS = ("_oriented", "_right", "_orthonormal", "_left", "_gram")


class _Kept(NamedTuple):
    """The leading r of k directions and the others: left factors Z·W, and W itself."""

    left: Tensor  # [batch, small, r]
    gram: Tensor  # leftᵀ · left, [batch, r, r]
    rotation: Tensor | None  # [batch, k, r]; None where r is k
    dropped: Tensor  # [batch, small, k - r]
    dropped_rotation: Tensor  # [batch, k, k - r]


class Subspace:
    """Leading singular subspaces of a batch of matrices, after one step from a start.

    Args:
        matrix: [batch, rows, cols], finite; fp32, or half precision, which is computed in fp32.
        start: [batch, min(rows, cols), k]: from `start` of another `Subspace` or of a
            `Decomposition`, or from `random_start`.

    >>> m = torch.diag(torch.tensor([3.0, 2.0, 0.01, 0.01]))[None]
    >>> subspace = Subspace(m, random_start(m, 2))
    >>> for _ in range(2):
    ...     subspace.refine()
    >>> subspace.certified(2).tolist(), [round(v, 3) for v in subspace.values[0].tolist()]
    ([True], [3.0, 2.0])
    """

    def __init__(self, matrix: Tensor, start: Tensor) -> None:
        self.matrix = matrix
        self.total = square_sum(matrix)
        self._wide = matrix.shape[-2] <= matrix.shape[-1]
        self._oriented = (matrix if self._wide else matrix.mT).float()
        self._step(start.mT @ self._oriented)

    def refine(self) -> None:
        """One more step, towards the other side."""
        rows = self._left.mT
        self._wide, self._oriented = not self._wide, self._oriented.mT
        self._step(rows)

    def part(self, matrices: slice) -> Subspace:
        """The same for some matrices of the batch, as it is now; nothing is computed again."""
        part = object.__new__(Subspace)
        part._wide = self._wide
        part._forget()
        for name in ("matrix", "total", *_TENSORS):
            setattr(part, name, getattr(self, name)[matrices])
        return part

    @property
    def size(self) -> int:
        """k, the number of directions."""
        return self._left.shape[-1]

    @property
    def values(self) -> Tensor:
        """The k leading singular values, descending, from below: [batch, k], fp64."""
        return self._eigenpairs()[0].flip(-1).clamp_min(0).double().sqrt()

    def start(self, rank: int | None = None) -> Tensor:
        """What to start from next time, for the leading r directions or all: [batch, small, r]."""
        kept = self._kept(self.size if rank is None else rank)
        if self._left.shape[-2] == min(self.matrix.shape[-2:]):
            return kept.left @ _shifted_inverse(kept.gram)
        return self._rows(kept).mT @ _inverse_root(kept.gram, _EPS**2)

    def project(self, rank: int) -> Tensor:
        """Nearest matrices of this rank within the subspace, in the input's dtype and shape."""
        kept, nearest = self._kept(rank), self._product()
        if kept.dropped.shape[-1]:
            right = kept.dropped_rotation.mT @ self._right
            nearest = torch.baddbmm(nearest, kept.dropped, right, alpha=-1)
        return (nearest if self._wide else nearest.mT).to(self.matrix.dtype)

    def polar(self, rank: int) -> Tensor:
        """U_r V_rᵀ over the non-zero ones of the leading directions, in the input's dtype."""
        kept = self._kept(rank)
        if self.matrix.is_cuda:
            polar = newton_schulz(kept.left) @ self._rows(kept)
        else:
            zero = (max(self.matrix.shape[-2:]) * _EPS) ** 2
            polar = (kept.left @ _inverse_root(kept.gram, zero)) @ self._rows(kept)
        return (polar if self._wide else polar.mT).to(self.matrix.dtype)

    def residual(self, rank: int) -> Tensor:
        """‖M − P‖_F² of `project`: [batch], fp64."""
        # the parts are orthogonal to each other
        return square_sum(self._rest()) + square_sum(self._kept(rank).dropped)

    def promising(self, rank: int) -> bool:
        """Whether `certified` may succeed: a rough look that spares the projection where not."""
        kept = self._kept(rank)
        residual = self.total - kept.gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        exact = residual <= 1e-5 * self.total  # too little left to be known as a difference
        probes = _probes(rank, kept.left)
        rest = self._oriented.mT @ (kept.left @ probes) - self._rows(kept).mT @ (kept.gram @ probes)
        coupling = square_sum(rest) / PROBES
        return bool((exact | self._exceeds(kept.gram, coupling / self._tolerated(residual))).all())

    def certified(self, rank: int) -> Tensor:
        """Whether `project` surely keeps the residual's promise: [batch], bool."""
        residual = self.residual(rank)
        sound = self._orthonormal & torch.isfinite(residual) & in_safe_range(self.total)
        sound &= torch.isfinite(self._gram).all(-1).all(-1)
        exact = residual.sqrt() <= _EPS * self.total.sqrt()
        kept = self._kept(rank)
        gap = self._coupling(kept.left) / self._tolerated(residual)
        # no eigenvalue beyond the kept ones is above their sum; where that is too rough, estimate
        enough = exact | self._exceeds(kept.gram, residual + gap)
        if not bool(enough.all()):
            enough = enough | self._exceeds(kept.gram, self._largest_beyond(kept) + gap)
        return sound & enough

    # -- inside ----------------------------------------------------------------------------------

    def _step(self, rows: Tensor) -> None:
        """Make rows orthonormal and find the best factor for them."""
        self._right, self._orthonormal = _orthonormal_rows(rows)
        self._left = self._oriented @ self._right.mT
        self._gram = self._left.mT @ self._left
        self._forget()

    def _forget(self) -> None:
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._cached: tuple[int, _Kept] | None = None
        self._nearest: Tensor | None = None
        self._remainder: Tensor | None = None

    def _product(self) -> Tensor:
        """Z V, of all directions."""
        if self._nearest is None:
            self._nearest = self._left @ self._right
        return self._nearest

    def _rest(self) -> Tensor:
        """D = M - Z V."""
        if self._remainder is None:
            self._remainder = self._oriented - self._product()
        return self._remainder

    def _rows(self, kept: _Kept) -> Tensor:
        """Right factor of the kept directions, orthonormal."""
        return self._right if kept.rotation is None else kept.rotation.mT @ self._right

    def _tolerated(self, residual: Tensor) -> Tensor:
        """Energy that may be missed."""
        return ((1 - 1 / RESIDUAL_PROMISE**2) * residual).clamp_min(_TINY)

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Of the left factor's Gram matrix, ascending."""
        if self._eigen is None:
            gram = torch.nan_to_num(self._gram)  # a failed round is not certified
            self._eigen = torch.linalg.eigh(gram)
        return self._eigen

    def _kept(self, rank: int) -> _Kept:
        if self._cached is None or self._cached[0] != rank:
            self._cached = (rank, self._rotated(rank))
        return self._cached[1]

    def _rotated(self, rank: int) -> _Kept:
        size = self.size
        if rank == size:
            none = self._left[..., :0]
            return _Kept(self._left, self._gram, None, none, none)
        values, vectors = self._eigenpairs()
        leading = vectors[..., size - rank :]
        return _Kept(
            self._left @ leading,
            torch.diag_embed(values[..., size - rank :]),
            leading,
            self._left @ vectors[..., : size - rank],
            vectors[..., : size - rank],
        )

    def _largest_beyond(self, kept: _Kept) -> Tensor:
        """Largest eigenvalue of M Mᵀ beyond the kept directions, from above: [batch], fp64."""
        # of the rest, by a block power iteration
        rest = self._rest()
        images = rest.mT @ _probes(rest.shape[-2], rest)
        for _ in range(2):
            vectors = rest @ (images / _column_norms(images))
            images = rest.mT @ (vectors / _column_norms(vectors))
        largest = SAFETY * _column_norms(images).amax((-2, -1)).double().square()
        if not kept.dropped.shape[-1]:
            return largest
        # of the dropped directions, and of what couples them to the rest
        dropped = _column_norms(kept.dropped).amax((-2, -1)).double().square()
        return torch.maximum(largest, dropped) + self._coupling(kept.dropped).sqrt()

    def _exceeds(self, gram: Tensor, threshold: Tensor) -> Tensor:
        """Whether every eigenvalue is above a threshold: [batch], bool."""
        bound = torch.nan_to_num(threshold.float()).unsqueeze(-1)
        shift = torch.diag_embed(bound.expand(*bound.shape[:-1], gram.shape[-1]))
        _, failed = torch.linalg.cholesky_ex(gram - shift)
        return torch.isfinite(threshold) & (failed == 0)

    def _coupling(self, left: Tensor) -> Tensor:
        """‖Dᵀ Z‖_F² for the rest D, estimated from above: [batch], fp64."""
        if left.shape[-1] <= PROBES:
            return square_sum(self._rest().mT @ left)
        probes = _probes(left.shape[-1], left)
        return SAFETY / PROBES * square_sum(self._rest().mT @ (left @ probes))


def random_start(matrix: Tensor, size: int, seed: int = 0) -> Tensor:
    """A Gaussian start for `Subspace`, the same for every matrix of a batch.

    Args:
        matrix: [batch, rows, cols].
        size: k; a few more than the rank that is wanted.
        seed: of the random numbers; they do not depend on the device.

    Returns:
        [batch, min(rows, cols), k], fp32.
    """
    small = min(matrix.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(small, size, generator=generator).to(matrix.device)
    return gaussian.expand(*matrix.shape[:-2], small, size)


def newton_schulz(matrix: Tensor, tolerance: float = 1e-6, most: int = 60) -> Tensor:
    """Polar factor U Vᵀ by matrix products alone; zero singular values stay zero.

    X ← X (3 I − XᵀX) / 2 brings all singular values between 0 and √3 to 1, small ones by a factor
    of 1.5 a step at first: 60 steps suffice from 1e-7 of the largest (Higham 2008, Functions of
    Matrices, section 8.3). Smaller ones end between zero and one.

    Args:
        matrix: [..., rows, cols], fp32 or fp64.
        tolerance: largest change of an entry in the last step.
        most: largest number of steps.
    """
    tall = matrix.shape[-2] >= matrix.shape[-1]
    x = matrix if tall else matrix.mT
    # σ₁ ≤ the root of the largest row sum of |XᵀX|
    largest = (x.mT @ x).abs().sum(-1).amax(-1).sqrt()
    x = x / largest.clamp_min(torch.finfo(x.dtype).tiny)[..., None, None]
    for step in range(most):
        update = 1.5 * x - 0.5 * (x @ (x.mT @ x))
        change, x = update - x, update
        # every few steps only: on a GPU the comparison waits for the device
        if step % 4 == 3 and change.abs().amax() < tolerance:
            break
    return x if tall else x.mT


def _orthonormal_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the rows, [batch, k, large], and whether that worked, [batch]."""
    gram = matrix @ matrix.mT
    lower, failed = torch.linalg.cholesky_ex(gram)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    # Cholesky QR loses the square of the condition; Householder QR does not
    well = (failed == 0) & (diagonal.amin(-1) > 0.1 * diagonal.amax(-1))
    if bool(well.all()):
        identity = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return inverse @ matrix, well
    finite = torch.isfinite(matrix).all(-1).all(-1)
    basis = torch.linalg.qr(torch.nan_to_num(matrix).mT).Q.mT
    return basis, finite


def _shifted_inverse(gram: Tensor) -> Tensor:
    """Inverse of a positive matrix; directions without energy would make it infinite."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = (_EPS * diagonal.sum(-1, keepdim=True)).clamp_min(_TINY)
    lower, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(shift.expand_as(diagonal)))
    return torch.cholesky_inverse(lower)


def _inverse_root(gram: Tensor, zero: float) -> Tensor:
    """G^(-1/2) over the eigenvalues above `zero` times the largest."""
    values, vectors = torch.linalg.eigh(gram)
    positive = values > (zero * values[..., -1:]).clamp_min(0)
    scale = torch.where(positive, values.clamp_min(_TINY).rsqrt(), 0)
    return (vectors * scale.unsqueeze(-2)) @ vectors.mT


def _probes(rows: int, like: Tensor) -> Tensor:
    """Gaussian vectors, always the same: [rows, PROBES]."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, PROBES, generator=generator).to(like)


def _column_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(_TINY)
