"""Which layers a model has, which of them can be factorised, and why the others cannot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rankprune.errors import naming
from rankprune.layers import LayerSpec, forward_is_replaced
from rankprune.linalg import check_finite, singular_values
from rankprune.moments import Moment
from rankprune.profile import Profile, factor_flops
from rankprune.ranks import Spectrum
from rankprune.schemes import Scheme
from rankprune.sharded import full_tensor, is_sharded
from rankprune.whitening import Whitened

# These read their sub-layers' weights directly, so a replaced sub-layer would never be called.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Assessment(NamedTuple):
    """A layer under a scheme.

    Attributes:
        spectrum: singular values of the weight, or of the outputs where calibrated.
        kept: share of their energy that rank 1, 2, … keeps.
        worth: what losing all of it costs; layers that were calibrated by sensitivity share units.
    """

    spectrum: Spectrum
    kept: Tensor
    worth: float


@dataclass(frozen=True)
class Site:
    """A parametrised layer of a model, at the first of its names.

    Attributes:
        name: qualified name.
        module: the layer.
        spec: its numbers, or None where its type is not supported.
        obstacle: why it cannot be factorised; empty where it can.
        tied: names of further layers that hold the same weight.
        dense_params: parameters, those shared within the site once.
        dense_flops: FLOPs of all its calls, or None where not measured.
        input_shapes: what it is called with, one entry a call.
        moment: second moments of its inputs, where it was calibrated.
    """

    name: str
    module: nn.Module
    spec: LayerSpec | None
    obstacle: str
    tied: tuple[str, ...]
    dense_params: int
    dense_flops: int | None
    input_shapes: tuple[tuple[int, ...], ...]
    moment: Moment | None = None

    @property
    def weight(self) -> Tensor:
        """The layer's weight, detached; all processes must ask for a sharded one."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return full_tensor(weight.detach())

    def bias_params(self) -> int:
        """Parameters that factorising does not touch."""
        assert self.spec is not None
        return self.dense_params - self.spec.weight_numel

    def spectrum(self, scheme: Scheme) -> Spectrum:
        """Singular values under a scheme: of the weight, or of the outputs where calibrated.

        Raises:
            NumericsError: the weight holds NaN or infinity.
        """
        return self.assess(scheme).spectrum

    def assess(self, scheme: Scheme) -> Assessment:
        """What low rank costs under a scheme.

        Raises:
            NumericsError: the weight holds NaN or infinity, or cannot be decomposed.
            LayerError: the moments are those of another layer, or the weight is on the meta device.
        """
        assert self.spec is not None
        weight = self.weight
        with naming(self.name):
            if self.moment is not None:
                whitened = Whitened(self.spec, scheme, weight, self.moment, self.name)
                return Assessment(whitened.spectrum(), 1 - whitened.errors()[1:], whitened.worth())
            check_finite(weight, self.name)
            values = singular_values(scheme.to_matrix(self.spec, weight))
            spectrum = Spectrum(values, scheme.matrix_shape(self.spec))
            return Assessment(spectrum, spectrum.energy(), 1.0)

    def unit_flops(self, scheme: Scheme) -> int | None:
        """FLOPs that one unit of rank costs, or None where not measured."""
        assert self.spec is not None
        if self.dense_flops is None:
            return None
        return factor_flops(scheme.factor_specs(self.spec, 1), self.input_shapes)


