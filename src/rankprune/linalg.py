"""Decompositions of batches of matrices: spectra, truncated SVD, projection, polar factor.

All take matrices [..., rows, cols] and work on the last two dimensions. fp64 input takes the exact
SVD. Everything else goes through the eigenvectors of the smaller side's Gram matrix, in fp64:
squaring a matrix costs half of the digits, and fp64 has twice as many as fp32 needs. Half
precision is therefore never computed in half precision.

The contract, for finite input: the residual ‖M − P(M)‖_F of a truncation is at most 1.0001 × the
optimum for that rank (Eckart–Young), beyond rounding of the result (eps · ‖M‖_F). The Gram engine
measures its residual, and the exact SVD takes over where it does not keep that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from rankprune.errors import LayerError, NumericsError

RESIDUAL_PROMISE = 1.0001

T = TypeVar("T")


class Truncated(NamedTuple):
    """Leading singular triplets: u [..., rows, r], s [..., r] descending, vh [..., r, cols]."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Split into left [..., rows, r] and right [..., r, cols], √σ to each side."""
        root = self.s.sqrt()
        return self.u * root.unsqueeze(-2), root.unsqueeze(-1) * self.vh


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `NumericsError` that names the layer where a weight holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        nan = int(torch.isnan(tensor).sum())
        inf = int(torch.isinf(tensor).sum())
        raise NumericsError(
            f"layer {name!r}: the weight holds {nan} NaN and {inf} infinite values of "
            f"{tensor.numel()}; the training has diverged or the file is damaged: go back to the "
            "last good checkpoint, lower the learning rate or clip gradients"
        )


