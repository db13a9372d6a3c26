"""Low-rank approximation in the metric of a layer's inputs: least error of the output.

A plain truncated SVD makes the weight's error small; what counts is the output's, ‖(W − W_r) X‖.
With the inputs' second moments G = E[x xᵀ] = L Lᵀ that is the error of W in the metric of G. Where
the inputs meet the matrix M along its columns (`linear`, `channel`), the optimum is U_r U_rᵀ M with
U_r the leading left singular vectors of M L (Eckart–Young), which no singular G can spoil: L is
multiplied, never inverted. Where they meet its rows (`spatial`, `decoupled`), the same on the other
side is the optimum for inputs that do not correlate between the remaining kernel positions. The
error of what comes out is exact in all cases.

Sources: closed form — Zhang et al. 2015, arXiv 1505.06798, section 3.1; Wang et al. 2024, SVD-LLM,
arXiv 2403.07378, theorem 3.3, which inverts L instead.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rankprune.errors import LayerError
from rankprune.layers import LayerSpec
from rankprune.linalg import Decomposition, check_finite, converged
from rankprune.ranks import Spectrum
from rankprune.schemes import Scheme

# Share of the mean second moment that is added to all directions. It decides where the inputs left
# a direction open (then the plain SVD's choice), and costs less accuracy than it could show.
RIDGE = 1e-5


class Rows:
    """Input patches [g, n, D], whose Gram matrix is computed once for all layers that see them."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @cached_property
    def gram(self) -> Tensor:
        """Σ x xᵀ: [g, D, D]."""
        return self.values.mT @ self.values


class Moment:
    """Second moments of what a layer is called with, summed over its calls in bounded memory.

    Few vectors are kept as they are; from as many on as they are long, their Gram matrix is, so
    that no more than D² numbers are held.

    Args:
        groups: g, of a grouped convolution.
        features: D, length of a patch: C/g times the kernel's positions, or in_features.
        weighted: each input was multiplied by the norm of a loss's gradient by the output.
    """

    def __init__(self, groups: int, features: int, *, weighted: bool = False) -> None:
        self.weighted = weighted
        self.groups = groups
        self.features = features
        self.count = 0
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None

    @classmethod
    def of_gram(cls, gram: Tensor) -> Moment:
        """From a mean Gram matrix [g, D, D]."""
        moment = cls(gram.shape[0], gram.shape[-1])
        moment._gram, moment.count = gram, 1
        return moment

    @torch.no_grad()
    def update(self, rows: Rows | Tensor) -> None:
        """Add input patches [g, n, D], in fp32 or fp64."""
        rows = rows if isinstance(rows, Rows) else Rows(rows)
        self.count += rows.values.shape[1]
        if self._gram is None and self.count < self.features:
            self._rows.append(rows.values.clone())
            return
        if self._gram is None:
            self._gram = rows.values.new_zeros(self.groups, self.features, self.features)
            for kept in self._rows:
                self._gram = self._gram + kept.mT @ kept
            self._rows = []
        if rows.gram.dtype == torch.float64:
            self._gram = self._gram.double()
        self._gram += rows.gram

    def mean(self) -> Tensor:
        """G = E[x xᵀ]: [g, D, D], fp64."""
        if self._gram is not None:
            return self._gram.double() / self.count
        rows = torch.cat(self._rows, 1).double()
        return rows.mT @ rows / self.count

    def weigh(self, matrix: Tensor, ridge: float = RIDGE) -> Tensor:
        """M L, with L Lᵀ = G + ridge · mean(diag G) · I.

        By Cholesky; where rounding has made G indefinite, by its eigenvectors without what is
        negative; from the vectors themselves where they are fewer than D.

        Args:
            matrix: [g, …, rows, D], fp64.
            ridge: share of the mean second moment to add to all directions.

        Returns:
            [g, …, rows, D or more], fp64, on the matrix's device.
        """
        between = (1,) * (matrix.dim() - 3)
        if self._gram is None:
            rows = torch.cat(self._rows, 1).double().to(matrix.device) / self.count**0.5
            scale = rows.square().sum((-2, -1)) / self.features
            rows = rows.unflatten(0, (self.groups, *between))
            spread = (ridge * scale).sqrt().reshape(-1, *between, 1, 1)
            return torch.cat([matrix @ rows.mT, spread * matrix], -1)
        moment = self.mean().to(matrix.device)
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        diagonal += ridge * diagonal.mean(-1, keepdim=True)
        root, failed = torch.linalg.cholesky_ex(moment)
        if bool((failed != 0).any()):
            values, vectors = converged(lambda: torch.linalg.eigh(moment), moment)
            root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        return matrix @ root.unflatten(0, (self.groups, *between))


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


