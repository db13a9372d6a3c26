"""Low-rank approximation in the metric of a layer's inputs: least error of the output.

A plain truncated SVD makes the weight's error small; what counts is the output's, ‖(W − W_r) X‖.
With the inputs' second moments G = E[x xᵀ] = L Lᵀ (or their covariance, see `moments`) that is the
error of W in the metric of G. Where the inputs meet the matrix M along its columns (`linear`,
`channel`), the optimum is U_r U_rᵀ M with U_r the leading left singular vectors of M L
(Eckart–Young), which no singular G can spoil: L is multiplied, never inverted. Where they meet its
rows (`spatial`, `decoupled`), the same on the other side is the optimum for inputs that do not
correlate between the remaining kernel positions; where every channel meets a matrix of its own
(`depthwise`), for channels that do not correlate. The error of what comes out is exact always.

Sources: closed form — Zhang et al. 2015, arXiv 1505.06798, section 3.1; Wang et al. 2024, SVD-LLM,
arXiv 2403.07378, theorem 3.3, which inverts L instead.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rankprune.errors import LayerError
from rankprune.layers import LayerSpec
from rankprune.linalg import Decomposition, check_finite
from rankprune.moments import Metric, Moment
from rankprune.ranks import Spectrum
from rankprune.schemes import Inputs, Scheme


class Whitened:
    """A layer's matrices under a scheme, in the metric of its inputs.

    Args:
        spec: the layer.
        scheme: one that fits it.
        weight: its weight.
        moment: of its inputs.
        name: the layer's, for messages.
        shrinkage: as in `Moment.metric`.

    Raises:
        NumericsError: the weight holds NaN or infinity.
        LayerError: the moments are those of another layer.
    """

    def __init__(
        self,
        spec: LayerSpec,
        scheme: Scheme,
        weight: Tensor,
        moment: Moment,
        name: str,
        *,
        shrinkage: float | None = None,
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
        self.metric = moment.metric(shrinkage)
        self.moment = moment
        self.inputs = scheme.inputs
        matrix = scheme.to_matrix(spec, weight.detach()).double()
        # [batch, outputs, inputs]
        self.oriented = matrix.mT if self.inputs is Inputs.ROWS else matrix

    @cached_property
    def _decomposition(self) -> Decomposition:
        metric, matrices = self.metric, self._grouped(self.oriented)
        if self.inputs is Inputs.ROWS:
            # all of the remaining kernel positions as further samples of the rows
            spread = self._spread(self.shape.rows)
            metric = Metric.of_gram(spread.diagonal(dim1=2, dim2=4).sum(-1))
        elif self.inputs is Inputs.KERNEL_COLUMNS:
            # every channel for itself
            spread = self._spread(self.shape.batch // self.groups)
            blocks = spread.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
            metric, matrices = Metric.of_gram(blocks), self.oriented.unsqueeze(1)
        weighed = metric.weigh(matrices).flatten(0, 1)
        # in a unit in which fp32 has all its digits
        self._unit = float(weighed.abs().max()) or 1.0
        return Decomposition((weighed / self._unit).float())

    @cached_property
    def _values(self) -> Tensor:
        """Singular values in the metric: [batch, max_rank]."""
        return self._decomposition.values * self._unit

    def _spread(self, parts: int) -> Tensor:
        """G by parts of a patch and the kernel positions in each: [g, parts, P, parts, P]."""
        positions = self.moment.features // parts
        return self.metric.matrix().reshape(self.groups, parts, positions, parts, positions)

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
        if self.inputs is Inputs.COLUMNS:
            energies = self._values.square().sum(0)
            return energies.sum() - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        rows = self.inputs is Inputs.ROWS
        products = self._products_by_rows() if rows else self._products_by_channels()
        # Σ_{k,l > r} ⟨term k, term l⟩
        suffix = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return torch.cat([suffix, suffix.new_zeros(1)])

    def _products_by_rows(self) -> Tensor:
        """⟨term k, term l⟩ of the rank-1 terms a bᵀ, in the metric of whole patches: [R, R].

        Σ_{p,q} (a_kᵀ G_pq a_l) · Σ_n b_k[n,p] b_l[n,q] for kernel positions p and q.
        """
        left, right = self._factors(self.shape.max_rank)
        spread = self._spread(self.shape.rows).to(left.device)
        others = spread.shape[2]
        a = self._grouped(left)  # [g, b, rows, R]
        b = self._grouped(right).unflatten(-1, (-1, others))  # [g, b, R, n, P]
        products = torch.zeros(a.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
        together = a.transpose(1, 2).flatten(2)  # one product for all of a group's matrices
        for p in range(others):
            for q in range(p + 1):
                weighed = (spread[:, :, p, :, q] @ together).unflatten(2, (-1, a.shape[-1]))
                terms = (a.mT @ weighed.transpose(1, 2)) * (b[..., p] @ b[..., q].mT)
                products += terms.sum((0, 1))
                if q < p:  # the pair (q, p) is its transpose
                    products += terms.mT.sum((0, 1))
        return products

    def _products_by_channels(self) -> Tensor:
        """The same, Σ_{c,d} (a_kᵀ a_l) · (b_kᵀ G_cd b_l) for channels c (of k) and d (of l)."""
        left, right = self._factors(self.shape.max_rank)
        channels, _, rank = left.shape
        own = channels // self.groups
        a = left.mT.reshape(self.groups, own * rank, -1)
        outputs = (a @ a.mT).unflatten(1, (own, rank)).unflatten(3, (own, rank))
        b = self._grouped(right)  # [g, c, R, P]
        spread = self._spread(own).to(left.device)
        inputs = torch.einsum("gckp,gcpdq,gdlq->gckdl", b, spread, b)
        return (outputs * inputs).sum((0, 1, 3))

    def _factors(self, rank: int) -> tuple[Tensor, Tensor]:
        basis = self._decomposition.truncate(rank).u.double()
        rest = basis.mT @ self.oriented
        return (rest.mT, basis.mT) if self.inputs is Inputs.ROWS else (basis, rest)

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
