"""A factorised layer, and those that a model has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from rankprune.plan import LayerPlan, Plan
from rankprune.profile import count_params
from rankprune.schemes import SCHEMES


class LowRank(nn.Sequential):
    """A factorised layer: two plain torch layers in a row, and the plan that they come from.

    Attributes:
        layer: what was planned for the layer.
    """

    def __init__(self, first: nn.Module, second: nn.Module, layer: LayerPlan) -> None:
        super().__init__(first, second)
        self.layer = layer

    def extra_repr(self) -> str:
        return f"scheme={self.layer.scheme}, rank={self.layer.rank}"

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As the dense layer: only transposed convolutions are asked for an output size."""
        if output_size is None:
            return super().forward(input)
        for factor in self:
            if isinstance(factor, _ConvTransposeNd):
                input = factor(input, _own_size(factor, input, output_size))
            else:
                input = factor(input)
        return input

    @property
    def weight(self) -> Tensor:
        """The dense layer's weight, for code that reads it instead of calling the layer."""
        # a compiler drops a product of which only the dtype is used
        return self.product() if torch.compiler.is_compiling() else ReadWeight.of(self)

    @property
    def bias(self) -> nn.Parameter | None:
        """The dense layer's bias."""
        bias = self[1].bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return bias

    def __getattr__(self, name: str) -> Any:
        # not self.layer: while a copy is unpickled it has none
        layer: LayerPlan | None = self.__dict__.get("layer")
        if layer is not None and layer.spec is not None and name in layer.spec.attributes:
            return layer.spec.attributes[name]
        return super().__getattr__(name)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight of the dense layer that computes the same, in that layer's shape."""
        return self.product()

    def product(self) -> Tensor:
        """The same, with gradients to the factors."""
        spec, scheme = self.layer.spec, SCHEMES[str(self.layer.scheme)]
        assert spec is not None
        first, second = weight_of(self[0]), weight_of(self[1])
        working = first.dtype if first.dtype == torch.float64 else torch.float32
        left, right = scheme.factor_matrices(spec, first.to(working), second.to(working))
        return scheme.from_matrix(spec, left @ right).to(first.dtype)


def _own_size(factor: _ConvTransposeNd, input: Tensor, wanted: Sequence[int]) -> list[int]:
    """What is wanted along the axes that this factor changes; the others stay as they are."""
    here = input.shape[-len(factor.stride) :]
    axes = zip(factor.kernel_size, factor.stride, factor.padding, strict=True)
    return [
        side if axis == (1, 1, 0) else size
        for side, size, axis in zip(here, wanted[-len(here) :], axes, strict=True)
    ]


class ReadWeight(Tensor):
    """`LowRank.weight`: multiplied out only where something computes with it.

    Most code that reads a layer's weight asks for its dtype, device or shape and nothing else.
    """

    _low_rank: LowRank

    @classmethod
    def of(cls, low_rank: LowRank) -> ReadWeight:
        """The weight of a factorised layer."""
        spec = low_rank.layer.spec
        assert spec is not None
        # one number that looks like the whole weight: the right dtype, device and shape for nothing
        weight = weight_of(low_rank[0]).new_full((), torch.nan).expand(spec.weight_shape)
        read = weight.as_subclass(cls)
        read._low_rank = low_rank
        return read

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DESCRIPTIONS:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(
            cls, lambda read: read._low_rank.product(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


_DESCRIPTIONS: set[Any] = {
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.is_floating_point,
}


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The factorised layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def plan_of(model: nn.Module) -> Plan:
    """The plan of a factorised model's `LowRank` layers; layers left dense are not listed."""
    # names as they are here: the model may be a part of the one that was factorised, or hold it
    sharing: defaultdict[int, list[str]] = defaultdict(list)
    found = low_rank_layers(model)
    for name, low_rank in found.items():
        sharing[id(low_rank[0].weight)].append(name)
    layers = [
        replace(found[first].layer, name=first, tied=tuple(tied))
        for first, *tied in sharing.values()
    ]
    saved = sum(layer.dense_params - layer.params for layer in layers)
    return Plan(layers=tuple(layers), dense_params=count_params(model) + saved)


def weight_of(module: nn.Module) -> nn.Parameter:
    """A layer's weight."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
