"""Decomposition schemes: how a weight becomes matrices, and matrices become two layers.

A scheme owns four things and nothing else: weight → matrix, its exact inverse, the layers that a
rank-r matrix becomes, and (by way of those layers) the cost of a unit of rank.

Shapes, for a convolution's weight [N, C/g, *k]. A weight becomes a *batch* of matrices of one
shape, [B, rows, cols], which share one rank: B = g groups (or one matrix for every filter).

    scheme      matrices                    first layer            second layer
    channel     g × [N/g, C/g·k]            conv(C→g·r, k)         conv(g·r→N, 1)
    spatial     g × [C/g·kh, N/g·kw]        conv(C→g·r, kh×1)      conv(g·r→N, 1×kw)
    decoupled   N × [C/g, k]                conv(C→N·r, 1)         conv(N·r→N, k, groups=N)
    linear      1 × [out, in]               Linear(in→r)           Linear(r→out)

A transposed convolution is the adjoint of a convolution, so its factors are the adjoints in
reverse order: `channel` is 1×1 then transposed k, `decoupled` is a grouped transposed k then 1×1.

Sources: channel — Zhang et al. 2015, arXiv 1505.06798; spatial — Jaderberg et al. 2014, arXiv
1405.3866; decoupled — Guo et al. 2018, arXiv 1808.05517; all three as used by Xu et al. 2019,
arXiv 1910.04576.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from rankprune.errors import ConfigError, near
from rankprune.layers import LayerSpec


@dataclass(frozen=True)
class MatrixShape:
    """A batch of matrices that share one rank: [batch, rows, cols]."""

    batch: int
    rows: int
    cols: int

    @property
    def max_rank(self) -> int:
        """Largest rank that the matrices can have."""
        return min(self.rows, self.cols)


class Scheme(ABC):
    """Weight ↔ matrices ↔ two layers. Stateless; use the instances in `SCHEMES`."""

    name: str
    # whether the inputs, whole patches, meet the columns; else parts of patches meet the rows
    patch_in_columns: bool

    @abstractmethod
    def refuses(self, spec: LayerSpec) -> str | None:
        """Say why the scheme makes no sense for a layer, or return None where it does."""

    @abstractmethod
    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        """Shape of `to_matrix`'s result."""

    @abstractmethod
    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        """Reshape a weight (`spec.weight_shape`) to matrices [B, rows, cols]."""

    @abstractmethod
    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        """Exact inverse of `to_matrix`: matrices [B, rows, cols] to a weight."""

    @abstractmethod
    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        """The two layers that matrices of this rank become, in the order of the forward pass."""

    @abstractmethod
    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the two layers.

        Args:
            spec: the dense layer.
            left: [B, rows, r].
            right: [B, r, cols], such that left @ right is the matrix.

        Returns:
            The first and the second layer's weight, in the shapes of `factor_specs`.
        """

    @abstractmethod
    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Inverse of `factor_weights`: left [B, rows, r] and right [B, r, cols]."""

    def unit_params(self, spec: LayerSpec) -> int:
        """Parameters that one unit of rank costs. The bias costs the same at every rank."""
        return sum(factor.weight_numel for factor in self.factor_specs(spec, 1))


def _ones(spec: LayerSpec) -> tuple[int, ...]:
    return (1,) * spec.dims


def _zeros(spec: LayerSpec) -> tuple[int, ...]:
    return (0,) * spec.dims


def _pointwise(spec: LayerSpec, in_channels: int, out_channels: int, bias: bool) -> LayerSpec:
    """A 1×1 convolution with the layer's groups."""
    return LayerSpec(
        kind="conv",
        in_channels=in_channels,
        out_channels=out_channels,
        bias=bias,
        kernel_size=_ones(spec),
        stride=_ones(spec),
        padding=_zeros(spec),
        dilation=_ones(spec),
        output_padding=_zeros(spec),
        groups=spec.groups,
    )


