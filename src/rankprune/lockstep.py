"""Block iteration of many matrices at once, for GPUs: few calls, and one look at the device.

On a GPU the arithmetic of a layer's projection takes less time than the calls that ask for it, and
every question whether a result will do waits for all that was asked before. So the matrices of all
layers take their steps together: those with the same smaller side and rank in one product, larger
sides filled up with columns of zeros, and what is r × r of all of them in one batch, filled up with
ones on the diagonal. One round, from a start X as `Subspace` keeps it, with M of unit norm:

    V = orth(Xᵀ M)        Z = M Vᵀ        U = orth(Zᵀ)        A = U M        P = Uᵀ A

What P misses of the best rank-r matrix's energy is bounded by what the round's second half has
gained. With T = ZᵀZ, λ its smallest eigenvalue, D = M − Z V and η = ‖D‖₂² < λ, `subspace` has
opt − tr T ≤ tr(B (T − ηI)⁻¹ Bᵀ) ≤ λ / (λ − η) · tr(B T⁻¹ Bᵀ) for B = Dᵀ Z. The last trace is
d = ‖A (I − VᵀV)‖_F², and P keeps tr T + d, so

    opt − ‖P‖_F² ≤ d η / (λ − η)

and P keeps the promise where λ ≥ η (1 + d / what it may miss). Further rounds need no new η: no
D is longer than the one before. η is bounded by the Schatten norm ‖D‖_S6² = tr((DᵀD)³)^(1/3),
which a few Gaussian vectors S estimate as they take part in the round's products. P's own residual
is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankprune.linalg import RESIDUAL_PROMISE, ROUNDING, norm
from rankprune.subspace import PROBES, SAFETY, gaussian, newton_schulz

# Filling up may double what is stored on a GPU, and little is always let pass.
_FILLED, _LITTLE = 2, 2**20
_LITTLE_ELSEWHERE = 2**16
# Larger factors than this are decomposed one by one: batched routines are made for small ones.
_BATCHED_SIDE = 256
# The polar factor is exact from this share of the largest singular value on.
_FAINTEST = 1e-3

# ... and where G^(-1/2) is farther off than this, it is taken from the factor itself.
_FAR = 1e-2
# Above this share of the energy the residual's is well known as a difference.
_LARGE = 1e-2
# The least that the kept eigenvalues must exceed the others by for another round to be tried.
_GAP = 2.0

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Task:
    """Matrices to project to the rank of their start.

    Attributes:
        matrices: [batch, rows, cols], fp32 or half precision.
        start: [batch, min(rows, cols), rank], from `Subspace`, `Decomposition` or an earlier round.
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


@dataclass(frozen=True)
class Round:
    """What a round has made of a task.

    Attributes:
        certified: whether `nearest` keeps the residual's promise.
        hopeless: whether no further round will help, for want of a gap at the rank.
        nearest: [batch, rows, cols], in fp32.
        energy: kept share of the energy, pooled over the batch.
        polar: [batch, rows, cols], in fp32; None where it was not wanted.
        start: for the next round, or the next projection.
    """

    certified: bool
    hopeless: bool
    nearest: Tensor
    energy: float
    polar: Tensor | None
    start: Tensor


class _Group:
    """Tasks of one smaller side and rank, in one stack [count, small, large]."""

    def __init__(self, tasks: Sequence[Task], members: list[int], offset: int) -> None:
        self.members = members
        first = tasks[members[0]]
        self.small, self.rank = first.small, first.rank
        large = max(tasks[i].large for i in members)
        self.places: list[slice] = []  # in the stack
        count = 0
        for i in members:
            self.places.append(slice(count, count + len(tasks[i].matrices)))
            count = self.places[-1].stop
        self.where = slice(offset, offset + count)  # in the batch of all groups
        self.start = torch.cat([tasks[i].start for i in members])
        if len(members) == 1 and first.matrices.dtype == self.start.dtype:
            self.matrices = first.orient(first.matrices)
            return
        filled = any(tasks[i].large < large for i in members)
        make = first.start.new_zeros if filled else first.start.new_empty
        self.matrices = make(count, self.small, large)
        places = zip(members, self.places, strict=True)
        torch._foreach_copy_(
            [self.matrices[place, :, : tasks[i].large] for i, place in places],
            [tasks[i].orient(tasks[i].matrices) for i in members],
        )


