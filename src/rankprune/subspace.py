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
rest D = M − Z V, the coupling B = Dᵀ Z and η = ‖D‖₂² below T's smallest eigenvalue, the energy that
the subspace misses is at most tr(B (T − ηI)⁻¹ Bᵀ) (from [T Bᵀ; B DᵀD] ⪯ diag(T + Bᵀ N⁻¹ B, DᵀD + N)
for any N ≻ 0, and Ky Fan's theorem). Traces and norms are estimated from above by products with a
few Gaussian vectors. A spectrum without a gap at the rank cannot be certified so; other engines
take over there.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rankprune.linalg import (
    RESIDUAL_PROMISE,
    ROUNDING,
    converged,
    gram_lower,
    in_safe_range,
    square_sum,
)

# Gaussian probes for the norms in the certificate, and what their estimates are multiplied by: at
# rank one, 16 probes underestimate a squared norm by more than 4 less than once in 1,000 times.
PROBES = 16
SAFETY = 4.0
# A residual above this share of the energy is known as a difference of energies.
SMALL = 1e-5

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


class _Estimates(NamedTuple):
    missed: Tensor  # see `Subspace.missed`
    residual: Tensor  # from above
    images: Tensor  # Dᵀ · a few Gaussian vectors


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
        rows = start.mT @ self._oriented
        self._step(rows, gram_lower(rows))

    def refine(self) -> None:
        """One more step, towards the other side."""
        rows = self._left.mT
        self._wide, self._oriented = not self._wide, self._oriented.mT
        self._step(rows, self._gram)

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
            return kept.left @ torch.cholesky_inverse(_shifted_cholesky(kept.gram))
        # L⁻ᵀ for T = L Lᵀ makes the left factor orthonormal
        rows, lower = self._rows(kept), _shifted_cholesky(kept.gram)
        return torch.linalg.solve_triangular(lower, rows, upper=False).mT

    def project_(self, rank: int) -> Tensor:
        """Nearest matrices of this rank within the subspace, in the place of the input's.

        Nothing else can be asked for afterwards.
        """
        kept = self._kept(rank)
        left, right = kept.left, self._rows(kept)
        if not self._wide:
            left, right = right.mT, left.mT
        if self.matrix.dtype == left.dtype and self.matrix.is_contiguous():
            return torch.bmm(left, right, out=self.matrix)
        return self.matrix.copy_(left @ right)

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
        """‖M − P‖_F² of `project_`, but for rounding of ‖M‖_F²: [batch], fp64."""
        kept = self._kept(rank)
        energy = self._gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        # the parts are orthogonal to each other
        return (self.total - energy).clamp_min(0) + square_sum(kept.dropped)

    def missed(self, rank: int) -> Tensor:
        """Energy that `project` may miss, by what it is allowed to: [batch], fp64, from above.

        Where it is above one another step is needed, which lessens it by about the gap squared.
        """
        return self._estimates(rank).missed

    def certified(self, rank: int) -> Tensor:
        """Whether `project` surely keeps the residual's promise: [batch], bool."""
        estimates = self._estimates(rank)
        residual, missed = estimates.residual, estimates.missed
        sound = self._orthonormal & torch.isfinite(residual) & in_safe_range(self.total)
        sound &= torch.isfinite(self._gram).all(-1).all(-1)
        exact = residual.sqrt() <= ROUNDING * self.total.sqrt()
        near = missed < 1
        # (T - ηI)⁻¹ ⪯ c / (c - 1) · T⁻¹ where T ⪰ c η
        margin = 1 / (1 - missed.clamp(0, 0.99))
        # no eigenvalue beyond the kept ones is above their sum; where that is too rough, estimate
        enough = exact | (near & self._exceeds(rank, margin * residual))
        if not bool((enough | ~near).all()):
            enough |= near & self._exceeds(rank, margin * self._largest_beyond(rank))
        return sound & enough

    # -- inside ----------------------------------------------------------------------------------

    def _step(self, rows: Tensor, gram: Tensor) -> None:
        """Make rows orthonormal, by their Gram matrix, and find the best factor for them."""
        self._right, self._orthonormal = _orthonormal_rows(rows, gram)
        self._left = self._oriented @ self._right.mT
        self._gram = gram_lower(self._left.mT)
        self._forget()

    def _forget(self) -> None:
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._cached: tuple[int, _Kept] | None = None
        self._estimated: tuple[int, _Estimates] | None = None

    def _rest_on(self, rows: Tensor) -> Tensor:
        """D · rows, for D = M - Z V, which itself is never formed."""
        return torch.baddbmm(self._oriented @ rows, self._left, self._right @ rows, alpha=-1)

    def _rest_under(self, columns: Tensor) -> Tensor:
        """Dᵀ · columns."""
        inner = self._left.mT @ columns
        return torch.baddbmm(self._oriented.mT @ columns, self._right.mT, inner, alpha=-1)

    def _rows(self, kept: _Kept) -> Tensor:
        """Right factor of the kept directions, orthonormal."""
        return self._right if kept.rotation is None else kept.rotation.mT @ self._right

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Of the left factor's Gram matrix, ascending."""
        if self._eigen is None:
            gram = torch.nan_to_num(self._gram)  # a failed round is not certified
            self._eigen = converged(lambda: torch.linalg.eigh(gram), gram)
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

    def _estimates(self, rank: int) -> _Estimates:
        if self._estimated is None or self._estimated[0] != rank:
            self._estimated = (rank, self._estimate(rank))
        return self._estimated[1]

    def _estimate(self, rank: int) -> _Estimates:
        kept = self._kept(rank)
        lower, failed = torch.linalg.cholesky_ex(torch.nan_to_num(kept.gram))
        # tr(B T⁻¹ Bᵀ) = ‖Dᵀ Z L⁻ᵀ‖_F² for T = L Lᵀ
        exactly = rank <= PROBES
        identity = torch.eye(rank, dtype=kept.left.dtype, device=kept.left.device)
        probes = identity if exactly else gaussian(rank, kept.left.device)
        whitened = torch.linalg.solve_triangular(lower.mT, probes, upper=True)
        sketch = gaussian(kept.left.shape[-2], kept.left.device).expand(len(lower), -1, -1)
        # in one product, which has to read the whole matrix
        images = self._rest_under(torch.cat([kept.left @ whitened, sketch], -1))
        coupling, images = images.split([probes.shape[-1], PROBES], -1)
        missed = square_sum(coupling) * (1.0 if exactly else SAFETY / PROBES)
        residual = self.residual(rank)
        sketched = square_sum(images) / PROBES + square_sum(kept.dropped)
        known = residual > SMALL * self.total
        least = torch.where(known, residual, sketched / SAFETY)
        most = torch.where(known, residual, sketched * SAFETY)
        missed = missed / ((1 - 1 / RESIDUAL_PROMISE**2) * least).clamp_min(_TINY)
        missed = torch.nan_to_num(missed, nan=torch.inf).where(failed == 0, torch.inf)
        return _Estimates(missed, most, images)

    def _largest_beyond(self, rank: int) -> Tensor:
        """Largest eigenvalue of M Mᵀ beyond the kept directions, from above: [batch], fp64."""
        kept, images = self._kept(rank), self._estimates(rank).images
        # of the rest, by a block power iteration
        for _ in range(2):
            vectors = self._rest_on(images / _column_norms(images))
            images = self._rest_under(vectors / _column_norms(vectors))
        largest = SAFETY * _column_norms(images).amax((-2, -1)).double().square()
        if not kept.dropped.shape[-1]:
            return largest
        # of the dropped directions, and of what couples them to the rest
        dropped = _column_norms(kept.dropped).amax((-2, -1)).double().square()
        coupling = square_sum(self._rest_under(kept.dropped)).sqrt()
        return torch.maximum(largest, dropped) + coupling

    def _exceeds(self, rank: int, threshold: Tensor) -> Tensor:
        """Whether every eigenvalue of the kept directions is above a threshold: [batch], bool."""
        gram = self._kept(rank).gram
        if rank < self.size:
            # the directions were turned, which is exact up to rounding
            energy = self._gram.diagonal(dim1=-2, dim2=-1).double().sum(-1)
            threshold = threshold + 4 * self.size * _EPS * energy
        bound = torch.nan_to_num(threshold.float()).unsqueeze(-1)
        shift = torch.diag_embed(bound.expand(*bound.shape[:-1], rank))
        _, failed = torch.linalg.cholesky_ex(torch.nan_to_num(gram) - shift)
        return torch.isfinite(threshold) & (failed == 0)


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
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = _normal(small, size, generator).to(matrix.device)
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
    tiny = torch.finfo(matrix.dtype).tiny
    # squares of very small entries would vanish, those of very large ones overflow
    x = matrix / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    x = x if tall else x.mT
    # σ₁ ≤ the root of the largest row sum of |XᵀX|
    largest = (x.mT @ x).abs().sum(-1).amax(-1).sqrt()
    x = x / largest.clamp_min(tiny)[..., None, None]
    for step in range(most):
        update = 1.5 * x - 0.5 * (x @ (x.mT @ x))
        change, x = update - x, update
        # every few steps only: on a GPU the comparison waits for the device
        if step % 4 == 3 and change.abs().amax() < tolerance:
            break
    return x if tall else x.mT


def _orthonormal_rows(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the rows, [batch, k, large], and whether that worked, [batch].

    `gram` is matrix · matrixᵀ, of which the lower triangle is read.
    """
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


def _shifted_cholesky(gram: Tensor) -> Tensor:
    """L of a positive matrix; directions without energy would make its inverse infinite."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = (_EPS * diagonal.sum(-1, keepdim=True)).clamp_min(_TINY)
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(shift.expand_as(diagonal)))[0]


def _inverse_root(gram: Tensor, zero: float) -> Tensor:
    """G^(-1/2) over the eigenvalues above `zero` times the largest."""
    values, vectors = converged(lambda: torch.linalg.eigh(gram), gram)
    positive = values > (zero * values[..., -1:]).clamp_min(0)
    scale = torch.where(positive, values.clamp_min(_TINY).rsqrt(), 0)
    return (vectors * scale.unsqueeze(-2)) @ vectors.mT


@cache  # graphs read it
def gaussian(rows: int, device: torch.device) -> Tensor:
    """Gaussian vectors, the same on every device: [rows, PROBES], fp32."""
    return _normal(rows, PROBES, torch.Generator("cpu").manual_seed(rows)).to(device)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The same whatever the default dtype and device are."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


def _column_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(_TINY)