class Channel(Scheme):
    """Output channels against the rest (transposed layers: input channels against the rest)."""

    name = "channel"
    patch_in_columns = True

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.kind not in ("conv", "conv_transpose"):
            return "channel is for convolutions"
        if self.matrix_shape(spec).max_rank == 1:
            return "channel's matrix has rank 1 already (depthwise or one channel)"
        return None

    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        # the weight is [A, B/g, *k] with A = N, or A = C where transposed
        outer = spec.weight_shape[0] // spec.groups
        return MatrixShape(spec.groups, outer, math.prod(spec.weight_shape[1:]))

    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        shape = self.matrix_shape(spec)
        return weight.reshape(shape.batch, shape.rows, shape.cols)

    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        return matrix.reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        inner = spec.groups * rank
        if spec.kind == "conv":
            return (
                replace(spec, out_channels=inner, bias=False),
                _pointwise(spec, inner, spec.out_channels, spec.bias),
            )
        return (
            _pointwise(spec, spec.in_channels, inner, bias=False),
            replace(spec, in_channels=inner),
        )

    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        g, rank = spec.groups, left.shape[-1]
        kernel = right.reshape(g * rank, *spec.weight_shape[1:])
        if spec.kind == "conv":
            return kernel, left.reshape(spec.out_channels, rank, *_ones(spec))
        # 1×1 from C/g to r in every group: [g·r, C/g, 1…]
        pointwise = left.transpose(1, 2).reshape(g * rank, spec.in_channels // g, *_ones(spec))
        return pointwise, kernel

    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        g = spec.groups
        shape = self.matrix_shape(spec)
        if spec.kind == "conv":
            return second.reshape(g, shape.rows, -1), first.reshape(g, -1, shape.cols)
        left = first.reshape(g, -1, spec.in_channels // g).transpose(1, 2)
        return left, second.reshape(g, -1, shape.cols)


class Spatial(Scheme):
    """Vertical against horizontal: a kh×1 convolution, then a 1×kw one. Two-dimensional only."""

    name = "spatial"
    patch_in_columns = False

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.kind not in ("conv", "conv_transpose") or spec.dims != 2:
            return "spatial is for 2-d convolutions"
        if self.matrix_shape(spec).max_rank == 1:
            return "spatial's matrix has rank 1 already"
        return None

    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        kh, kw = spec.kernel_size
        c, n = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        return MatrixShape(spec.groups, c * kh, n * kw)

    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        shape = self.matrix_shape(spec)
        g, (kh, kw) = spec.groups, spec.kernel_size
        c, n = spec.in_channels // g, spec.out_channels // g
        if spec.kind == "conv":  # [g, n, c, kh, kw] → [g, c, kh, n, kw]
            grouped = weight.reshape(g, n, c, kh, kw).permute(0, 2, 3, 1, 4)
        else:  # [g, c, n, kh, kw] → [g, c, kh, n, kw]
            grouped = weight.reshape(g, c, n, kh, kw).permute(0, 1, 3, 2, 4)
        return grouped.reshape(g, shape.rows, shape.cols)

    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        g, (kh, kw) = spec.groups, spec.kernel_size
        c, n = spec.in_channels // g, spec.out_channels // g
        order = (0, 3, 1, 2, 4) if spec.kind == "conv" else (0, 1, 3, 2, 4)
        return matrix.reshape(g, c, kh, n, kw).permute(order).reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        inner = spec.groups * rank

        def along(axis: int, in_channels: int, out_channels: int, bias: bool) -> LayerSpec:
            def keep(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
                return tuple(v if i == axis else neutral for i, v in enumerate(values))

            padding = spec.padding
            return replace(
                spec,
                in_channels=in_channels,
                out_channels=out_channels,
                bias=bias,
                kernel_size=keep(spec.kernel_size, 1),
                stride=keep(spec.stride, 1),
                # "same" pads nothing along an axis of kernel size 1
                padding=padding if isinstance(padding, str) else keep(padding, 0),
                dilation=keep(spec.dilation, 1),
                output_padding=keep(spec.output_padding, 0),
            )

        return (
            along(0, spec.in_channels, inner, bias=False),
            along(1, inner, spec.out_channels, bias=spec.bias),
        )

    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        g, (kh, kw), rank = spec.groups, spec.kernel_size, left.shape[-1]
        c, n = spec.in_channels // g, spec.out_channels // g
        vertical = left.reshape(g, c, kh, rank)
        horizontal = right.reshape(g, rank, n, kw)
        if spec.kind == "conv":
            return (
                vertical.permute(0, 3, 1, 2).reshape(g * rank, c, kh, 1),
                horizontal.permute(0, 2, 1, 3).reshape(g * n, rank, 1, kw),
            )
        return (
            vertical.permute(0, 1, 3, 2).reshape(g * c, rank, kh, 1),
            horizontal.reshape(g * rank, n, 1, kw),
        )

    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        g, (kh, kw) = spec.groups, spec.kernel_size
        c, n = spec.in_channels // g, spec.out_channels // g
        if spec.kind == "conv":
            vertical = first.reshape(g, -1, c, kh).permute(0, 2, 3, 1)
            horizontal = second.reshape(g, n, -1, kw).permute(0, 2, 1, 3)
        else:
            vertical = first.reshape(g, c, -1, kh).permute(0, 1, 3, 2)
            horizontal = second.reshape(g, -1, n, kw)
        return vertical.reshape(g, c * kh, -1), horizontal.reshape(g, -1, n * kw)


class Decoupled(Scheme):
    """Network decoupling: every filter's channels against its kernel positions.

    A convolution's filters are its N outputs; a transposed convolution's are its C inputs.
    """

    name = "decoupled"
    patch_in_columns = False

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.kind not in ("conv", "conv_transpose"):
            return "decoupled is for convolutions"
        if self.matrix_shape(spec).max_rank == 1:
            return "decoupled's matrices have rank 1 already (1×1 kernel or depthwise)"
        return None

    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        filters, channels, *kernel = spec.weight_shape
        return MatrixShape(filters, channels, math.prod(kernel))

    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        return weight.flatten(2)

    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        return matrix.reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        if spec.kind == "conv":
            inner = spec.out_channels * rank
            return (
                _pointwise(spec, spec.in_channels, inner, bias=False),
                replace(spec, in_channels=inner, groups=spec.out_channels),
            )
        inner = spec.in_channels * rank
        return (
            replace(spec, out_channels=inner, bias=False, groups=spec.in_channels),
            _pointwise(spec, inner, spec.out_channels, spec.bias),
        )

    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        filters, channels, rank = left.shape
        depthwise = right.reshape(filters, rank, *spec.kernel_size)
        if spec.kind == "conv":  # [N, C/g, r] → [N·r, C/g, 1…]
            return left.transpose(1, 2).reshape(filters * rank, channels, *_ones(spec)), depthwise
        # [C, N/g, r] → [g, N/g, (C/g)·r] → [N, (C/g)·r, 1…]
        g = spec.groups
        mixed = left.reshape(g, filters // g, channels, rank).permute(0, 2, 1, 3)
        return depthwise, mixed.reshape(spec.out_channels, -1, *_ones(spec))

    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = self.matrix_shape(spec)
        if spec.kind == "conv":
            left = first.reshape(shape.batch, -1, shape.rows).transpose(1, 2)
            return left, second.reshape(shape.batch, -1, shape.cols)
        g = spec.groups
        mixed = second.reshape(g, shape.rows, shape.batch // g, -1).permute(0, 2, 1, 3)
        left = mixed.reshape(shape.batch, shape.rows, -1)
        return left, first.reshape(shape.batch, -1, shape.cols)


class LinearScheme(Scheme):
    """A linear layer as two linear layers, also for Hugging Face's `Conv1D`."""

    name = "linear"
    patch_in_columns = True

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.kind not in ("linear", "hf_conv1d"):
            return "linear is for linear layers"
        if self.matrix_shape(spec).max_rank == 1:
            return "the matrix has rank 1 already (one input or output)"
        return None

    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        return MatrixShape(1, spec.out_channels, spec.in_channels)

    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        return (weight if spec.kind == "linear" else weight.T).unsqueeze(0)

    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        weight = matrix.squeeze(0)
        return weight if spec.kind == "linear" else weight.T

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        plain = replace(spec, kind="linear")
        return (
            replace(plain, out_channels=rank, bias=False),
            replace(plain, in_channels=rank),
        )

    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return right.squeeze(0), left.squeeze(0)

    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        return second.unsqueeze(0), first.unsqueeze(0)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Channel(), Spatial(), Decoupled(), LinearScheme())
}


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name.

    >>> get_scheme("spatial").name
    'spatial'

    Raises:
        ConfigError: for an unknown name.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise ConfigError(f"unknown scheme {name!r}; {near(name, SCHEMES)}") from None


def applicable(spec: LayerSpec, wanted: str) -> tuple[list[Scheme], str]:
    """Schemes that make sense for a layer, and why the others do not.

    Args:
        spec: the layer.
        wanted: "auto" for every scheme that fits, or one scheme's name. A name that stands for
            convolutions leaves linear layers to `linear`, their only scheme.

    Returns:
        The schemes, and a reason that is empty where there is at least one.
    """
    if wanted == "auto":
        candidates = list(SCHEMES.values())
    else:
        candidates = [get_scheme(wanted)]
        if not spec.dims:
            candidates = [SCHEMES["linear"]]
    refusals = {scheme.name: scheme.refuses(spec) for scheme in candidates}
    fitting = [scheme for scheme in candidates if refusals[scheme.name] is None]
    if fitting:
        return fitting, ""
    native = [
        reason
        for name, reason in refusals.items()
        if reason and ("rank 1" in reason or len(refusals) == 1)
    ]
    return [], "; ".join(native) or "no scheme fits"
