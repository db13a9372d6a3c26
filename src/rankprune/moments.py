"""What a layer is called with, summed up: mean and second moments, and the metric they make.

A constant error of a layer's output costs nothing where it can be put right afterwards, by the
layer's bias or by the mean of the BatchNorm that follows. There the inputs are centred: G is their
covariance (Zhang et al. 2015, arXiv 1505.06798, section 3.1). Few samples make directions look
empty that are not; G is shrunk towards a multiple of the identity as far as their number asks for,
by the oracle approximating estimator (Chen et al. 2010, arXiv 0907.4698, equation 23).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rankprune.layers import LayerSpec
from rankprune.linalg import converged

# Least share of the mean second moment that is added to all directions. It decides where the inputs
# left a direction open (then the plain SVD's choice), and costs less accuracy than it could show.
RIDGE = 1e-5


class Rows:
    """Input patches [g, n, D], whose Gram matrix is computed once for all layers that see them.

    Args:
        values: the patches, each times the root of its weight.
        roots: of the weights, [g, n]; None is 1 for all.
    """

    def __init__(self, values: Tensor, roots: Tensor | None = None) -> None:
        self.values = values
        self.roots = values.new_ones(values.shape[:2]) if roots is None else roots

    @cached_property
    def gram(self) -> Tensor:
        """Σ w x xᵀ: [g, D, D]."""
        return self.values.mT @ self.values


class Moment:
    """First and second moments of what a layer is called with, in bounded memory.

    Few vectors are kept as they are; from as many on as they are long, their Gram matrix is, so
    that no more than D² + D numbers are held.

    Args:
        groups: g, of a grouped convolution.
        features: D, length of a patch: C/g times the kernel's positions, or in_features.
        weighted: each input counts by the squared norm of a loss's gradient by the output.

    Attributes:
        count: patches that were added.
        centred: a constant error of the layer's output can be put right, and is not counted.
    """

    def __init__(self, groups: int, features: int, *, weighted: bool = False) -> None:
        self.weighted = weighted
        self.groups = groups
        self.features = features
        self.count = 0
        self.centred = False
        self._kept: list[Rows] = []
        self._gram: Tensor | None = None
        self._sum = torch.zeros(groups, features, dtype=torch.float64)  # Σ w x
        self._weights = torch.zeros(groups, dtype=torch.float64)  # Σ w
        self._squares = torch.zeros(groups, dtype=torch.float64)  # Σ w²

    @torch.no_grad()
    def update(self, rows: Rows | Tensor) -> None:
        """Add input patches [g, n, D], in fp32 or fp64."""
        rows = rows if isinstance(rows, Rows) else Rows(rows)
        self.count += rows.values.shape[1]
        roots = rows.roots.double()
        total = (rows.values.mT @ rows.roots.to(rows.values).unsqueeze(-1)).squeeze(-1)
        self._sum = self._sum.to(total.device) + total
        self._weights = self._weights.to(total.device) + roots.square().sum(1)
        self._squares = self._squares.to(total.device) + roots.pow(4).sum(1)
        if self._gram is None and self.count < self.features:
            self._kept.append(Rows(rows.values.clone(), rows.roots))
            return
        if self._gram is None:
            self._gram = rows.values.new_zeros(self.groups, self.features, self.features)
            for kept in self._kept:
                self._gram = self._gram + kept.values.mT @ kept.values
            self._kept = []
        if rows.gram.dtype == torch.float64:
            self._gram = self._gram.double()
        self._gram += rows.gram

    def second_moment(self) -> Tensor:
        """E[w x xᵀ]: [g, D, D], fp64."""
        if self._gram is not None:
            return self._gram.double() / self.count
        values = torch.cat([kept.values.double() for kept in self._kept], 1)
        return values.mT @ values / self.count

    def mean(self) -> Tensor:
        """E[w x] / E[w]: [g, D], fp64."""
        return self._sum / self._weights.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)

    def metric(self, shrinkage: float | None = None) -> Metric:
        """The metric of the inputs, or of what they differ from their mean by.

        Args:
            shrinkage: share of a multiple of the identity in it; None takes as much as the number
                of samples asks for.
        """
        # how many samples of equal weight would tell as much (Kish)
        samples = self._weights.square() / self._squares.clamp_min(torch.finfo(torch.float64).tiny)
        # of one sample nothing would be left
        centred = self.centred and bool((samples >= 2).all())
        rows: Tensor | None = None
        gram: Tensor | None = None
        if self._gram is None:
            rows = torch.cat([kept.values.double() for kept in self._kept], 1)
            if centred:
                roots = torch.cat([kept.roots.double() for kept in self._kept], 1)
                rows = rows - roots.unsqueeze(-1) * self.mean().unsqueeze(1)
            rows = rows / self.count**0.5
            trace = rows.square().sum((1, 2))
            square = (rows @ rows.mT).square().sum((1, 2))
        else:
            gram = self.second_moment()
            if centred:
                gram -= self.mean().unsqueeze(-1) * self._sum.unsqueeze(1) / self.count
            trace = gram.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(0)
            square = gram.square().sum((1, 2))
        if shrinkage is None:
            share = _shrinkage(trace, square, self.features, samples)
        else:
            share = torch.full_like(trace, shrinkage)
        share = share.clamp(RIDGE, 1)
        ridge = share * trace / self.features
        if rows is not None:
            rows *= (1 - share).sqrt().reshape(-1, 1, 1)
        if gram is not None:
            gram *= (1 - share).reshape(-1, 1, 1)
        return Metric(rows, gram, ridge)


def _shrinkage(trace: Tensor, square: Tensor, size: int, samples: Tensor) -> Tensor:
    """OAS: ρ from tr S, tr S², the size of S and the number of samples, each [g].

    Without the terms in 2 / size, as scikit-learn has it.
    """
    above = square + trace.square()
    below = (samples + 1) * (square - trace.square() / size).clamp_min(0)
    return torch.where(above < below, above / below.clamp_min(torch.finfo(below.dtype).tiny), 1.0)


class Metric:
    """G, in which the error of a weight is that of the output: from vectors or as a matrix.

    Args:
        rows: vectors [g, n, D] whose Σ x xᵀ it is, fp64, or None.
        gram: or the matrix itself, [g, D, D], fp64.
        ridge: what to add to its diagonal, [g].
    """

    def __init__(self, rows: Tensor | None, gram: Tensor | None, ridge: Tensor) -> None:
        self._rows = rows
        self._gram = gram
        self._ridge = ridge

    @classmethod
    def of_gram(cls, gram: Tensor) -> Metric:
        """From a matrix [g, D, D], fp64, with the least ridge."""
        return cls(None, gram, RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1))

    def matrix(self) -> Tensor:
        """G: [g, D, D], fp64."""
        if self._gram is None:
            assert self._rows is not None
            gram = self._rows.mT @ self._rows
        else:
            gram = self._gram.clone()
        gram.diagonal(dim1=-2, dim2=-1).add_(self._ridge.unsqueeze(-1))
        return gram

    def weigh(self, matrix: Tensor) -> Tensor:
        """M L, with L Lᵀ = G.

        By Cholesky; where rounding has made G indefinite, by its eigenvectors without what is
        negative; from the vectors themselves where they are fewer than D.

        Args:
            matrix: [g, …, rows, D], fp64.

        Returns:
            [g, …, rows, D or more], fp64, on the matrix's device.
        """
        between = (1,) * (matrix.dim() - 3)
        if self._rows is not None:
            rows = self._rows.to(matrix.device).unflatten(0, (-1, *between))
            spread = self._ridge.to(matrix.device).sqrt().reshape(-1, *between, 1, 1)
            return torch.cat([matrix @ rows.mT, spread * matrix], -1)
        moment = self.matrix().to(matrix.device)
        root, failed = torch.linalg.cholesky_ex(moment)
        if bool((failed != 0).any()):
            values, vectors = converged(lambda: torch.linalg.eigh(moment), moment)
            root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return matrix @ root.unflatten(0, (-1, *between))


def input_patches(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """What a layer's weight is multiplied with: [g, n, D], D ordered as the weight is.

    Args:
        spec: a linear layer or a convolution.
        inputs: what it is called with: [..., C], or [B, C, *] (without B as well).
    """
    if not spec.dims:
        return inputs.reshape(1, -1, spec.in_channels)
    if inputs.dim() == spec.dims + 1:
        inputs = inputs.unsqueeze(0)
    inputs = _padded(spec, inputs)
    offsets = torch.cartesian_prod(*(torch.arange(side) for side in spec.kernel_size))
    shifted = []
    for offset in offsets.reshape(-1, spec.dims).tolist():
        window = inputs
        for axis, (at, side) in enumerate(zip(offset, spec.kernel_size, strict=True)):
            stride, dilation = spec.stride[axis], spec.dilation[axis]
            length = inputs.shape[axis + 2] - dilation * (side - 1)
            window = window.narrow(axis + 2, at * dilation, length)
            window = window[(slice(None),) * (axis + 2) + (slice(None, None, stride),)]
        shifted.append(window.flatten(2))
    patches = torch.stack(shifted, 2)  # [B, C, K, positions]
    batch, _, kernel, positions = patches.shape
    features = spec.in_channels // spec.groups * kernel
    grouped = patches.reshape(batch, spec.groups, features, positions)
    return grouped.permute(1, 0, 3, 2).reshape(spec.groups, batch * positions, features)


def _padded(spec: LayerSpec, inputs: Tensor) -> Tensor:
    if spec.padding == "valid":
        return inputs
    if spec.padding == "same":
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(side), int(side)) for side in spec.padding]
    pads = [pad for side in reversed(sides) for pad in side]
    if not any(pads):
        return inputs
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return torch.nn.functional.pad(inputs, pads, mode=mode)
