"""Exact simplifications for inference: what two layers do in a row that one can do.

`torch.export` shows which layer's output goes where, whatever the forward pass looks like; the
changes are made to the modules themselves, so the result is still a model of the same class.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from rankprune.errors import ExportError, reason
from rankprune.factorize import swap
from rankprune.layers import LayerSpec
from rankprune.low_rank import LowRank, low_rank_layers
from rankprune.profile import ExampleInputs, arguments
from rankprune.schemes import SCHEMES

_LAYERS = {f"aten::{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)}
_LAYERS.add("aten::linear")


def fold(model: nn.Module, *, example_inputs: ExampleInputs, inplace: bool = False) -> nn.Module:
    """Make a trained model cheaper to run without changing its answers.

    Three things, each exact up to rounding: a BatchNorm goes into the layer before it (of a
    factorised layer, into the second factor); ranks whose factors are zero are cut out; and two
    linear layers, or a convolution and a 1×1 convolution, with nothing between them become one
    where that is smaller. ONNX exporters do the first by themselves, torch does not.

    The result is for inference: factorised layers are plain `nn.Sequential`, and it has no plan.

    Args:
        model: dense or factorised.
        example_inputs: what it is called with.
        inplace: change the model itself instead of a copy.

    Returns:
        The model in eval mode, with `nn.Identity` where something went into another layer.

    Raises:
        ExportError: torch.export cannot follow the model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold(model, example_inputs=torch.zeros(1, 3, 4, 4))[1]
        Identity()
    """
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    for name, low_rank in low_rank_layers(model).items():
        swap(model, name, nn.Sequential(*_without_dead_ranks(low_rank)))
    holder: dict[str, str] = {}  # where a layer went that is no longer at its place
    with torch.no_grad():
        for first, second in _pairs(model, example_inputs):
            home = holder.get(first, first)
            merged = _merged(model.get_submodule(home), model.get_submodule(second))
            if merged is not None:
                swap(model, home, merged)
                swap(model, second, nn.Identity())
                holder[second] = home
    return model


def _pairs(model: nn.Module, inputs: ExampleInputs) -> list[tuple[str, str]]:
    """Layers that are alone in getting the output of another, both called once: (first, second)."""
    args, kwargs = arguments(inputs)
    try:
        program = torch.export.export(model, args, kwargs)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__}: {reason(error)}"
        ) from error
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[Any, str] = {}
    pairs = []
    for node in program.graph.nodes:
        operator = getattr(getattr(node.target, "_schema", None), "name", "")
        if operator not in _LAYERS and operator != "aten::batch_norm":
            continue
        # BatchNorm has a running mean even where it has no weight
        tensor = node.args[3 if operator == "aten::batch_norm" else 1]
        name = stored.get(getattr(tensor, "name", ""), "").rpartition(".")[0]
        if not name or len(tensor.users) > 1 or not _called(node, modules, name):
            continue
        source = node.args[0]
        # BatchNorm looks at the second dimension, which is not always a linear layer's outputs
        if operator == "aten::batch_norm" and _is_linear(source) and source.meta["val"].dim() != 2:
            continue
        if source in names and len(source.users) == 1:
            pairs.append((names[source], name))
        names[node] = name
    return pairs


def _called(node: Any, modules: dict[str, nn.Module], name: str) -> bool:
    """Whether it is the layer that computes this, not a model that takes its weight."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    caller = str(list(stack.values())[-1][0])
    return modules.get(caller) is modules[name]  # which may have several names


def _is_linear(node: Any) -> bool:
    return getattr(getattr(node.target, "_schema", None), "name", "") == "aten::linear"


def _merged(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """One layer that does what both do, or None where there is none or it is larger."""
    spec, then = LayerSpec.of(first), LayerSpec.of(second)
    if spec is None or not isinstance(first.weight, Tensor):
        return None
    weight, bias = first.weight, first.bias if isinstance(first.bias, Tensor) else None
    if isinstance(second, nn.modules.batchnorm._BatchNorm):
        return _with_norm(spec, weight, bias, second) if _only_norm(second) else None
    if then is None or not isinstance(second.weight, Tensor) or spec.groups > 1:
        return None
    same_kind = spec.kind == then.kind and spec.kind in ("linear", "conv")
    pointwise = LayerSpec.of(second) == replace(
        then,
        kernel_size=(1,) * then.dims,
        stride=(1,) * then.dims,
        padding=then.padding if isinstance(then.padding, str) else (0,) * then.dims,
        dilation=(1,) * then.dims,
        groups=1,
    )
    one = replace(spec, out_channels=then.out_channels, bias=spec.bias or then.bias)
    if not (same_kind and pointwise) or one.weight_numel > spec.weight_numel + then.weight_numel:
        return None
    mixing = second.weight.flatten(1)
    product = (mixing @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    shift = None if bias is None else mixing @ bias
    if isinstance(second.bias, Tensor):
        shift = second.bias if shift is None else shift + second.bias
    return one.build_from(product, shift)


def _only_norm(module: nn.Module) -> bool:
    """Not a subclass that goes on, as timm's with an activation does."""
    forward = getattr(module.forward, "__func__", None)
    return forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def _with_norm(
    spec: LayerSpec, weight: Tensor, bias: Tensor | None, norm: nn.modules.batchnorm._BatchNorm
) -> nn.Module | None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or (spec.kind == "conv_transpose" and spec.groups > 1):
        return None
    scale = torch.ones_like(mean) if norm.weight is None else norm.weight
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
    if spec.kind == "linear":
        fused = fuse_linear_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    elif spec.dims:
        fused = fuse_conv_bn_weights(
            weight,
            bias,
            mean,
            variance,
            norm.eps,
            scale,
            shift,
            transpose=spec.kind == "conv_transpose",
        )
    else:
        return None
    return replace(spec, bias=True).build_from(*fused)


def _without_dead_ranks(low_rank: LowRank) -> list[nn.Module]:
    """The two factors, without inner channels that carry nothing."""
    spec, scheme = low_rank.layer.spec, SCHEMES[str(low_rank.layer.scheme)]
    first, second = low_rank[0], low_rank[1]
    assert spec is not None
    assert isinstance(first.weight, Tensor)
    assert isinstance(second.weight, Tensor)
    left, right = scheme.factor_matrices(spec, first.weight.detach(), second.weight.detach())
    alive = (left.abs().amax((0, 1)) > 0) & (right.abs().amax((0, 2)) > 0)
    kept = torch.nonzero(alive).flatten()
    if len(kept) == len(alive):
        return [first, second]
    kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=alive.device)
    weights = scheme.factor_weights(spec, left[..., kept], right[:, kept])
    specs = scheme.factor_specs(spec, len(kept))
    bias = second.bias if isinstance(second.bias, Tensor) else None
    return [specs[0].build_from(weights[0], None), specs[1].build_from(weights[1], bias)]
