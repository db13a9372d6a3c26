"""Decomposition schemes: how a weight becomes matrices, and matrices become two layers.

A scheme owns four things and nothing else: weight → matrix, its exact inverse, the layers that a
rank-r matrix becomes, and (by way of those layers) the cost of a unit of rank.

Shapes, for a convolution's weight [N, C/g, *k]. A weight becomes a *batch* of matrices of one
shape, [B, rows, cols], which share one rank: B = g groups, or the outputs or inputs.

    scheme      matrices                first layer                 second layer
    channel     g × [N/g, C/g·k]        conv(C→g·r, k)              conv(g·r→N, 1)
    spatial     g × [C/g·kh, N/g·kw]    conv(C→g·r, kh×1)           conv(g·r→N, 1×kw)
    decoupled   N × [C/g, k]            conv(C→N·r, 1)              conv(N·r→N, k, groups=N)
    depthwise   C × [N/g, k]            conv(C→C·r, k, groups=C)    conv(C·r→N, 1)
    linear      1 × [out, in]           Linear(in→r)                Linear(r→out)

A transposed convolution is the adjoint of a convolution, so its factors are the adjoints in
reverse order: `channel` is 1×1 then transposed k, `decoupled` is a grouped transposed k then 1×1,
`depthwise` is 1×1 then a grouped transposed k.

Sources: channel — Zhang et al. 2015, arXiv 1505.06798; spatial — Jaderberg et al. 2014, arXiv
1405.3866; decoupled and depthwise — Guo et al. 2018, arXiv 1808.05517, whose PW+DW and DW+PW they
are; Xu et al. 2019, arXiv 1910.04576, use the first three.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum, auto

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


class Inputs(Enum):
    """Where a layer's inputs, patches of them, meet a scheme's matrices."""

    COLUMNS = auto()  # whole patches
    ROWS = auto()  # parts of patches: channels, or channels and rows of the kernel
    KERNEL_COLUMNS = auto()  # every channel's part of a patch meets a matrix of its own


class Scheme(ABC):
    """Weight ↔ matrices ↔ two layers. Stateless; use the instances in `SCHEMES`."""

    name: str
    inputs: Inputs

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

    def rank_step(self, multiple_of: int) -> int:
        """What ranks are multiples of for the channels between the two layers to be such."""
        return multiple_of

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
    inputs = Inputs.COLUMNS

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
    inputs = Inputs.ROWS

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


class Separable(Scheme):
    """Network decoupling: a 1×1 and a depthwise convolution, for matrices of kernel positions.

    Every output has a matrix, of its inputs' kernels, or every input one, of its outputs'. What has
    the matrices has the depthwise kernels, so either these come last or they come first.

    Args:
        name: of the scheme.
        by_first_axis: the weight's first axis has the matrices, else its second. The first is
            that of a convolution's outputs and of a transposed convolution's inputs.
    """

    inputs = Inputs.ROWS

    def __init__(self, name: str, *, by_first_axis: bool) -> None:
        self.name = name
        self.by_first_axis = by_first_axis
        if not by_first_axis:
            self.inputs = Inputs.KERNEL_COLUMNS

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.kind not in ("conv", "conv_transpose"):
            return f"{self.name} is for convolutions"
        if self.matrix_shape(spec).max_rank == 1:
            return f"{self.name}'s matrices have rank 1 already (1×1 kernel or depthwise)"
        return None

    def rank_step(self, multiple_of: int) -> int:
        """Every rank: a unit has as many channels as the layer, which nobody chooses."""
        return 1

    def _kernels_first(self, spec: LayerSpec) -> bool:
        return self.by_first_axis == (spec.kind == "conv_transpose")

    def matrix_shape(self, spec: LayerSpec) -> MatrixShape:
        first, second, *kernel = spec.weight_shape
        if not self.by_first_axis:
            first, second = second * spec.groups, first // spec.groups
        return MatrixShape(first, second, math.prod(kernel))

    def to_matrix(self, spec: LayerSpec, weight: Tensor) -> Tensor:
        return (weight if self.by_first_axis else _swapped(weight, spec.groups)).flatten(2)

    def from_matrix(self, spec: LayerSpec, matrix: Tensor) -> Tensor:
        swapped = matrix if self.by_first_axis else _swapped(matrix, spec.groups)
        return swapped.reshape(spec.weight_shape)

    def factor_specs(self, spec: LayerSpec, rank: int) -> tuple[LayerSpec, LayerSpec]:
        if self._kernels_first(spec):
            inner = spec.in_channels * rank
            return (
                replace(spec, out_channels=inner, bias=False, groups=spec.in_channels),
                _pointwise(spec, inner, spec.out_channels, spec.bias),
            )
        inner = spec.out_channels * rank
        return (
            _pointwise(spec, spec.in_channels, inner, bias=False),
            replace(spec, in_channels=inner, groups=spec.out_channels),
        )

    def factor_weights(self, spec: LayerSpec, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        batch, others, rank = left.shape
        first, second = self.factor_specs(spec, rank)
        mixing = left.transpose(1, 2).reshape(batch * rank, others)
        if not self._kernels_first(spec):
            return mixing.reshape(first.weight_shape), right.reshape(second.weight_shape)
        mixing = _swapped(mixing, spec.groups)
        return right.reshape(first.weight_shape), mixing.reshape(second.weight_shape)

    def factor_matrices(
        self, spec: LayerSpec, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        shape = self.matrix_shape(spec)
        if self._kernels_first(spec):
            kernels, mixing = first, _swapped(second.flatten(1), spec.groups)
        else:
            kernels, mixing = second, first
        left = mixing.reshape(shape.batch, -1, shape.rows).transpose(1, 2)
        return left, kernels.reshape(shape.batch, -1, shape.cols)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """A grouped weight's first two axes in turn: [A, B/g, …] → [B, A/g, …]."""
    grouped = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


class LinearScheme(Scheme):
    """A linear layer as two linear layers, also for Hugging Face's `Conv1D`."""

    name = "linear"
    inputs = Inputs.COLUMNS

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


#: All schemes by name.
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Channel(),
        Spatial(),
        Separable("decoupled", by_first_axis=True),
        Separable("depthwise", by_first_axis=False),
        LinearScheme(),
    )
}


#: Names for a choice, layer by layer, of the scheme that keeps most for what it costs.
CHOICES: dict[str, tuple[str, ...]] = {
    "auto": tuple(SCHEMES),
    "separable": ("decoupled", "depthwise"),
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
        raise ConfigError(f"unknown scheme {name!r}; {near(name, [*SCHEMES, *CHOICES])}") from None


def check_scheme(wanted: str) -> None:
    """Let the name of a scheme or of a choice of them pass.

    Raises:
        ConfigError: for an unknown name.
    """
    if not isinstance(wanted, str) or wanted not in CHOICES:
        get_scheme(str(wanted))


def applicable(spec: LayerSpec, wanted: str) -> tuple[list[Scheme], str]:
    """Schemes that make sense for a layer, and why the others do not.

    Args:
        spec: the layer.
        wanted: a scheme's name or one of `CHOICES`. What stands for convolutions leaves linear
            layers to `linear`, their only scheme; "separable" leaves those that it cannot split
            (1×1, depthwise) to any that fits.

    Returns:
        The schemes, and a reason that is empty where there is at least one.
    """
    names = CHOICES.get(wanted) or (get_scheme(wanted).name,)
    if not spec.dims:
        names = ("linear",)
    elif wanted == "separable" and all(SCHEMES[name].refuses(spec) for name in names):
        names = CHOICES["auto"]
    candidates = [SCHEMES[name] for name in names]
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
