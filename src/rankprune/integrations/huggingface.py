"""Factorised transformers models in Hugging Face's own files.

After `prepare` a model's `save_pretrained` and `push_to_hub` write folders that `from_pretrained`
reads, wherever this module has been imported. The plan travels in `config.json`, where
transformers keeps what it calls the quantization config; from it the loader here builds the
`LowRank` layers before transformers reads the weights into them.

Without this module transformers would only warn of an unknown quantization, build dense layers
and fill those with random numbers. So each factorised layer's `weight` is stored too: one number,
its rank. It fits no dense layer, and transformers refuses to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.errors import ConfigError, MissingExtraError, PlanError
from rankprune.factorize import Unprepared, check_plan, factor_skeleton
from rankprune.low_rank import low_rank_layers, plan_of
from rankprune.plan import LayerPlan, Plan

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise  # it is installed, but lacks something itself
    raise MissingExtraError("loading from the Hub", "transformers", "transformers") from None

_METHOD = "rankprune"


def prepare(model: nn.Module) -> PreTrainedModel:
    """Make a factorised model ready for `save_pretrained` and `push_to_hub`, in place.

    A model that `from_pretrained` has loaded with this module is ready as it is.

    Args:
        model: a transformers model with `LowRank` layers.

    Returns:
        The model.

    Raises:
        ConfigError: it is no transformers model, or is quantised already.
        PlanError: no layer is factorised.

    Example:
        >>> import rankprune as rp
        >>> from rankprune.integrations.huggingface import prepare
        >>> from transformers import BertConfig, BertModel
        >>> small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> model = BertModel(BertConfig(**small, intermediate_size=64, vocab_size=9))
        >>> compact = prepare(rp.factorize(model, rp.make_plan(model, rp.FixedRank(4))))
        >>> compact.config.quantization_config.quant_method
        'rankprune'
        >>> compact.save_pretrained("out")  # doctest: +SKIP
        >>> compact = BertModel.from_pretrained("out")  # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"only transformers models can be prepared, got {type(model).__name__}; "
            "save others with rankprune.save"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, (RankPruneQuantizer, Unprepared)):
        method = quantizer.quantization_config.quant_method
        raise ConfigError(
            f"{type(model).__name__} is quantised already ({getattr(method, 'value', method)}), "
            "and its config.json has room for one method; factorise the unquantised model"
        )
    config = _describe(model)
    # mypy knows no such attribute of a model
    setattr(model, "hf_quantizer", RankPruneQuantizer(config))  # noqa: B010
    return model


@register_quantization_config(_METHOD)
class RankPruneConfig(QuantizationConfigMixin):
    """The plan, as `quantization_config` in `config.json`.

    Attributes:
        quant_method: "rankprune".
        plan: what the model's layers were factorised to, by their names in the saved model.
    """

    def __init__(self, plan: Plan) -> None:
        self.quant_method: Any = _METHOD
        self.plan = plan

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read it out of a parsed `config.json`, believing nothing.

        Raises:
            PlanError: there is no plan, or a malformed one.
        """
        source = "config.json: quantization_config"
        if "plan" not in config_dict:
            raise PlanError(f"{source}: 'plan' is missing; get a fresh copy of config.json")
        config = cls(Plan.from_json(json.dumps(config_dict["plan"]), source))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for `config.json`."""
        return {"quant_method": _METHOD, "plan": json.loads(self.plan.to_json())}


