"""Decompositions of batches of matrices: spectra, truncated SVD, projection, polar factor.

All take matrices [..., rows, cols] and work on the last two dimensions. fp64 input takes the exact
SVD. Everything else goes through the eigenvectors of the smaller side's Gram matrix. Squaring a
matrix costs half of the digits, and fp64 has twice as many as fp32 needs: it is the default. fp32
takes half of the time and suffices where the discarded part is not small; where it does not, fp64
takes over. Half precision is never computed in half precision.

The contract, for finite input: the residual ‖M − P(M)‖_F of a truncation is at most 1.0001 × the
optimum for that rank (Eckart–Young), beyond rounding of the result (4 eps · ‖M‖_F). The Gram engine
measures its residual, and the exact SVD takes over where it does not keep that.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rankprune.errors import LayerError, NumericsError
from rankprune.process_setting import ProcessSetting

RESIDUAL_PROMISE = 1.0001
# ... and, of a result in fp32, of ‖M‖_F
ROUNDING = 4 * torch.finfo(torch.float32).eps

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
    """Refuse a weight that holds NaN or infinity, or nothing.

    Raises:
        NumericsError: NaN or infinity; the message names the layer.
        LayerError: it is on the meta device.
    """
    if tensor.is_meta:
        raise LayerError(
            f"layer {name!r}: its weight is on the meta device, which holds no values; load the "
            "weights first, or stream them (integrations.streaming)"
        )
    if not torch.isfinite(tensor).all():
        nan = int(torch.isnan(tensor).sum())
        inf = int(torch.isinf(tensor).sum())
        raise NumericsError(
            f"layer {name!r}: the weight holds {nan} NaN and {inf} infinite values of "
            f"{tensor.numel()}; the training has diverged or the file is damaged: go back to the "
            "last good checkpoint, lower the learning rate or clip gradients"
        )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of fp32 in fp32, whatever the training has allowed (TF32, bf16, autocast).

    All but autocast is the process's: what other threads compute meanwhile is as precise.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_PRECISION.changed())
        accelerator = torch.accelerator.current_accelerator()
        kinds = {"cpu", "cuda", *([accelerator.type] if accelerator else [])}
        for kind in filter(torch.is_autocast_enabled, sorted(kinds)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _forbid_reduced() -> Callable[[], None]:
    """Forbid reduced precision in products, and say how to undo that."""
    # torch has two interfaces, and refuses to read the older one where they disagree
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"
    modules: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    backends: list[Any] = [getattr(module, "matmul", None) for module in modules]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends]
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        if backend.fp32_precision not in ("ieee", "none"):
            backend.fp32_precision = "ieee"

    def restore() -> None:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision

    return restore


_PRECISION = ProcessSetting(_forbid_reduced)


class Decomposition:
    """One decomposition of a batch of matrices, from which every rank can be had.

    Args:
        matrix: [..., rows, cols], finite, any floating dtype.
        working: precision of the Gram engine, fp64 or fp32.

    Raises:
        NumericsError: the decomposition did not converge.

    >>> m = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> d = Decomposition(m)
    >>> d.values.tolist(), d.project(1).tolist(), d.polar(1).tolist()
    ([2.0, 1.0], [[2.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, matrix: Tensor, *, working: torch.dtype = torch.float64) -> None:
        self.matrix = matrix
        self.max_rank = min(matrix.shape[-2:])
        self._exact_input = matrix.dtype == torch.float64
        self._wide = matrix.shape[-2] <= matrix.shape[-1]
        self._working = torch.float64 if self._exact_input else working
        if self._working == torch.float32 and not in_safe_range(self._energy).all():
            self._working = torch.float64

    def part(self, matrices: slice) -> Decomposition:
        """The same for some matrices of a batch [batch, rows, cols], on one decomposition of all.

        The parts keep their promise, or fall back, each for itself.
        """
        part = Decomposition.__new__(Decomposition)
        part.__dict__.update(
            {key: value for key, value in self.__dict__.items() if not isinstance(value, Tensor)}
        )
        part.matrix = self.matrix[matrices]
        part.__dict__.pop("_svd", None)
        part.__dict__.pop("_cached", None)
        part._oriented = self._oriented[matrices]
        if self._exact_input:
            part._svd = Truncated(*(factor[matrices] for factor in self._svd))
        else:
            values, vectors = self._eigen
            part._eigen = values[matrices], vectors[matrices]
        return part

    @cached_property
    def values(self) -> Tensor:
        """All singular values, descending: [..., max_rank], fp64."""
        if self._exact_input:
            return self._svd.s
        return self._eigen[0].flip(-1).clamp_min(0).double().sqrt()

    def truncate(self, rank: int) -> Truncated:
        """Leading singular triplets, in fp32, or in fp64 where the input is.

        Raises:
            LayerError: the rank is not between 1 and `max_rank`.
        """
        basis, rows = self._leading(rank)
        if self._exact_input:
            return self._orient(basis, self._svd.s[..., :rank], rows)
        # σ of the projected rows themselves: a zero row stays zero, whatever it is divided by
        sigma = torch.linalg.vector_norm(rows, dim=-1)
        divisor = sigma.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1)
        factors = self._orient(basis, sigma, rows / divisor)
        return Truncated(*(factor.float() for factor in factors))

    def project(self, rank: int) -> Tensor:
        """Nearest matrices of at most this rank, U_r S_r V_rᵀ, in the input's dtype and shape.

        Raises:
            LayerError: the rank is not between 1 and `max_rank`.
        """
        basis, rows = self._leading(rank)
        if rank == self.max_rank:
            return self.matrix
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
        basis, rows = self._leading(rank)
        eps = torch.finfo(torch.float64 if self._exact_input else torch.float32).eps
        sigma = self.values[..., :rank]
        nonzero = sigma > max(self.matrix.shape[-2:]) * eps * self.values[..., :1]
        scale = nonzero.double() if self._exact_input else torch.where(nonzero, 1 / sigma, 0)
        polar = (basis * scale.to(basis.dtype).unsqueeze(-2)) @ rows
        return (polar if self._wide else polar.mT).to(self.matrix.dtype)

    def keeps(self, rank: int) -> bool:
        """Whether the working precision keeps the promise at this rank, or a better one must."""
        self._check_rank(rank)
        if self._exact_input:
            return True
        if self._cached is None or self._cached[0] != rank:
            basis, rows = self._basis(rank)
            if not self._kept_promise(basis, rows, self._eigen[0]):
                return False
            self._cached = (rank, basis, rows)
        return True

    def start(self, rank: int, *, rough: bool = False) -> Tensor:
        """What `Subspace` starts from next time: [..., max_rank, rank], fp32.

        The leading singular vectors of the smaller side, each divided by its singular value.

        Args:
            rank: number of directions.
            rough: whether those of the working precision will do, whatever they promise.
        """
        basis = self._basis(rank)[0] if rough else self._leading(rank)[0]
        sigma = self.values[..., :rank]
        floor = torch.finfo(torch.float32).eps * self.values[..., :1]
        scale = 1 / torch.maximum(sigma, floor).clamp_min(torch.finfo(torch.float32).tiny)
        return (basis * scale.unsqueeze(-2)).float()

    @cached_property
    def _energy(self) -> Tensor:
        """‖M‖_F²: [...], fp64."""
        return square_sum(self.matrix)

    @cached_property
    def _oriented(self) -> Tensor:
        """The matrices in the working precision, smaller side first."""
        return (self.matrix if self._wide else self.matrix.mT).to(self._working)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of the smaller side's Gram matrix."""
        lower = gram_lower(self._oriented)
        return converged(lambda: torch.linalg.eigh(lower), self.matrix)

    @cached_property
    def _svd(self) -> Truncated:
        """Exact thin SVD of the oriented matrices, fp64."""
        oriented = self._oriented.double()
        return Truncated(
            *converged(lambda: torch.linalg.svd(oriented, full_matrices=False), self.matrix)
        )

    def _leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Oriented basis [..., small, r]; with it basisᵀ·M for the Gram engine, Vᵀ for the SVD."""
        self._check_rank(rank)
        if self._exact_input:
            return self._svd.u[..., :rank], self._svd.vh[..., :rank, :]
        if not self.keeps(rank):
            if self._working == torch.float32:
                # squaring has cost digits that this spectrum needs
                self._working = torch.float64
                for cached in ("_oriented", "_eigen", "values"):
                    self.__dict__.pop(cached, None)
                return self._leading(rank)
            u, sigma, vh = self._svd
            self._cached = (
                rank,
                u[..., :rank],
                sigma[..., :rank].unsqueeze(-1) * vh[..., :rank, :],
            )
        assert self._cached is not None
        return self._cached[1:]

    # the basis of the rank last asked for: projection, polar factor and start share one
    _cached: tuple[int, Tensor, Tensor] | None = None

    def _basis(self, rank: int) -> tuple[Tensor, Tensor]:
        """Leading eigenvectors, and basisᵀ·M."""
        basis = self._eigen[1][..., self.max_rank - rank :].flip(-1)
        return basis, basis.mT @ self._oriented

    def _kept_promise(self, basis: Tensor, rows: Tensor, eigenvalues: Tensor) -> bool:
        """The residual against the optimum, the root of the sum of the discarded eigenvalues."""
        rank = basis.shape[-1]
        if rank == self.max_rank and self._working == torch.float32:
            return False  # nothing is discarded, so every digit counts
        discarded = eigenvalues[..., : self.max_rank - rank].double().clamp_min(0).sum(-1)
        if self._working == torch.float32:
            squares = self._energy - square_sum(rows)
            if not bool((squares > 0.01 * self._energy).all()):
                # the difference has no digits to spare
                squares = square_sum(self._oriented - basis @ rows)
            residual = squares.sqrt()
            # eigh is backward stable: an eigenvalue is wrong by a few eps of the largest
            noise = self.max_rank * torch.finfo(torch.float32).eps * eigenvalues[..., -1].double()
            optimum = (discarded - noise).clamp_min(0).sqrt()
        else:
            residual = (square_sum(self._oriented) - square_sum(rows)).clamp_min(0).sqrt()
            optimum = discarded.sqrt()
        rounding = ROUNDING * self._energy.sqrt()
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
        return converged(lambda: torch.linalg.svdvals(matrix), matrix)
    double = matrix.double()
    lower = gram_lower(double if matrix.shape[-2] <= matrix.shape[-1] else double.mT)
    return converged(lambda: torch.linalg.eigvalsh(lower), matrix).flip(-1).clamp_min(0).sqrt()


def square_sum(matrix: Tensor) -> Tensor:
    """‖M‖_F² of every matrix of a batch, to the digits of its precision: [...], fp64."""
    return norm(matrix).double().square()


def norm(matrix: Tensor) -> Tensor:
    """‖M‖_F of every matrix of a batch, to the digits of its precision: [...], fp32 or fp64."""
    working = matrix if matrix.dtype == torch.float64 else matrix.float()
    if matrix.is_cuda:
        return torch.linalg.vector_norm(working, dim=(-2, -1))
    # torch adds millions of squares up one by one on a CPU, which leaves two or three digits of
    # fp32's seven; so in two steps, the first along what is stored in a row
    inner = -1 if working.stride(-1) == 1 else -2
    inner_norms = torch.linalg.vector_norm(working, dim=inner)
    return torch.linalg.vector_norm(inner_norms, dim=-1, dtype=torch.float64).to(working.dtype)


def in_safe_range(energy: Tensor) -> Tensor:
    """Whether fp32 holds the squares and their products, for ‖M‖_F² of a batch. Not for zero."""
    return (energy > 1e-24) & (energy < 1e30)


def gram_lower(matrix: Tensor) -> Tensor:
    """M Mᵀ of [..., n, m]: the lower triangle, which is all that `eigh` reads, and some more.

    A symmetric product needs half of the operations; in blocks of rows it takes little more.
    """
    n = matrix.shape[-2]
    if n < _BLOCK_ROWS:
        return matrix @ matrix.mT
    gram = matrix.new_zeros(*matrix.shape[:-1], n)
    edges = [round(n * i / _BLOCKS) for i in range(_BLOCKS + 1)]
    for top, bottom in itertools.pairwise(edges):
        gram[..., top:bottom, :bottom] = matrix[..., top:bottom, :] @ matrix[..., :bottom, :].mT
    return gram


# fewer rows than this are too little work a block
_BLOCK_ROWS = 384
_BLOCKS = 4


def converged(compute: Callable[[], T], matrix: Tensor) -> T:
    """Run a decomposition of a matrix; its failure becomes a `NumericsError`."""
    try:
        return compute()
    except torch.linalg.LinAlgError as error:
        shape = "×".join(str(side) for side in matrix.shape)
        raise NumericsError(f"decomposition of a {shape} matrix failed: {error}") from error
