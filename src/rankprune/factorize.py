"""Dense layers to factors and back: the only module that swaps modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.calibrate import Stats, check_stats
from rankprune.errors import ConfigError, NumericsError, PlanError, naming, near
from rankprune.layers import LayerSpec
from rankprune.linalg import Decomposition, check_finite
from rankprune.low_rank import LowRank, low_rank_layers, weight_of
from rankprune.moments import Moment
from rankprune.plan import LayerPlan, Plan
from rankprune.schemes import SCHEMES
from rankprune.sharded import is_sharded
from rankprune.survey import tensor_key
from rankprune.whitening import Whitened

# what torch keeps of a module's hooks
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def factorize(
    model: nn.Module, plan: Plan, *, stats: Stats | None = None, inplace: bool = False
) -> nn.Module:
    """Replace the planned layers by their factors, by truncated SVD of their weights.

    Singular values are split √σ to each side. Device, dtype, mode and `requires_grad` are kept.

    Args:
        model: the dense model that the plan was made for.
        plan: from `make_plan` or a controller's `finish`.
        stats: from `calibrate`; the error of the layers' outputs on those inputs is made least,
            instead of the weights', and what is left of its mean is taken back by the layer's bias
            or else by the running mean of the BatchNorm that its output goes to. Not after
            training to the plan's ranks: nothing is lost there.
        inplace: change the model itself instead of a copy.

    Returns:
        The model with `LowRank` layers.

    Raises:
        PlanError: a planned layer is missing or has another shape.
        NumericsError: a weight holds NaN or infinity.
        ConfigError: the stats are of another model.

    Example:
        >>> import torch
        >>> from rankprune import FixedRank, make_plan
        >>> model = nn.Sequential(nn.Linear(32, 32))
        >>> compact = factorize(model, make_plan(model, FixedRank(4)))
        >>> sum(p.numel() for p in compact.parameters())
        288
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            "the model is wrapped by DistributedDataParallel, which knows the dense weights: "
            "factorise model.module, then wrap the result"
        )
    layers = check_plan(model, plan.factorized)
    for entry in plan.factorized:
        check_finite(weight_of(layers[entry.name]), entry.name)
    stats = check_stats(model, stats)
    if not inplace:
        model = copy.deepcopy(model)
    for entry in plan.factorized:
        moment = stats.moments.get(entry.name)
        before = weight_of(model.get_submodule(entry.name)).detach()
        _factorize_layer(model, entry, moment)
        if moment is not None and moment.centred:
            _keep_mean(model, entry, before, moment, stats.norms.get(entry.name))
    _mark_unprepared(model)
    return model


class Unprepared:
    """Stands where transformers looks before it saves a model, and lets it save none.

    It would write the factors without the plan, and load random weights in their place. Adapters
    are saved alone, and may be.
    """

    is_compileable = is_trainable = True

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What transformers picks the adapters' weights from."""
        return model.state_dict(), {}

    @property
    def quantization_config(self) -> Any:
        """What transformers asks for to say that the model cannot be saved.

        Raises:
            ConfigError: always; it tells what to do.
        """
        raise ConfigError(
            "a factorised model is saved by transformers after "
            "rankprune.integrations.huggingface.prepare(model); rankprune.save saves it as it is"
        )


def factor_skeleton(model: nn.Module, layers: Iterable[LayerPlan]) -> None:
    """Replace layers by factors with uninitialised weights, in place; a loader fills them."""
    for entry in layers:
        dense = model.get_submodule(entry.name)
        weight = weight_of(dense)
        factors = [spec.build(device=weight.device, dtype=weight.dtype) for spec in entry.factors()]
        for parameter in (p for factor in factors for p in factor.parameters()):
            parameter.requires_grad_(weight.requires_grad)
        _place(model, entry, factors[0], factors[1])
    _mark_unprepared(model)


def _mark_unprepared(model: nn.Module) -> None:
    for module in model.modules():
        if not hasattr(module, "save_pretrained") or not low_rank_layers(module):
            continue
        if getattr(module, "hf_quantizer", None) is None:
            # mypy knows no such attribute of a module
            setattr(module, "hf_quantizer", Unprepared())  # noqa: B010


