"""Depthwise convolutions without a channel multiplier, which is the kind that runtimes are fast at.

The depthwise half of a separable layer has r kernels a channel. ONNX Runtime and OpenVINO take that
for a grouped convolution like any other, and need up to twice as long as for r times as many
channels with one kernel each. Here the same is said in those terms: the input r times over, or the
sum of r parts of the output, and the 1×1 convolution beside it with its channels in that order.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rankprune.layers import LayerSpec
from rankprune.low_rank import LowRank


class Repeat(nn.Module):
    """All channels, and all of them again: [(B), C, …] to [(B), times · C, …]."""

    def __init__(self, times: int, dims: int) -> None:
        super().__init__()
        self.times = times
        self.axis = -dims - 1  # there may be no batch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.times, self.axis)


class SumOfParts(nn.Module):
    """[(B), parts · N, …] to [(B), N, …]."""

    def __init__(self, parts: int, dims: int) -> None:
        super().__init__()
        self.parts = parts
        self.axis = -dims - 1

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(operator.add, x.chunk(self.parts, self.axis))


def without_multipliers(model: nn.Module) -> None:
    """Make three layers of the model's pairs of a depthwise and a 1×1 convolution, in place."""
    for pair in _pairs(model):
        layers = unrolled(list(pair.children()))
        if layers is not None:
            pair._modules = {str(index): layer for index, layer in enumerate(layers)}


def has_multipliers(model: nn.Module) -> bool:
    """Whether that would change anything."""
    return any(unrolled(list(pair.children())) is not None for pair in _pairs(model))


def _pairs(model: nn.Module) -> list[nn.Module]:
    """What calls two layers in turn: nothing else can take more layers than it had."""
    found = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m) == 2]
    return [m for m in found if type(m).forward in (nn.Sequential.forward, LowRank.forward)]


@torch.no_grad()
def unrolled(layers: Sequence[nn.Module]) -> list[nn.Module] | None:
    """The same as three layers.

    Args:
        layers: a depthwise convolution with several kernels for each of its inputs and a 1×1
            convolution, or a 1×1 convolution and one that has several inputs for each output.

    Returns:
        The layers, with copies of the weights, or None where these are others.
    """
    specs = [LayerSpec.of(layer) for layer in layers]
    if len(specs) != 2 or any(spec is None or spec.kind != "conv" for spec in specs):
        return None
    first, second = layers
    spec, then = specs
    assert spec is not None
    assert then is not None
    if spec.groups == spec.in_channels < spec.out_channels and _pointwise(then):
        times = spec.out_channels // spec.groups
        order = _by_parts(times, spec.groups)
        depthwise = replace(spec, in_channels=spec.out_channels, groups=spec.out_channels)
        kernels, shift = _parameters(first)
        mixing, bias = _parameters(second)
        return [
            Repeat(times, spec.dims),
            depthwise.build_from(kernels[order], None if shift is None else shift[order]),
            then.build_from(mixing[:, order], bias),
        ]
    if then.groups == then.out_channels < then.in_channels and _pointwise(spec):
        parts = then.in_channels // then.groups
        order = _by_parts(parts, then.groups)
        depthwise = replace(then, out_channels=then.in_channels, groups=then.in_channels)
        mixing, shift = _parameters(first)
        kernels, bias = _parameters(second)
        if bias is not None:  # once, not with every part
            bias = torch.cat([bias, bias.new_zeros(depthwise.out_channels - len(bias))])
        return [
            spec.build_from(mixing[order], None if shift is None else shift[order]),
            depthwise.build_from(kernels.flatten(0, 1).unsqueeze(1)[order], bias),
            SumOfParts(parts, then.dims),
        ]
    return None


def _pointwise(spec: LayerSpec) -> bool:
    plain = isinstance(spec.padding, str) or not any(spec.padding)
    return {*spec.kernel_size, *spec.stride, spec.groups} == {1} and plain


def _by_parts(parts: int, channels: int) -> Tensor:
    """Where channels c·parts + k go that come as k·channels + c."""
    return torch.arange(parts * channels).reshape(channels, parts).T.flatten()


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return weight, bias if isinstance(bias, Tensor) else None