class Whitened:
    """A layer's matrices under a scheme, in the metric of its inputs.

    Args:
        spec: the layer.
        scheme: one that fits it.
        weight: its weight.
        moment: of its inputs.
        name: the layer's, for messages.

    Raises:
        NumericsError: the weight holds NaN or infinity.
        LayerError: the moments are those of another layer.
    """

    def __init__(
        self, spec: LayerSpec, scheme: Scheme, weight: Tensor, moment: Moment, name: str
    ) -> None:
        shape = scheme.matrix_shape(spec)
        features = spec.weight_numel // spec.out_channels
        if (moment.groups, moment.features) != (spec.groups, features):
            raise LayerError(
                f"layer {name!r}: calibrated with {moment.groups} × {moment.features} inputs, the "
                f"layer has {spec.groups} × {features}; calibrate this model anew"
            )
        check_finite(weight, name)
        self.shape = shape
        self.groups = spec.groups
        self.moment = moment
        self.by_columns = scheme.patch_in_columns
        matrix = scheme.to_matrix(spec, weight.detach()).double()
        self.oriented = matrix if self.by_columns else matrix.mT  # [batch, outputs, inputs]

    @cached_property
    def _decomposition(self) -> Decomposition:
        moment = self.moment
        if not self.by_columns:
            # all of the remaining kernel positions as further samples of the rows
            total = self._spread().diagonal(dim1=2, dim2=4).sum(-1)
            moment = Moment.of_gram(total)
        weighed = moment.weigh(self._grouped(self.oriented)).flatten(0, 1)
        # in a unit in which fp32 has all its digits
        self._unit = float(weighed.abs().max()) or 1.0
        return Decomposition((weighed / self._unit).float())

    @cached_property
    def _values(self) -> Tensor:
        """Singular values in the metric: [batch, max_rank]."""
        return self._decomposition.values * self._unit

    def _spread(self) -> Tensor:
        """G by rows and remaining kernel positions: [g, rows, P, rows, P]."""
        rows = self.shape.rows
        others = self.moment.features // rows
        return self.moment.mean().reshape(self.groups, rows, others, rows, others)

    def _grouped(self, matrices: Tensor) -> Tensor:
        """[batch, …] to [g, batch / g, …]: filters of a group meet the same inputs."""
        return matrices.reshape(self.groups, -1, *matrices.shape[1:])

    def spectrum(self) -> Spectrum:
        """Singular values in the metric: roots of mean output energies."""
        return Spectrum(self._values, self.shape)

    def errors(self) -> Tensor:
        """Share of the output's energy that is lost at rank 0, 1, …, max_rank: fp64.

        E‖(W − W_r) x‖² / E‖W x‖², without the bias.
        """
        lost = self._lost
        if not lost[0] > 0:
            return torch.zeros_like(lost)  # nothing comes out of this layer: nothing can be lost
        return (lost / lost[0]).clamp(0, 1)

    def worth(self) -> float:
        """What losing all of the output costs, in units that layers share; 1 if not weighted.

        Σ ‖g‖² ‖W x‖² over the calls, with g the gradient of the loss by the output.
        """
        return float(self._lost[0]) * self.moment.count if self.moment.weighted else 1.0

    @cached_property
    def _lost(self) -> Tensor:
        """E‖(W − W_r) x‖² at rank 0, 1, …, max_rank."""
        if self.by_columns:
            energies = self._values.square().sum(0)
            return energies.sum() - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        return self._exact_errors()

    def _exact_errors(self) -> Tensor:
        """Σ_{k,l > r} ⟨term k, term l⟩ of the rank-1 terms, in the metric of whole patches.

        ⟨k, l⟩ = Σ_{p,q} (a_kᵀ G_pq a_l) · Σ_n b_k[n,p] b_l[n,q] for positions p and q.
        """
        left, right = self._factors(self.shape.max_rank)
        spread = self._spread().to(left.device)
        others = spread.shape[2]
        a = self._grouped(left)  # [g, b, rows, R]
        b = self._grouped(right).unflatten(-1, (-1, others))  # [g, b, R, n, P]
        products = torch.zeros(a.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
        for p in range(others):
            for q in range(p + 1):
                metric = spread[:, :, p, :, q].unsqueeze(1)
                terms = (a.mT @ (metric @ a)) * (b[..., p] @ b[..., q].mT)
                products += terms.sum((0, 1))
                if q < p:  # the pair (q, p) is its transpose
                    products += terms.mT.sum((0, 1))
        suffix = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return torch.cat([suffix, suffix.new_zeros(1)])

    def _factors(self, rank: int) -> tuple[Tensor, Tensor]:
        basis = self._decomposition.truncate(rank).u.double()
        rest = basis.mT @ self.oriented
        return (basis, rest) if self.by_columns else (rest.mT, basis.mT)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Left [batch, rows, r] and right [batch, r, cols] of W_r, every term's norm on both alike.

        Raises:
            LayerError: the rank is not between 1 and the largest.
        """
        left, right = self._factors(rank)
        a = torch.linalg.vector_norm(left, dim=-2)
        b = torch.linalg.vector_norm(right, dim=-1)
        scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
        return left * scale.unsqueeze(-2), right / scale.unsqueeze(-1)
