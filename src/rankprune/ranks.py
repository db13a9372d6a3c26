"""Rank rules: from a layer's spectrum to one rank. Pure and cheap; they see no layer.

A layer with groups has a batch of matrices, which share one rank; every rule says how it pools
them. All ranks are between 1 and the largest possible.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankprune.errors import ConfigError
from rankprune.schemes import MatrixShape


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer's matrices.

    Attributes:
        values: [batch, max_rank], descending, fp64; or the leading ones alone, [batch, k].
        shape: batch, rows and columns.
        total: sum of all squared singular values, [batch], where `values` are not all.
    """

    values: Tensor
    shape: MatrixShape
    total: Tensor | None = None

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared singular values [batch, k] and their sums [batch], all in one unit.

        The unit is such that fp64 holds the squares of whatever it holds.
        """
        if self.total is not None:  # of fp32 matrices
            return self.values.square(), self.total
        largest = self.values.max()
        squares = (self.values / largest if largest > 0 else self.values).square()
        return squares, squares.sum(1)

    def energy(self) -> Tensor:
        """Cumulated share of the squared singular values, pooled over the batch: [k].

        A matrix of zeros has all its energy at every rank.
        """
        squares, totals = self.squares()
        total = totals.sum()
        if total == 0:
            return torch.ones_like(squares[0])
        return (squares.sum(0).cumsum(0) / total).clamp_max(1.0)


class RankRule(ABC):
    """Chooses a rank for a spectrum.

    Attributes:
        reads: what `select` needs to know: "all" singular values, the "leading" ones and the
            total, or the "shape" alone. A rank as large as the number of leading values means
            that they did not suffice.
    """

    reads: ClassVar[str] = "all"

    @abstractmethod
    def select(self, spectrum: Spectrum) -> int:
        """Rank between 1 and `spectrum.shape.max_rank`."""


def _clip(rank: int, spectrum: Spectrum) -> int:
    return max(1, min(rank, spectrum.shape.max_rank))


def _require(condition: bool, rule: str, received: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}({received!r}): {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Energy(RankRule):
    """Smallest rank that keeps this share of the energy: Σ_{i≤r} σ_i² ≥ keep · Σ σ_i².

    `Energy(0.98)` is the paper's rule with e = 0.02 (Xu et al. 2019, arXiv 1910.04576, section 3).
    Groups are pooled.

    Attributes:
        keep: 0 < keep ≤ 1.

    >>> spectrum = Spectrum(torch.tensor([[3.0, 2.0, 1.0]]), MatrixShape(1, 3, 3))
    >>> Energy(0.9).select(spectrum)
    2
    """

    reads: ClassVar[str] = "leading"
    keep: float

    def __post_init__(self) -> None:
        _require(_is_number(self.keep) and 0 < self.keep <= 1, "Energy", self.keep, "0 < keep ≤ 1")

    def select(self, spectrum: Spectrum) -> int:
        # a sum of n terms in fp64 may end one rounding short of its total
        short = int((spectrum.energy() < self.keep * (1 - 1e-12)).sum())
        return _clip(short + 1, spectrum)


@dataclass(frozen=True)
class Threshold(RankRule):
    """Number of singular values above a threshold; of groups, the most.

    Attributes:
        value: the threshold, ≥ 0.
        relative: compare with value · σ₁ instead of value.

    >>> spectrum = Spectrum(torch.tensor([[3.0, 2.0, 1.0]]), MatrixShape(1, 3, 3))
    >>> Threshold(1.5).select(spectrum), Threshold(0.1, relative=True).select(spectrum)
    (2, 3)
    """

    reads: ClassVar[str] = "leading"
    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        _require(_is_number(self.value) and self.value >= 0, "Threshold", self.value, "value ≥ 0")
        _require(
            not self.relative or self.value < 1, "Threshold", self.value, "relative needs value < 1"
        )

    def select(self, spectrum: Spectrum) -> int:
        limit = self.value * (spectrum.values[:, :1] if self.relative else 1.0)
        return _clip(int((spectrum.values > limit).sum(1).max()), spectrum)


@dataclass(frozen=True)
class Ratio(RankRule):
    """This share of the largest possible rank, rounded to the nearest.

    Attributes:
        value: 0 < value ≤ 1.
    """

    reads: ClassVar[str] = "shape"
    value: float

    def __post_init__(self) -> None:
        _require(_is_number(self.value) and 0 < self.value <= 1, "Ratio", self.value, "0 < r ≤ 1")

    def select(self, spectrum: Spectrum) -> int:
        return _clip(round(self.value * spectrum.shape.max_rank), spectrum)


@dataclass(frozen=True)
class FixedRank(RankRule):
    """The same rank everywhere; less where a layer's largest is less.

    Attributes:
        rank: at least 1.
    """

    reads: ClassVar[str] = "shape"
    rank: int

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        _require(whole and self.rank >= 1, "FixedRank", self.rank, "a whole number ≥ 1")

    def select(self, spectrum: Spectrum) -> int:
        return _clip(self.rank, spectrum)


@dataclass(frozen=True)
class StableRank(RankRule):
    """A multiple of the stable rank ‖M‖_F² / σ₁², rounded up; of groups, the largest.

    Attributes:
        factor: greater than 0; 1 keeps the stable rank itself.
    """

    reads: ClassVar[str] = "leading"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(
            _is_number(self.factor) and self.factor > 0, "StableRank", self.factor, "factor > 0"
        )

    def select(self, spectrum: Spectrum) -> int:
        squares, totals = spectrum.squares()
        peak = squares[:, 0]
        stable = torch.where(peak > 0, totals / peak, 1.0).max()
        return _clip(math.ceil(self.factor * float(stable) - 1e-9), spectrum)


@dataclass(frozen=True)
class EVBMF(RankRule):
    """Rank by empirical variational Bayes matrix factorisation; of groups, the largest.

    The global analytic solution: the noise variance minimises the free energy over the spectrum,
    and singular values below the resulting threshold are noise.

    Attributes:
        weaken: share of the singular values thus called noise that is kept nonetheless (0 to 1);
            0 is the method itself, which tends to choose very low ranks.

    Source:
        Nakajima, Tomioka, Sugiyama, Babacan 2015, JMLR 16, Condition for Perfect Dimensionality
        Recovery by Variational Bayesian PCA, theorem 2 and corollary 1.
    """

    weaken: float = 0.0

    def __post_init__(self) -> None:
        _require(
            _is_number(self.weaken) and 0 <= self.weaken < 1, "EVBMF", self.weaken, "0 ≤ weaken < 1"
        )

    def select(self, spectrum: Spectrum) -> int:
        found = int(_evb_ranks(spectrum).max())
        found += round(self.weaken * (spectrum.shape.max_rank - found))
        return _clip(found, spectrum)


def _evb_ranks(spectrum: Spectrum) -> Tensor:
    """Number of singular values that are signal, for every matrix: [batch]."""
    shape = spectrum.shape
    small, large = min(shape.rows, shape.cols), max(shape.rows, shape.cols)
    alpha = small / large
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    squares = spectrum.squares()[0].double()  # [batch, small]
    # bounds of the noise variance; at most `most` components can be signal
    most = math.ceil(small / (1 + alpha)) - 1
    upper = squares.sum(1) / (small * large)
    tail = squares[:, most:]
    lower = torch.maximum(tail[:, 0] / (large * x_bar), tail.mean(1) / large)
    tiny = torch.finfo(torch.float64).tiny
    lower = torch.maximum(lower, upper * 1e-12).clamp_min(tiny)
    low, high = lower.log(), torch.maximum(lower, upper).log()

    def free_energy(log_variance: Tensor) -> Tensor:  # [batch, points] → [batch, points]
        x = squares.unsqueeze(1) / (large * log_variance.exp().unsqueeze(2))
        x = x.clamp_min(tiny)
        b = x - (1 + alpha)
        tau = (b + (b.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
        signal = (tau + 1).log() + alpha * (tau / alpha + 1).log() - tau
        return (x - x.log() + torch.where(x > x_bar, signal, 0)).sum(2)

    # the free energy has kinks and local minima: scan, and zoom in on the best
    for _ in range(4):
        steps = torch.linspace(0, 1, 48, dtype=torch.float64, device=low.device)
        points = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps  # [batch, 48]
        best = free_energy(points).argmin(1, keepdim=True)
        low = points.gather(1, (best - 1).clamp_min(0)).squeeze(1)
        high = points.gather(1, (best + 1).clamp_max(len(steps) - 1)).squeeze(1)
        variance = points.gather(1, best).exp()
    return (squares > large * variance * x_bar).sum(1)