def defactorize(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace `LowRank` layers by the dense layers that compute the same.

    Args:
        model: a factorised model.
        inplace: change the model itself instead of a copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    composed: dict[int, nn.Parameter] = {}  # dense weights, by the factors that tied layers share
    for name, low_rank in low_rank_layers(model).items():
        spec = low_rank.layer.spec
        assert spec is not None
        weight = weight_of(low_rank[0])
        dense = spec.build(device=weight.device, dtype=weight.dtype)
        if id(weight) in composed:
            dense.weight = composed[id(weight)]
        else:
            values = low_rank.dense_weight()
            # a Hugging Face Conv1D comes back as nn.Linear, whose weight is transposed
            _set(dense, "weight", values.T if spec.kind == "hf_conv1d" else values, weight)
            composed[id(weight)] = weight_of(dense)
        bias = low_rank[1].bias
        if isinstance(bias, nn.Parameter):
            dense.bias = bias
        dense.train(low_rank.training)
        swap(model, name, dense)
    for module in model.modules():
        if isinstance(getattr(module, "hf_quantizer", None), Unprepared):
            del module.hf_quantizer
    return model


def check_plan(model: nn.Module, layers: Iterable[LayerPlan]) -> dict[str, nn.Module]:
    """Find the planned layers in a model.

    Raises:
        PlanError: a layer is missing, has another type or shape than planned, or does not share
            the weight that it is planned to share.
    """
    modules = dict(model.named_modules())
    found = {}
    for layer in layers:
        for name in (layer.name, *layer.tied):
            if name not in modules:
                raise PlanError(
                    f"the plan's layer {name!r} is not in the model; {near(name, modules)}; "
                    "was the plan made for another model?"
                )
            spec = LayerSpec.of(modules[name])
            if spec != layer.spec:
                raise PlanError(
                    f"layer {name!r} does not fit the plan: planned {_brief(layer.spec)}, the "
                    f"model has {_brief(spec) if spec else type(modules[name]).__name__}"
                )
            found[name] = modules[name]
            weight = modules[name].weight
            if not isinstance(weight, nn.Parameter):
                raise PlanError(f"layer {name!r}: its weight is not a parameter of its own")
            first = weight_of(found[layer.name])
            alike = is_sharded(weight) or weight.stride() == first.stride()
            if tensor_key(weight) != tensor_key(first) or not alike:
                raise PlanError(
                    f"layers {layer.name!r} and {name!r} share one weight in the plan, but not in "
                    "the model; was the plan made for another model?"
                )
    return found


def _brief(spec: LayerSpec | None) -> str:
    if spec is None:
        return "an unsupported layer"
    options = f", stride {spec.stride}, groups {spec.groups}" if spec.dims else ""
    bias = "" if spec.bias else ", no bias"
    return f"{spec.kind} with weight {spec.weight_shape}{options}{bias}"


def _factorize_layer(model: nn.Module, entry: LayerPlan, moment: Moment | None) -> None:
    scheme, spec, rank = SCHEMES[str(entry.scheme)], entry.spec, entry.rank
    assert spec is not None
    assert rank is not None
    dense = model.get_submodule(entry.name)
    weight = weight_of(dense)
    with torch.no_grad(), naming(entry.name):
        if moment is not None:
            left, right = Whitened(spec, scheme, weight, moment, entry.name).factors(rank)
        else:
            matrix = scheme.to_matrix(spec, weight.detach())
            left, right = Decomposition(matrix).truncate(rank).balanced()
        weights = [w.to(weight.dtype) for w in scheme.factor_weights(spec, left, right)]
        if not all(torch.isfinite(factor).all() for factor in weights):
            raise NumericsError(
                f"layer {entry.name!r}: its factors are out of the range of {weight.dtype}: its "
                f"largest weight is {weight.abs().max().item():.3g}; scale it down, or use fp64"
            )
    factors = []
    for factor_spec, values in zip(entry.factors(), weights, strict=True):
        factor = factor_spec.build(device=weight.device, dtype=weight.dtype)
        _set(factor, "weight", values, weight)
        factors.append(factor)
    _place(model, entry, factors[0], factors[1])


@torch.no_grad()
def _keep_mean(
    model: nn.Module, entry: LayerPlan, weight: Tensor, moment: Moment, norm: str | None
) -> None:
    """Take the mean error of a layer's output back, in its bias or in the BatchNorm after it.

    Args:
        model: with the layer factorised.
        entry: the layer.
        weight: what it was before.
        moment: of its inputs.
        norm: the BatchNorm that its output goes to.
    """
    mended: list[nn.Parameter] = []
    for name in (entry.name, *entry.tied):
        low_rank = model.get_submodule(name)
        assert isinstance(low_rank, LowRank)
        lost = weight.double() - low_rank.product().double()
        assert entry.spec is not None
        lost = lost.T if entry.spec.kind == "hf_conv1d" else lost
        by_group = lost.reshape(moment.groups, -1, moment.features)  # [g, N/g, D]
        shift = (by_group @ moment.mean().to(lost.device).unsqueeze(-1)).flatten()
        if low_rank.bias is not None:
            if not any(low_rank.bias is bias for bias in mended):
                low_rank.bias.add_(shift.to(low_rank.bias.dtype))
                mended.append(low_rank.bias)
        elif norm is not None:
            mean = model.get_submodule(norm).running_mean
            if isinstance(mean, Tensor):  # where it has none, it takes the batch's
                mean -= shift.to(mean.dtype)


def _place(model: nn.Module, entry: LayerPlan, first: nn.Module, second: nn.Module) -> None:
    """Put factors in place of a layer and of those tied to it; biases go over as they are."""
    for name in (entry.name, *entry.tied):
        dense = model.get_submodule(name)
        head, tail = first, second
        if name != entry.name:
            head, tail = _sharing(first), _sharing(second)
        if tail.bias is not None:
            bias = dense.bias
            assert isinstance(bias, nn.Parameter)
            tail.bias = bias
        low_rank = LowRank(head, tail, entry)
        low_rank.train(dense.training)
        swap(model, name, low_rank)


def _sharing(module: nn.Module) -> nn.Module:
    """A module of the same kind that holds the same weight."""
    spec = LayerSpec.of(module)
    weight = weight_of(module)
    assert spec is not None
    twin = spec.build(device=weight.device, dtype=weight.dtype)
    twin.weight = weight
    return twin


def _set(module: nn.Module, name: str, values: Tensor, like: nn.Parameter) -> None:
    """Own, contiguous parameter with the dtype and requires_grad of another."""
    # a view would keep the whole SVD alive, and be saved with it
    own = values.to(like.dtype).clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(own, requires_grad=like.requires_grad))


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a module at every place where the model holds it; hooks go over to the new one."""
    old = model.get_submodule(name)
    for kind in _HOOKS:
        # the very same mapping, by which its handles remove a hook
        setattr(new, kind, getattr(old, kind))
    for parent in model.modules():
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new