class Decomposition:
    """One decomposition of a batch of matrices, from which every rank can be had.

    Args:
        matrix: [..., rows, cols], finite, any floating dtype.

    Raises:
        NumericsError: the decomposition did not converge.

    >>> m = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> d = Decomposition(m)
    >>> d.values.tolist(), d.project(1).tolist(), d.polar(1).tolist()
    ([2.0, 1.0], [[2.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.max_rank = min(matrix.shape[-2:])
        self._exact_input = matrix.dtype == torch.float64
        self._wide = matrix.shape[-2] <= matrix.shape[-1]
        # fp64, with the smaller side first
        self._oriented = matrix.double() if self._wide else matrix.double().mT

    @cached_property
    def values(self) -> Tensor:
        """All singular values, descending: [..., max_rank], fp64."""
        if self._exact_input:
            return self._svd.s
        return self._eigen[0].flip(-1).clamp_min(0).sqrt()

    def truncate(self, rank: int) -> Truncated:
        """Leading singular triplets, in fp32, or in fp64 where the input is.

        Raises:
            LayerError: the rank is not between 1 and `max_rank`.
        """
        self._check_rank(rank)
        basis, rows = self._leading(rank)
        if self._exact_input:
            return self._orient(basis, self._svd.s[..., :rank], rows)
        # σ of the projected rows themselves: a zero row stays zero, whatever it is divided by
        sigma = torch.linalg.vector_norm(rows, dim=-1)
        divisor = sigma.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
        factors = self._orient(basis, sigma, rows / divisor)
        return Truncated(*(factor.float() for factor in factors))

    def project(self, rank: int) -> Tensor:
        """Nearest matrices of at most this rank, U_r S_r V_rᵀ, in the input's dtype and shape.

        Raises:
            LayerError: the rank is not between 1 and `max_rank`.
        """
        self._check_rank(rank)
        if rank == self.max_rank:
            return self.matrix
        basis, rows = self._leading(rank)
        if self._exact_input:
            rows = self._svd.s[..., :rank].unsqueeze(-1) * rows
        nearest = basis @ rows
        return (nearest if self._wide else nearest.mT).to(self.matrix.dtype)

    def polar(self, rank: int | None = None) -> Tensor:
        """U_r V_rᵀ over the non-zero ones of the leading singular values, in the input's dtype.

        With all of them it is the nuclear norm's sub-gradient of least norm (Watson 1992,
        Characterization of the subdifferential of some matrix norms). Values below
        max(rows, cols) · eps · σ₁ count as zero, with the input's eps (fp32's for half precision).
        """
        rank = self.max_rank if rank is None else rank
        self._check_rank(rank)
        eps = torch.finfo(torch.float64 if self._exact_input else torch.float32).eps
        sigma = self.values[..., :rank]
        nonzero = sigma > max(self.matrix.shape[-2:]) * eps * self.values[..., :1]
        basis, rows = self._leading(rank)
        scale = nonzero.double() if self._exact_input else torch.where(nonzero, 1 / sigma, 0)
        polar = (basis * scale.unsqueeze(-2)) @ rows
        return (polar if self._wide else polar.mT).to(self.matrix.dtype)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of the smaller side's Gram matrix."""
        gram = self._oriented @ self._oriented.mT
        return _converged(lambda: torch.linalg.eigh(gram), self.matrix)

    @cached_property
    def _svd(self) -> Truncated:
        """Exact thin SVD of the oriented matrices, fp64."""
        return Truncated(
            *_converged(lambda: torch.linalg.svd(self._oriented, full_matrices=False), self.matrix)
        )

    def _leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Oriented basis [..., small, r]; with it basisᵀ·M for the Gram engine, Vᵀ for the SVD."""
        if self._exact_input:
            return self._svd.u[..., :rank], self._svd.vh[..., :rank, :]
        eigenvalues, vectors = self._eigen
        basis = vectors[..., self.max_rank - rank :].flip(-1)
        rows = basis.mT @ self._oriented
        if not self._kept_promise(rows, eigenvalues[..., : self.max_rank - rank]):
            exact = self._svd
            return exact.u[..., :rank], exact.s[..., :rank].unsqueeze(-1) * exact.vh[..., :rank, :]
        return basis, rows

    def _kept_promise(self, rows: Tensor, discarded: Tensor) -> bool:
        """Squared residual ‖M‖² − ‖basisᵀ·M‖² against the sum of the discarded eigenvalues."""
        energy = self._oriented.square().sum((-2, -1))
        residual = (energy - rows.square().sum((-2, -1))).clamp_min(0).sqrt()
        optimum = discarded.clamp_min(0).sum(-1).sqrt()
        rounding = torch.finfo(torch.float32).eps * energy.sqrt()
        return bool((residual <= RESIDUAL_PROMISE * optimum + rounding).all())

    def _orient(self, basis: Tensor, sigma: Tensor, rows: Tensor) -> Truncated:
        if self._wide:
            return Truncated(basis, sigma, rows)
        return Truncated(rows.mT, sigma, basis.mT)

    def _check_rank(self, rank: int) -> None:
        if not 1 <= rank <= self.max_rank:
            rows, cols = self.matrix.shape[-2:]
            raise LayerError(
                f"rank {rank} is out of range for a {rows}×{cols} matrix; "
                f"choose 1 to {self.max_rank}"
            )


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, descending: [..., min(rows, cols)], fp64."""
    if matrix.dtype == torch.float64:
        return _converged(lambda: torch.linalg.svdvals(matrix), matrix)
    double = matrix.double()
    gram = double @ double.mT if matrix.shape[-2] <= matrix.shape[-1] else double.mT @ double
    return _converged(lambda: torch.linalg.eigvalsh(gram), matrix).flip(-1).clamp_min(0).sqrt()


def _converged(compute: Callable[[], T], matrix: Tensor) -> T:
    """Run a decomposition; its failure is never hidden."""
    try:
        return compute()
    except torch.linalg.LinAlgError as error:
        shape = "×".join(str(side) for side in matrix.shape)
        raise NumericsError(f"decomposition of a {shape} matrix failed: {error}") from error