class _Batch:
    """r × r of all groups, [count, size, size]; beyond a group's own rank the identity."""

    def __init__(self, groups: Sequence[_Group]) -> None:
        self.groups = groups
        self.size = max(group.rank for group in groups)
        like = groups[0].matrices
        identity = torch.eye(self.size, dtype=like.dtype, device=like.device)
        self.count = groups[-1].where.stop
        self.identity = identity.expand(self.count, -1, -1)

    def of(self, batch: Tensor, group: _Group) -> Tensor:
        """One group's, [count, rank, rank]."""
        return batch[group.where, : group.rank, : group.rank]

    def grams(self, factors: Sequence[Tensor]) -> Tensor:
        """F Fᵀ of a factor [count, rank, any] for each group."""
        grams = self.identity.clone()
        for group, factor in zip(self.groups, factors, strict=True):
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

    def beyond(self, group: _Group, metric: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
        """Vectors less what they share with the rows, whose Gram matrix has `metric` as inverse."""
        for _ in range(2):  # of a large part the first time leaves its rounding
            shared = torch.bmm(torch.bmm(vectors, rows.mT), self.of(metric, group))
            vectors = torch.baddbmm(vectors, shared, rows, alpha=-1)
        return vectors

    def inverse_roots(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """G^(-1/2), and how far it is from that.

        Newton–Schulz, coupled: Y → G^(1/2), C → G^(-1/2), each step a cubic that is steepest for
        the smallest value that is left (Chen and Chow 2014). Zero eigenvalues stay small.
        """
        norms = torch.linalg.matrix_norm(grams, keepdim=True)
        root, inverse = grams / norms, self.identity
        least = _FAINTEST
        product = root
        while least < 1 - _EPS:
            # x ← s x (3 - s² x²) / 2 for the roots x of eigenvalues, from `least` to 1
            scale = (3 / (1 + least + least * least)) ** 0.5
            factor = torch.add(self.identity, product, alpha=-(scale**2) / 3)
            root = torch.baddbmm(root, root, factor, beta=0, alpha=1.5 * scale)
            inverse = torch.baddbmm(inverse, factor, inverse, beta=0, alpha=1.5 * scale)
            product = torch.bmm(inverse, root)
            least = 0.5 * scale * least * (3 - scale**2 * least**2)
        distance = torch.linalg.matrix_norm(product - self.identity)
        return inverse * norms.rsqrt(), distance


def project_together(tasks: Sequence[Task]) -> list[Round]:
    """One round for every task; the device is waited for once.

    Args:
        tasks: with matrices and starts on one device.
    """
    groups: list[_Group] = []
    for members in _alike(tasks):
        groups.append(_Group(tasks, members, groups[-1].where.stop if groups else 0))
    batch = _Batch(groups)
    # norms of all matrices: of M; of the others by that: what bounds η³, Z, A, what A gains, M - P
    total, rest, before, after, gained, residual = groups[0].start.new_empty(6, batch.count)

    rows: list[Tensor] = []  # Xᵀ M
    images: list[Tensor] = []  # of Gaussian vectors S
    for group in groups:
        own = total[group.where]
        own.copy_(norm(group.matrices))
        sketch = gaussian(group.small, own.device) / own[:, None, None]
        both = torch.bmm(torch.cat([group.start, sketch], -1).mT, group.matrices)
        rows.append(both[:, : group.rank])
        images.append(both[:, group.rank :])
    lower, sound = batch.cholesky(batch.grams(rows))
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    # where the start is nearly right, the rows are nearly orthonormal as they are
    spread = diagonal.amax(-1) / diagonal.amin(-1)
    sound &= spread < 10
    inverse = batch.inverse(lower)
    metric = torch.bmm(inverse.mT, inverse)
    inverse = inverse / total[:, None, None]
    left: list[Tensor] = []  # Zᵀ, then U
    for index, group in enumerate(groups):
        image = batch.beyond(group, metric, rows[index], images[index])
        both = torch.bmm(torch.cat([rows[index], image], 1), group.matrices.mT)
        left.append(torch.bmm(batch.of(inverse, group), both[:, : group.rank]))
        before[group.where] = norm(left[index])
        images[index] = both[:, group.rank :]
    kept = batch.grams(left)
    lower, positive = batch.cholesky(kept)
    inverse = batch.inverse(lower)
    for index, group in enumerate(groups):
        left[index] = torch.bmm(batch.of(inverse, group), left[index])
    # one Cholesky QR is as wrong as Z's condition squared; a step of Newton–Schulz squares that
    overlap = batch.grams(left)
    wrong = torch.linalg.matrix_norm(overlap - batch.identity)
    polish = 1.5 * batch.identity - 0.5 * overlap
    factors: list[Tensor] = []  # A
    nearest: list[Tensor] = []
    for index, group in enumerate(groups):
        own = total[group.where, None, None]
        basis = left[index] = torch.bmm(batch.of(polish, group), left[index])
        both = torch.bmm(torch.cat([basis, images[index] / own], 1) / own, group.matrices)
        factor = both[:, : group.rank]
        rest[group.where] = norm(both[:, group.rank :])
        after[group.where] = norm(factor)
        coupled = factor
        if group.rank > PROBES:
            probes = gaussian(group.rank, own.device) * (SAFETY / PROBES) ** 0.5
            coupled = torch.bmm(probes.mT.expand(len(factor), -1, -1), factor)
        coupled = batch.beyond(group, metric, rows[index], coupled)
        gained[group.where] = norm(coupled)
        near = torch.bmm(basis.mT * own, factor)
        known = 1 - after[group.where].square()
        if known.is_cpu and bool((known > _LARGE).all()):
            residual[group.where] = known.sqrt() * total[group.where]
        else:
            residual[group.where] = norm(group.matrices - near)
        nearest.append(near)
        factors.append(factor)

    # the certificate
    residual = residual / total
    bound = (SAFETY / PROBES * rest.square()).pow(1 / 3)
    optimum = (residual - ROUNDING).clamp_min(0) / RESIDUAL_PROMISE  # at least, or P may be wrong
    rounding = ROUNDING * spread.square() + wrong.square()
    allowed = residual.square() - optimum.square() - rounding.square()
    # what was gained is also known as a difference, but for rounding
    difference = (after.square() - before.square()).clamp_min(0) + 8 * _EPS
    gain = torch.minimum(gained.square(), difference)
    sound &= positive & (wrong < 0.1) & (total > 1e-12) & (total < 1e15)
    exceeds = batch.exceeds(kept, bound * (1 + gain / allowed)) & (allowed > 0)
    certified = sound & (exceeds | (residual <= ROUNDING))
    hopeless = sound & ~batch.exceeds(kept, _GAP * bound)

    # U turned so that its product with M is orthonormal: the next start, and half of U Vᵀ
    turn, distance = inverse.mT, torch.zeros_like(total)
    if any(task.polar for task in tasks):
        turn, distance = batch.inverse_roots(batch.grams(factors))
    starts: list[Tensor] = []
    polars: list[Tensor | None] = []
    for index, group in enumerate(groups):
        turned = torch.bmm(batch.of(turn, group), left[index])
        starts.append((turned / total[group.where, None, None]).mT.contiguous())
        wanted = any(tasks[i].polar for i in group.members)
        polars.append(torch.bmm(turned.mT, factors[index]) if wanted else None)

    state = certified.float() - hopeless.float()
    looked = torch.stack([state, 1 - residual.square(), total, distance]).tolist()
    found: dict[int, Round] = {}
    for index, group in enumerate(groups):
        for i, place in zip(group.members, group.places, strict=True):
            states, energies, norms, distances = (values[group.where][place] for values in looked)
            polar = polars[index]
            if polar is not None and tasks[i].polar:
                polar = polar[place]
                if not all(far < _FAR for far in distances):
                    # too ill-conditioned to be squared
                    steps = newton_schulz(factors[index][place])
                    polar = left[index][place].mT @ steps
                polar = tasks[i].orient(polar[..., : tasks[i].large])
            energy = sum(size * size for size in norms)
            share = sum(e * size * size for e, size in zip(energies, norms, strict=True))
            found[i] = Round(
                certified=all(state > 0 for state in states),
                hopeless=any(state < 0 for state in states),
                nearest=tasks[i].orient(nearest[index][place, :, : tasks[i].large]),
                energy=max(0.0, share / energy) if energy else 1.0,
                polar=polar if tasks[i].polar else None,
                start=starts[index][place],
            )
    return [found[i] for i in range(len(tasks))]


def _alike(tasks: Sequence[Task]) -> list[list[int]]:
    """Tasks that go in one stack: the same smaller side and rank, similar larger sides."""
    alike: list[list[int]] = []
    order = sorted(
        range(len(tasks)), key=lambda i: (tasks[i].small, tasks[i].rank, -tasks[i].large)
    )
    used = stored = 0
    filled, little = (_FILLED, _LITTLE) if tasks[0].start.is_cuda else (1, _LITTLE_ELSEWHERE)
    for i in order:
        task = tasks[i]
        head = tasks[alike[-1][0]] if alike else task
        used += len(task.matrices) * task.small * task.large
        stored += len(task.matrices) * task.small * head.large
        same = (head.small, head.rank) == (task.small, task.rank)
        if alike and same and stored <= filled * used + little:
            alike[-1].append(i)
        else:
            alike.append([i])
            used = stored = len(task.matrices) * task.small * task.large
    return alike
