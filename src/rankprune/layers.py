"""A layer in plain numbers: what schemes compute with, plans store and factors are built from.

`LayerSpec` is the one description of a linear map that the rest of the package shares. It is
read off a module (`LayerSpec.of`), turned into a new module (`LayerSpec.build`), and written to
and read from JSON. It holds no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankprune.errors import LayerError

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONV.values(), *_CONV_TRANSPOSE.values())
# No weight yet; and a class that tells that its weight is read by the attention around it.
_NEVER = (LazyModuleMixin, NonDynamicallyQuantizableLinear)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
KINDS = ("linear", "hf_conv1d", "conv", "conv_transpose")


def is_hf_conv1d(module: nn.Module) -> bool:
    """True for Hugging Face's `Conv1D`: a linear layer whose weight is stored [in, out]."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def _is_timm_linear(module: nn.Module) -> bool:
    """True for timm's `Linear`, whose own forward computes the same and helps torch.jit."""
    cls = type(module)
    return cls.__name__ == "Linear" and cls.__module__.startswith("timm.")


def _computes(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer whose forward a module has: its class, or one that it inherits it from.

    What else a subclass brings (an initialisation, `fully_shard`'s mixin) changes no answer.
    """
    if _is_timm_linear(module):
        return nn.Linear
    for layer in _LAYERS:
        if isinstance(module, layer) and not isinstance(module, _NEVER):
            inherits = (
                _code(module, name) is _code(layer, name) for name in ("forward", "_conv_forward")
            )
            return layer if all(inherits) else None
    return None


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """As torch reads it: one number is for all dimensions."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether this one object computes something else than its class."""
    return _code(module, "forward") is not _code(type(module), "forward")


def _code(owner: nn.Module | type[nn.Module], name: str) -> object:
    """The function behind a method; a forward that was replaced on one object is itself."""
    method = getattr(owner, name, None)
    return getattr(method, "__func__", method)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Hyper-parameters of a linear or convolution layer.

    Attributes:
        kind: "linear", "hf_conv1d", "conv" or "conv_transpose".
        in_channels: C, input channels or features.
        out_channels: N, output channels or features.
        bias: whether the layer has a bias.
        kernel_size: one number a spatial dimension; empty for linear layers.
        stride, dilation, output_padding: as in torch, one number a spatial dimension.
        padding: one number a spatial dimension, or "same" / "valid".
        groups: g.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    kind: str
    in_channels: int
    out_channels: int
    bias: bool
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def dims(self) -> int:
        """Number of spatial dimensions; 0 for linear layers."""
        return len(self.kernel_size)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the layer says of itself, under the names that its class gives them."""
        if self.kind == "linear":
            return {"in_features": self.in_channels, "out_features": self.out_channels}
        if self.kind == "hf_conv1d":
            return {"nx": self.in_channels, "nf": self.out_channels}
        return {name: value for name, value in vars(self).items() if name not in ("kind", "bias")}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, in the order in which torch stores it."""
        c, n, g = self.in_channels, self.out_channels, self.groups
        if self.kind == "linear":
            return (n, c)
        if self.kind == "hf_conv1d":
            return (c, n)
        if self.kind == "conv":
            return (n, c // g, *self.kernel_size)
        return (c, n // g, *self.kernel_size)

    @property
    def weight_numel(self) -> int:
        """Number of weight elements, without the bias."""
        return math.prod(self.weight_shape)

    @property
    def params(self) -> int:
        """Number of parameters, with the bias."""
        return self.weight_numel + (self.out_channels if self.bias else 0)

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """Describe a module, or return None where it is no supported layer.

        A subclass counts where it inherits the forward, or else may compute something else.

        >>> spec = LayerSpec.of(nn.Conv2d(3, 8, (3, 1), stride=2, padding=1, groups=1))
        >>> spec.kernel_size, spec.weight_shape
        ((3, 1), (8, 3, 3, 1))
        """
        if forward_is_replaced(module):
            return None
        kind = _computes(module)
        linear = kind is nn.Linear or is_hf_conv1d(module)
        if linear and cast(Tensor, module.weight).dim() != 2:
            return None  # flattened, to be sharded
        if kind is nn.Linear:
            out_features, in_features = cast(Tensor, module.weight).shape
            return cls(
                kind="linear",
                in_channels=in_features,
                out_channels=out_features,
                bias=module.bias is not None,
            )
        if is_hf_conv1d(module):
            in_features, out_features = cast(Tensor, module.weight).shape
            return cls(
                kind="hf_conv1d", in_channels=in_features, out_channels=out_features, bias=True
            )
        if kind is not None:
            conv: Any = module
            dims = conv.weight.dim() - 2
            if dims < 1:
                return None  # flattened, to be sharded
            return cls(
                kind="conv" if kind in _CONV.values() else "conv_transpose",
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                bias=conv.bias is not None,
                kernel_size=_each(conv.kernel_size, dims),
                stride=_each(conv.stride, dims),
                padding=conv.padding
                if isinstance(conv.padding, str)
                else _each(conv.padding, dims),
                dilation=_each(conv.dilation, dims),
                output_padding=_each(conv.output_padding, dims),
                groups=conv.groups,
                padding_mode=conv.padding_mode,
            )
        return None

    def build(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Build the torch module that this describes, with uninitialised parameters.

        A Hugging Face `Conv1D` is built as the `nn.Linear` that computes the same.
        """
        # skip_init: the caller fills the parameters; no random numbers are drawn
        if self.kind in ("linear", "hf_conv1d"):
            return nn.utils.skip_init(
                nn.Linear,
                self.in_channels,
                self.out_channels,
                bias=self.bias,
                device=device or "cpu",
                dtype=dtype,
            )
        options: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias,
            "padding_mode": self.padding_mode,
            "device": device or "cpu",
            "dtype": dtype,
        }
        module: type[nn.Module] = _CONV[self.dims]
        if self.kind == "conv_transpose":
            module = _CONV_TRANSPOSE[self.dims]
            options["output_padding"] = self.output_padding
        return nn.utils.skip_init(
            module, self.in_channels, self.out_channels, self.kernel_size, **options
        )

    def build_from(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The same with copies of these parameters, in eval mode."""
        layer = self.build(device=weight.device, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer.eval()

    def validate(self, name: str) -> None:
        """Raise `LayerError` where the numbers do not describe a possible layer.

        Args:
            name: the layer's name, for the message.
        """
        problem = self._problem()
        if problem:
            raise LayerError(f"layer {name!r}: impossible description: {problem}")

    def _problem(self) -> str | None:
        if self.kind not in KINDS:
            return f"kind {self.kind!r} is not one of {', '.join(KINDS)}"
        if self.in_channels < 1 or self.out_channels < 1 or self.groups < 1:
            return "channels and groups must be at least 1"
        if self.in_channels % self.groups or self.out_channels % self.groups:
            return f"groups={self.groups} does not divide the channels"
        convolution = self.kind.startswith("conv")
        if (self.dims not in _CONV) if convolution else (self.dims != 0):
            return f"{self.kind} with a kernel of {self.dims} dimensions"
        if self.padding_mode not in PADDING_MODES:
            return f"padding_mode {self.padding_mode!r}"
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                return f"padding {self.padding!r}"
        elif len(self.padding) != self.dims or any(p < 0 for p in self.padding):
            return f"padding {self.padding}"
        for field in ("kernel_size", "stride", "dilation"):
            value = getattr(self, field)
            if len(value) != self.dims or any(v < 1 for v in value):
                return f"{field} {value}"
        if len(self.output_padding) != self.dims or any(p < 0 for p in self.output_padding):
            return f"output_padding {self.output_padding}"
        return None
