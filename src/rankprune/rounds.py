"""A round of the block iteration for many matrices at once: the fewest products, few calls.

Matrices with the same smaller side and rank are in one product, larger sides filled up with columns
of zeros, and what is r × r of all of them in one batch, filled up with ones on the diagonal. From a
start X, as `Subspace` keeps it:

    R = Xᵀ M              rows that are nearly orthonormal; V = orth(R) is never formed
    Z = M Vᵀ              U = orth(Zᵀ)
    A = U M               P = Uᵀ A

A further round begins at R = A. What P misses of the best rank-r matrix's energy is bounded by what
the round's second half has gained. With T = ZᵀZ, λ its smallest eigenvalue, D = M − Z V and
η = ‖D‖₂² < λ, `subspace` has opt − tr T ≤ tr(B (T − ηI)⁻¹ Bᵀ) ≤ λ / (λ − η) · tr(B T⁻¹ Bᵀ) for
B = Dᵀ Z. The last trace is d = ‖A (I − VᵀV)‖_F², and P keeps tr T + d, so

    opt − ‖P‖_F² ≤ d η / (λ − η)

and P keeps the promise where λ ≥ η (1 + d / what it may miss). Every round finds η anew,
for D becomes shorter, and a bad start hides the gap at first. η is bounded by the Schatten norm
‖D‖_S6² = tr((DᵀD)³)^(1/3), which a few Gaussian vectors S estimate as they take part in the round's
products.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankprune.linalg import RESIDUAL_PROMISE, ROUNDING, norm
from rankprune.replay import beside
from rankprune.subspace import PROBES, SAFETY, gaussian

# Larger factors than this are decomposed one by one: batched routines are made for small ones.
_BATCHED_SIDE = 256
# The polar factor is found from the factor's Gram matrix where no direction is fainter than this.
FAINTEST = 1e-3
# Above this share of the energy the residual's is well known as a difference.
_LARGE = 2e-5

# What a round says of each matrix.
UNSOUND, SOUND, SURE = 0.0, 1.0, 2.0

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Task:
    """Matrices to project to the rank of their start.

    Attributes:
        matrices: [batch, rows, cols], fp32 or half precision; the result takes their place.
        start: [batch, min(rows, cols), rank], of an earlier `Outcome`, `Subspace` or
            `Decomposition`.
        polar: whether U Vᵀ is wanted.
    """

    matrices: Tensor
    start: Tensor
    polar: bool

    @property
    def small(self) -> int:
        return min(self.matrices.shape[-2:])

    @property
    def large(self) -> int:
        return max(self.matrices.shape[-2:])

    @property
    def rank(self) -> int:
        return self.start.shape[-1]

    def orient(self, matrices: Tensor) -> Tensor:
        """Smaller side first, and back."""
        return matrices if self.matrices.shape[-2] <= self.matrices.shape[-1] else matrices.mT


class Group:
    """Tasks of one smaller side and rank, in one stack [count, small, large].

    Attributes:
        places: of each task in the stack, by its number.
        polar: whether anyone wants U Vᵀ.
        total: ‖M‖_F of each matrix.
        rows: what spans V, [count, rank, large].
        images: of Gaussian vectors, on the way to η; None when it is known.
        bound: η by ‖M‖_F², from above.
        left: U, [count, rank, small], and `factor`: A by ‖M‖_F, [count, rank, large].
        turn: makes U M orthonormal, but for rounding and what A has gained.
        near: P where it is there already.
    """

    bound: Tensor
    left: Tensor
    factor: Tensor
    turn: Tensor
    near: Tensor | None = None

    def __init__(self, tasks: dict[int, Task]) -> None:
        self.polar = any(task.polar for task in tasks.values())
        first = next(iter(tasks.values()))
        self.small, self.rank = first.small, first.rank
        self.places: dict[int, slice] = {}
        self.count = 0
        for index, task in tasks.items():
            self.places[index] = slice(self.count, self.count + len(task.matrices))
            self.count += len(task.matrices)
        start = torch.cat([task.start for task in tasks.values()])
        self.alone = len(tasks) == 1 and first.matrices.dtype == start.dtype
        if self.alone:
            self.matrices = first.orient(first.matrices)
        else:
            large = max(task.large for task in tasks.values())
            filled = any(task.large < large for task in tasks.values())
            make = start.new_zeros if filled else start.new_empty
            self.matrices = make(self.count, self.small, large)
            torch._foreach_copy_(
                [self.matrices[self.places[i], :, : task.large] for i, task in tasks.items()],
                [task.orient(task.matrices) for task in tasks.values()],
            )
        self.total = norm(self.matrices)
        both = torch.bmm(torch.cat([start, self._sketch()], -1).mT, self.matrices)
        self.rows = both[:, : self.rank]
        self.images: Tensor | None = both[:, self.rank :]

    def again(self, matrices: Tensor, factor: Tensor, total: Tensor) -> Group:
        """At the beginning of another round, which finds η anew: the last one has lessened it."""
        other = copy.copy(self)
        other.matrices, other.rows, other.total, other.near = matrices, factor, total, None
        other.images = torch.bmm(other._sketch().mT, matrices)
        return other

    def _sketch(self) -> Tensor:
        return gaussian(self.small, self.total.device) / self.total[:, None, None]

    def nearest(self) -> Tensor:
        """P, in place where that can be."""
        left = self.left.mT * self.total[:, None, None]
        if self.alone:
            return torch.bmm(left, self.factor, out=self.matrices)
        return torch.bmm(left, self.factor)


class _Batch:
    """r × r of all groups, [count, size, size]; beyond a group's own rank the identity."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.places: dict[int, slice] = {}
        self.count = 0
        for group in groups:
            self.places[id(group)] = slice(self.count, self.count + group.count)
            self.count += group.count
        self.groups = groups
        self.size = max(group.rank for group in groups)
        like = groups[0].rows
        identity = torch.eye(self.size, dtype=like.dtype, device=like.device)
        self.identity = identity.expand(self.count, -1, -1)

    def of(self, batch: Tensor, group: Group) -> Tensor:
        """One group's, [count, rank, rank]."""
        return batch[self.places[id(group)], : group.rank, : group.rank]

    def grams(self, factors: Sequence[Tensor]) -> Tensor:
        """F Fᵀ of a factor [count, rank, any] for each group."""
        grams = self.identity.clone()
        for group, factor in beside(zip(self.groups, factors, strict=True)):
            torch.bmm(factor, factor.mT, out=self.of(grams, group))
        return grams

    def cholesky(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """L, and whether there is one."""
        if self.size <= _BATCHED_SIDE:
            lower, failed = torch.linalg.cholesky_ex(grams)
        else:
            each = [torch.linalg.cholesky_ex(gram) for gram in grams]
            lower = torch.stack([one for one, _ in each])
            failed = torch.stack([info for _, info in each])
        return lower, failed == 0

    def inverse(self, lower: Tensor) -> Tensor:
        """L⁻¹."""
        return torch.linalg.solve_triangular(lower, self.identity, upper=False)

    def exceeds(self, grams: Tensor, bound: Tensor) -> Tensor:
        """Whether every eigenvalue is above a bound, [count]."""
        # as far as rounding lets a positive matrix be known, which is relative to its diagonal
        shift = bound[:, None] + 4 * _EPS * grams.diagonal(dim1=-2, dim2=-1)
        _, positive = self.cholesky(grams - torch.diag_embed(shift))
        return positive & torch.isfinite(bound)

    def beyond(self, group: Group, metric: Tensor, vectors: Tensor) -> Tensor:
        """Vectors less what they share with the rows, whose Gram matrix has `metric` as inverse."""
        for _ in range(2):  # of a large part the first time leaves its rounding
            shared = torch.bmm(torch.bmm(vectors, group.rows.mT), self.of(metric, group))
            vectors = torch.baddbmm(vectors, shared, group.rows, alpha=-1)
        return vectors

    def inverse_roots(self, grams: Tensor) -> Tensor:
        """G^(-1/2).

        Newton–Schulz, coupled: Y → G^(1/2), C → G^(-1/2), each step a cubic that is steepest for
        the smallest value that is left (Chen and Chow 2014). Zero eigenvalues stay small.
        """
        norms = torch.linalg.matrix_norm(grams, keepdim=True)
        root, inverse = grams / norms, self.identity
        least = FAINTEST
        while least < 1 - _EPS:
            # x ← s x (3 - s² x²) / 2 for the roots x of eigenvalues, from `least` to 1
            scale = (3 / (1 + least + least * least)) ** 0.5
            product = torch.bmm(inverse, root)
            factor = torch.add(self.identity, product, alpha=-(scale**2) / 3)
            root = torch.baddbmm(root, root, factor, beta=0, alpha=1.5 * scale)
            inverse = torch.baddbmm(inverse, factor, inverse, beta=0, alpha=1.5 * scale)
            least = 0.5 * scale * least * (3 - scale**2 * least**2)
        return inverse * norms.rsqrt()


def one_round(groups: Sequence[Group]) -> Tensor:
    """State, kept share of the energy, norm and faintness of each matrix, [4, count]."""
    batch = _Batch(groups)
    total = torch.cat([group.total for group in groups])
    # norms by ‖M‖_F, of Z, of A, of what A has gained, of M - P
    before, after, gained, residual = total.new_empty(4, batch.count)
    grams = batch.grams([group.rows for group in groups])
    lower, sound = batch.cholesky(grams)
    # 1 where the rows are orthogonal to each other
    spread = (grams.diagonal(dim1=-2, dim2=-1).sqrt() / lower.diagonal(dim1=-2, dim2=-1)).amax(-1)
    inverse = batch.inverse(lower)
    metric = torch.bmm(inverse.mT, inverse)
    inverse = inverse / total[:, None, None]
    left: list[Tensor] = []  # Zᵀ, then U
    for group in beside(groups):
        both = group.rows
        if group.images is not None:
            both = torch.cat([both, batch.beyond(group, metric, group.images)], 1)
        both = torch.bmm(both, group.matrices.mT)
        left.append(torch.bmm(batch.of(inverse, group), both[:, : group.rank]))
        before[batch.places[id(group)]] = norm(left[-1])
        if group.images is not None:
            group.images = both[:, group.rank :] / group.total[:, None, None]
    kept = batch.grams(left)
    lower, positive = batch.cholesky(kept)
    faintest = lower.diagonal(dim1=-2, dim2=-1).amin(-1)
    inverse = batch.inverse(lower)
    for index, group in beside(enumerate(groups)):
        left[index] = torch.bmm(batch.of(inverse, group), left[index])
        group.turn = batch.of(inverse, group).mT
    # one Cholesky QR is as wrong as Z's condition squared; a step of Newton–Schulz squares that
    overlap = batch.grams(left)
    wrong = torch.linalg.matrix_norm(overlap - batch.identity)
    polish = 1.5 * batch.identity - 0.5 * overlap
    for index, group in beside(enumerate(groups)):
        place, own = batch.places[id(group)], group.total[:, None, None]
        group.left = torch.bmm(batch.of(polish, group), left[index])
        both = group.left if group.images is None else torch.cat([group.left, group.images], 1)
        both = torch.bmm(both / own, group.matrices)
        group.factor = both[:, : group.rank]
        if group.images is not None:
            rest = norm(both[:, group.rank :])
            group.bound, group.images = (SAFETY / PROBES * rest.square()).pow(1 / 3), None
        after[place] = norm(group.factor)
        coupled = group.factor
        if group.rank > PROBES:
            probes = gaussian(group.rank, own.device) * (SAFETY / PROBES) ** 0.5
            coupled = torch.bmm(probes.mT.expand(group.count, -1, -1), coupled)
        gained[place] = norm(batch.beyond(group, metric, coupled))
        lost = 1 - after[place].square()
        if not on_gpu(lost) and bool((lost > _LARGE).all()):
            residual[place] = lost.sqrt()
        else:  # do not wait for a GPU to know
            group.near = torch.bmm(group.left.mT * own, group.factor)
            residual[place] = norm(group.matrices - group.near) / group.total

    bound = torch.cat([group.bound for group in groups])
    optimum = (residual - ROUNDING).clamp_min(0) / RESIDUAL_PROMISE  # at least, or P may be wrong
    rounding = ROUNDING * spread.square() + wrong.square()
    allowed = residual.square() - optimum.square() - rounding.square()
    # what was gained is also known as a difference, but for rounding
    difference = (after.square() - before.square()).clamp_min(0) + 4 * _EPS
    gain = torch.minimum(gained.square(), difference)
    sound &= positive & (spread < 10) & (wrong < 0.1) & (total > 1e-12) & (total < 1e15)
    exceeds = batch.exceeds(kept, bound * (1 + gain / allowed)) & (allowed > 0)
    sure = sound & (exceeds | (residual <= ROUNDING))
    state = torch.where(sure, SURE, torch.where(sound, SOUND, UNSOUND))
    return torch.stack([state, 1 - residual.square(), total, faintest])


@dataclass(frozen=True)
class Result:
    """Of a group, sure or not.

    Attributes:
        near: P, [count, small, large]; may be in the matrices' place.
        start: for the next projection, [count, small, rank].
        polar: U Vᵀ, [count, small, large], unless a direction is faint; None where nobody wants it.
    """

    near: Tensor
    start: Tensor
    polar: Tensor | None

    def kept(self) -> Result:
        """With a memory of its own for what a projection leaves behind."""
        polar = None if self.polar is None else self.polar.clone()
        return Result(self.near, self.start.clone(), polar)


def results_of(groups: Sequence[Group]) -> list[Result]:
    found = []
    batch = roots = None
    if any(group.polar for group in groups):
        batch = _Batch(groups)
        roots = batch.inverse_roots(batch.grams([group.factor for group in groups]))
    for group in beside(groups):
        turn = group.turn
        if batch is not None and roots is not None:
            turn = batch.of(roots, group)
        # its product with M is orthonormal: the next start, and half of U Vᵀ
        turned = torch.bmm(turn, group.left)
        start = (turned / group.total[:, None, None]).mT.contiguous()
        polar = None
        if group.polar:
            polar = torch.bmm(turned.mT, group.factor)
        near = group.nearest() if group.near is None else group.near
        found.append(Result(near, start, polar))
    return found


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