def tensor_key(tensor: Tensor) -> tuple[str, int]:
    """Identity of a tensor's memory, to find tied weights; of the object where it has none."""
    address = 0 if tensor.is_meta else tensor.data_ptr()
    return ("memory", address) if address else ("object", id(tensor))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Not a vector with sides of one, such as a scale [channels, 1, 1]."""
    return sum(side != 1 for side in parameter.shape) >= 2


def survey(
    model: nn.Module,
    cost: Profile | None = None,
    moments: Mapping[str, Moment] | None = None,
) -> list[Site]:
    """List every layer with a matrix-like parameter, in the model's order.

    Layers with vectors alone (normalisation, scales) are not listed. A module that stands at
    several names is one site; so are supported layers of one description that share one weight.

    Args:
        model: any module.
        cost: its profile, where example inputs are at hand.
        moments: of the layers' inputs, by name, where the model was calibrated.
    """
    parents = {
        f"{prefix}.{child}" if prefix else child: module
        for prefix, module in model.named_modules()
        for child, _ in module.named_children()
    }
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if any(map(_is_matrix, _own_parameters(module)))
        or LayerSpec.of(module) is not None
        or is_parametrized(module)
    }
    owners: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name, module in layers.items():
        for parameter in _own_parameters(module):
            owners[tensor_key(parameter)].append(name)
    merged: set[str] = set()
    sites = []
    for name, module in layers.items():
        if name in merged:
            continue
        spec = LayerSpec.of(module)
        obstacle = _obstacle(module, spec, parents.get(name))
        if not name and not obstacle:
            obstacle = "the model is this one layer; wrap it in nn.Sequential to factorise it"
        tied: tuple[str, ...] = ()
        if spec is not None and not obstacle:
            assert isinstance(module.weight, Tensor)
            tied = tuple(other for other in owners[tensor_key(module.weight)] if other != name)
            odd = next((other for other in tied if not _twins(module, layers[other])), None)
            if odd is not None:
                obstacle, tied = f"weight is shared with {odd} ({_type(layers[odd])})", ()
        merged.update(tied)
        names = (name, *tied)
        flops, shapes = _measured(cost, names)
        if cost is not None and not obstacle and not shapes:
            obstacle = "not called in the forward pass (unused, or its weight is read directly)"
        if shapes and any(not shape for shape in shapes):
            obstacle = obstacle or "called without a tensor"
        sites.append(
            Site(
                name=name,
                module=module,
                spec=spec,
                obstacle=obstacle,
                tied=tied,
                dense_params=_count(layers[member] for member in names),
                dense_flops=flops,
                input_shapes=shapes,
                moment=(moments or {}).get(name),
            )
        )
    return sites


def _twins(one: nn.Module, other: nn.Module) -> bool:
    """Whether layers of one memory compute the same: a transposed weight shares it too."""
    weights = one.weight, other.weight
    assert isinstance(weights[0], Tensor)
    return (
        isinstance(weights[1], Tensor)
        and LayerSpec.of(one) == LayerSpec.of(other)
        and (is_sharded(weights[0]) or weights[0].stride() == weights[1].stride())
    )


def _type(value: object) -> str:
    return type(value).__name__


def _obstacle(module: nn.Module, spec: LayerSpec | None, parent: nn.Module | None) -> str:
    if is_parametrized(module):
        return "weight is parametrised (torch.nn.utils.parametrize)"
    if spec is None:
        if forward_is_replaced(module):
            return f"the forward of this {_type(module)} is replaced"
        return f"{_type(module)} is not supported"
    if not math.prod(spec.weight_shape):
        return "the weight is empty"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "weight is not a parameter (weight_norm or pruning is active)"
    bias = module.bias
    if bias is not None and not isinstance(bias, nn.Parameter):
        return "bias is not a parameter (weight_norm or pruning is active)"
    if tuple(weight.shape) != spec.weight_shape:
        return f"weight has shape {tuple(weight.shape)}, the layer's attributes say otherwise"
    if not weight.is_floating_point():
        return f"weight has dtype {str(weight.dtype).removeprefix('torch.')}"
    if is_traceable_wrapper_subclass(weight) and not is_sharded(weight):
        return f"the weight is quantised ({_type(weight)}); factorise first, then quantise"
    if isinstance(parent, _READS_WEIGHTS):
        return f"{_type(parent)} reads this weight directly"
    return ""


def _measured(
    cost: Profile | None, names: tuple[str, ...]
) -> tuple[int | None, tuple[tuple[int, ...], ...]]:
    if cost is None:
        return None, ()
    found = [cost.layers[name] for name in names if name in cost.layers]
    shapes = tuple(shape for layer in found for shape in layer.input_shapes)
    return sum(layer.flops for layer in found), shapes


def _count(modules: Iterable[nn.Module]) -> int:
    unique = {
        tensor_key(parameter): parameter.numel()
        for module in modules
        for parameter in _own_parameters(module)
    }
    return sum(unique.values())