@register_quantizer(_METHOD)
class RankPruneQuantizer(HfQuantizer):
    """Builds the factorised layers before transformers loads their weights.

    Raises:
        PlanError: the plan does not fit the model, or the weights not the plan.
    """

    quantization_config: RankPruneConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            raise PlanError(
                f"from_pretrained cannot factorise a dense {type(model).__name__}; load it, then "
                "call rankprune.factorize"
            )
        layers = _fitted(self.quantization_config.plan.factorized, model)
        # weights are shared only after they were read
        named = [(layer, name) for layer in layers for name in (layer.name, *layer.tied)]
        check_plan(model, [replace(layer, name=name, tied=()) for layer, name in named])
        factor_skeleton(model, layers)
        _tie(model, layers)
        # the stored ranks have done their work; the checkpoint may name them without the prefix
        prefix = f"{model.base_model_prefix}."
        names = (re.escape(name.removeprefix(prefix)) for _, name in named)
        ranks = {rf"(^|\.){name}\.weight$" for name in names}
        model._keys_to_ignore_on_load_unexpected = ranks.union(
            model._keys_to_ignore_on_load_unexpected or ()
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, low_rank in low_rank_layers(model).items():
            for key, parameter in low_rank.named_parameters():
                # weights that are offloaded to disk or CPU memory stay on meta
                if not (getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta):
                    raise PlanError(
                        f"layer {name!r}: the checkpoint holds no {key!r} of shape "
                        f"{tuple(parameter.shape)}, as the plan in its config.json says; "
                        "the weights are another model's, or were not factorised"
                    )
        if low_rank_layers(model):
            _describe(model)  # by the names in this class
        else:  # only parts that this class lacks were factorised
            self.remove_quantization_config(model)
        # nothing is quantised: half(), float() and the Trainer work as on any model
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights to save, and with them the ranks that stop other loaders."""
        config = _describe(model)  # it may have changed since
        state = state_with_ranks(model)
        for twin in _twins(config.plan.layers):
            del state[twin]
        tied = model.all_tied_weights_keys
        seen: set[int] = set()
        for name in low_rank_layers(model):
            key = f"{name}.1.bias"
            if key not in state:
                continue
            if key in tied or f"{name}.bias" in tied:
                del state[key]  # read as another layer's
            elif state[key].data_ptr() in seen:
                state[key] = state[key].clone()  # transformers writes no tensor twice
            else:
                seen.add(state[key].data_ptr())
        return state, {}

    def is_serializable(self) -> bool:
        """True: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the factors are plain parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the factors are plain torch layers."""
        return True


def state_with_ranks(model: nn.Module) -> dict[str, Tensor]:
    """A model's state, and as each factorised layer's `weight` its rank: it fits no dense one."""
    state = model.state_dict()
    for name, low_rank in low_rank_layers(model).items():
        state[f"{name}.weight"] = torch.tensor([low_rank.layer.rank])
    return state


def _describe(model: PreTrainedModel) -> RankPruneConfig:
    """Write the plan into the model's config, and those of its parts into the parts' own.

    Where a class is one part of the saved model, such as `CLIPVisionModel`, transformers reads
    nothing but that part's config.
    """
    plan = plan_of(model)
    if not plan.layers:
        raise PlanError(
            f"{type(model).__name__} has no factorised layer; factorise it first, or save it dense "
            "from a model that was not prepared"
        )
    config = model.config.quantization_config = RankPruneConfig(plan)
    for name in model.config.sub_configs:
        own = getattr(model.config, name, None)
        parts = [module for module in model.modules() if getattr(module, "config", None) is own]
        if own is not None and parts and low_rank_layers(parts[0]):
            own.quantization_config = RankPruneConfig(plan_of(parts[0]))
    return config


def _twins(layers: Iterable[LayerPlan]) -> dict[str, str]:
    """Factors that are another layer's too, by their names: that layer's."""
    return {
        f"{name}.{index}.weight": f"{layer.name}.{index}.weight"
        for layer in layers
        for name in layer.tied
        for index in (0, 1)
    }


def _tie(model: PreTrainedModel, layers: list[LayerPlan]) -> None:
    """Have transformers share factors where layers share them, as it does with embeddings."""
    gone = tuple(f"{name}." for layer in layers for name in (layer.name, *layer.tied))
    kept = model.all_tied_weights_keys
    # a bias that layers share is the second factor's
    biases = {
        target.removesuffix("bias") + "1.bias": source.removesuffix("bias") + "1.bias"
        for target, source in kept.items()
        if target.startswith(gone) and source.startswith(gone) and target.endswith(".bias")
    }
    others = {target: kept[target] for target in kept if not target.startswith(gone)}
    model.all_tied_weights_keys = others | biases | _twins(layers)


def _fitted(layers: tuple[LayerPlan, ...], model: PreTrainedModel) -> list[LayerPlan]:
    """The layers under their names in this model, which may be the saved one's base or hold it.

    Layers of another head, and those that the model's class says it ignores, are left out:
    transformers loads no weights for them either. Others that are missing stay, to be found so.
    """
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    with_head = any(layer.name.startswith(prefix) for layer in layers)
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ("(?!)",)))

    def here(name: str) -> str:
        # in transformers' own order
        candidates = (name.removeprefix(prefix), prefix + name)
        return next((candidate for candidate in candidates if candidate in modules), name)

    fitted = []
    for layer in layers:
        name = here(layer.name)
        other_head = with_head and not layer.name.startswith(prefix)
        if name in modules or not (other_head or ignored.search(f"{layer.name}.0.weight")):
            fitted.append(replace(layer, name=name, tied=tuple(map(here, layer.tied))))
    return fitted
