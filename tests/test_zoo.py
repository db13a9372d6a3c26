"""The networks that people use: one call plans them, one factorises them, one saves and one loads.

Every network of torchvision, and a choice of timm's and of Hugging Face's, stands in one table and
keeps one contract: each layer is factorised or has a reason, at full rank the answers stay, and a
loaded network differs by nothing. Weights are random; no file is fetched. Networks that are a
smaller one's layers in large take their turn with --full.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves
from torchvision import models

from cases import relative_error
from conftest import Trials
from rankprune import Plan, Ratio, factorize, load, make_plan, profile, save
from rankprune.low_rank import low_rank_layers
from rankprune.profile import ExampleInputs, call
from rankprune.schemes import applicable
from rankprune.survey import survey

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


_NONE = "(?!)"
# They take as long as all the rest, for weights that are replaced at once.
_INITIALISERS = [name for name in dir(nn.init) if re.fullmatch(r"[a-z]+_(uniform|normal)_", name)]
_INITIALISERS += ["uniform_", "normal_"]


@dataclass(frozen=True)
class Network:
    """A network and what it is called with.

    Attributes:
        id: its name in the library that it is from.
        build: a fresh one, with random weights.
        inputs: what it is called with.
        parts: the modules to compare, one by one and each on the same inputs, where a network sorts
            boxes by scores: rounding may swap two of them, which is no error.
        read: pattern of the layers whose weights its forward reads instead of calling them.
        unused: pattern of the layers that its forward does not need in eval mode.
    """

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], ExampleInputs]
    parts: tuple[str, ...] = ()
    read: str = _NONE
    unused: str = _NONE

    def blank(self) -> nn.Module:
        """In eval mode, with whatever its weights find in memory."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _INITIALISERS:
                patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
            return self.build().eval()

    def model(self) -> nn.Module:
        """In eval mode, with weights of the size that training gives them."""
        model = self.blank()
        _enliven(model, self.inputs())
        return model

    def answers(self, model: nn.Module, calls: Calls | None = None) -> list[Tensor]:
        """What the network returns; or its parts, each on what it was called with."""
        if calls is None:
            return _tensors(call(model, self.inputs()))
        parts = ((model.get_submodule(name), *called) for name, called in calls.items())
        return _tensors([part(*args, **kwargs) for part, args, kwargs in parts])

    def calls(self, model: nn.Module) -> Calls | None:
        """What its parts are called with."""
        if not self.parts:
            return None
        calls: Calls = {}

        def record(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(name, (args, kwargs))

        for name in self.parts:
            part = model.get_submodule(name)
            part.register_forward_pre_hook(functools.partial(record, name), with_kwargs=True)
        with torch.no_grad():
            call(model, self.inputs())
        for name in self.parts:
            model.get_submodule(name)._forward_pre_hooks.clear()
        assert list(calls) == list(self.parts)
        return calls


Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]


def _tensors(answers: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(answers) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.is_floating_point()]


@torch.no_grad()
def _enliven(model: nn.Module, inputs: ExampleInputs) -> None:
    """Initialisation leaves much at zero or nearly so; there a wrong layer would not be seen."""
    for name, parameter in model.named_parameters():
        if parameter.numel() > max(parameter.shape, default=1):
            fan_in = parameter.numel() / parameter.shape[0]
            parameter.normal_(0, 1.4 / fan_in**0.5)
        elif name.endswith("bias"):
            parameter.uniform_(-0.1, 0.1)
        else:
            parameter.uniform_(0.5, 1.0)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        # half of the initial statistics: two samples alone would have variances of nearly zero
        norm.momentum = 0.5
    if norms:
        call(model, inputs)
    for norm in norms:
        norm.eval()


# -- torchvision -----------------------------------------------------------------------------------

# Over 600 million parameters each: what happens to their layers is told by their shapes alone.
HUGE = ("vit_h_14", "regnet_y_128gf")
# Those of the others that take as long as most of them together, and have a smaller brother.
LARGE = re.compile(
    r"vgg1[369].*|vit_l_.*|convnext_(base|large)|regnet_[xy]_(16|32)gf|wide_resnet101_2"
    r"|efficientnet_(b[67]|v2_l)|swin(_v2|3d)?_b|densenet161|resnext101_.*|resnet152"
)
_SWIN = r".*\.attn\.(qkv|proj)"


def _image(side: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def _clip(frames: int, side: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(1, 3, frames, side, side, generator=torch.Generator().manual_seed(1))


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return functools.partial(models.get_model, name, weights=None, **options)


def _classification() -> Iterator[Network]:
    for name in models.list_models(module=models):
        side, options, read, unused = 64, {}, _NONE, _NONE
        if name in ("googlenet", "inception_v3"):
            side, options, unused = 96, {"init_weights": False}, r"(aux|AuxLogits).*"
        elif name.startswith("vit"):
            options = {"image_size": 64}
        elif name == "maxvit_t":
            side = 224
        elif name.startswith("swin"):
            read = _SWIN
        yield Network(name, _torchvision(name, **options), _image(side), read=read, unused=unused)


def _detection() -> Iterator[Network]:
    for name in models.list_models(module=models.detection):
        options: dict[str, Any] = {"num_classes": 3}
        parts: tuple[str, ...] = ("backbone", "head")
        if "rcnn" in name:
            # with random weights no box would pass for an object
            options |= {"box_score_thresh": 0.0, "box_detections_per_img": 4}
            options |= {"rpn_post_nms_top_n_test": 8, "min_size": 64, "max_size": 64}
            parts = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")
            for kind in ("mask", "keypoint"):
                if name.startswith(kind):
                    parts += (f"roi_heads.{kind}_head", f"roi_heads.{kind}_predictor")
        elif name.startswith("ssd"):
            options |= {"topk_candidates": 8}
        else:
            options |= {"topk_candidates": 8, "min_size": 64, "max_size": 64}
        yield Network(
            name,
            _torchvision(name, weights_backbone=None, **options),
            lambda: (list(_image(64)()),),
            parts,
        )


def _segmentation() -> Iterator[Network]:
    for name in models.list_models(module=models.segmentation):
        yield Network(name, _torchvision(name, weights_backbone=None), _image(64))


def _video() -> Iterator[Network]:
    for name in models.list_models(module=models.video):
        build, inputs, read = _torchvision(name), _clip(4, 64), _NONE
        if name == "s3d":
            build, inputs = _s3d, _clip(14, 64)
        elif name.startswith("mvit"):
            build = functools.partial(_mvit, name)
        elif name.startswith("swin"):
            read = _SWIN
        yield Network(name, build, inputs, read=read)
    for name in models.list_models(module=models.optical_flow):
        yield Network(name, _torchvision(name), _frames)


def _s3d() -> nn.Module:
    model = models.video.s3d()
    model.avgpool = nn.AvgPool3d(2, stride=1)  # 7×7 in place of 2×2 would ask for large frames
    return model


def _mvit(name: str) -> nn.Module:
    kind = models.video.MViT
    with pytest.MonkeyPatch.context() as patch:  # its functions fix the size

        def small(**options: Any) -> nn.Module:
            return kind(**options | {"spatial_size": (64, 64), "temporal_size": 4})

        patch.setattr(models.video.mvit, "MViT", small)
        return models.get_model(name, weights=None)


def _frames() -> ExampleInputs:
    # each update takes the last one's answer, and its rounding
    first, second = _image(128)().chunk(2)
    return {"image1": first, "image2": second, "num_flow_updates": 2}


# -- timm ------------------------------------------------------------------------------------------

_ONCE = {"layers": (1, 1, 1, 1)}
_SHALLOW = {"depths": (1, 1, 1, 1)}
_TINY_VIT = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 4}
_TIMM: dict[str, dict[str, Any]] = {
    "resnet18": _ONCE,
    "resnext50_32x4d": _ONCE,
    "resnet26d": {},
    "res2net50_14w_8s": _ONCE,
    "convnext_atto": _SHALLOW,
    "convnextv2_atto": _SHALLOW,
    "efficientnet_b0": {},
    "efficientnet_cc_b0_4e": {},
    "tf_efficientnet_lite0": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "ghostnet_050": {},
    "regnety_002": {},
    "densenet121": {},
    "dla46_c": {},
    "hrnet_w18_small": {},
    "vgg11": {},
    "test_nfnet": {},
    "vit_tiny_patch16_224": _TINY_VIT,
    "deit_tiny_distilled_patch16_224": _TINY_VIT,
    "beit_base_patch16_224": _TINY_VIT,
    "eva02_tiny_patch14_224": _TINY_VIT | {"img_size": 56},
    "swin_tiny_patch4_window7_224": _SHALLOW | {"img_size": 64, "window_size": 2, "embed_dim": 48},
    "swinv2_tiny_window8_256": _SHALLOW | {"img_size": 64, "window_size": 2, "embed_dim": 48},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "test_coatnet": {"img_size": 64},
    "test_maxvit": {"img_size": 64},
    "pvt_v2_b0": {},
    "poolformer_s12": {},
    "edgenext_xx_small": {},
    "levit_128s": {"img_size": 64},
    "xcit_nano_12_p16_224": {"depth": 2},
    "convit_tiny": {"img_size": 64, "depth": 2},
    "davit_tiny": _SHALLOW,
    "mobilevit_xxs": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
}
_TIMM_READ = {
    "beit_base_patch16_224": r".*\.qkv",
    "eva02_tiny_patch14_224": r".*\.qkv",
    "swinv2_tiny_window8_256": r".*\.qkv",
}


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def _timms() -> Iterator[Network]:
    for name, options in _TIMM.items():
        yield Network(
            f"timm:{name}",
            functools.partial(_timm, name, options),
            _image(options.get("img_size", 64)),
            read=_TIMM_READ.get(name, _NONE),
        )


# -- Hugging Face ----------------------------------------------------------------------------------

_BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_TEXT = _BODY | {
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_DECODER = _TEXT | {"num_key_value_heads": 2}
_VISION = _BODY | {"image_size": 32, "patch_size": 8}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
_SPEECH = _BODY | {
    "vocab_size": 100,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_WHISPER = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_DEBERTA = _TEXT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
}
_TOWERS = {
    "text_config": _TEXT | {"projection_dim": 24},
    "vision_config": _VISION | {"projection_dim": 24},
}


def _tokens(length: int = 9) -> Tensor:
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))


def _text() -> ExampleInputs:
    return {"input_ids": _tokens()}


def _pixels() -> ExampleInputs:
    return {"pixel_values": _image(32)()}


def _translation() -> ExampleInputs:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)}


def _sound() -> ExampleInputs:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))}


def _spectrogram() -> ExampleInputs:
    features = torch.randn(2, 16, 60, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens(5)}


def _pairs() -> ExampleInputs:
    return {"input_ids": _tokens(), "pixel_values": _image(32)()}


_HUGGING_FACE: tuple[tuple[str, str, dict[str, Any], Callable[[], ExampleInputs]], ...] = (
    ("bert", "BertForMaskedLM", _TEXT, _text),
    ("roberta", "RobertaForSequenceClassification", _TEXT, _text),
    ("distilbert", "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4}, _text),
    ("deberta-v2", "DebertaV2ForMaskedLM", _DEBERTA | {"share_att_key": False}, _text),
    (
        "deberta-v2 with shared keys",
        "DebertaV2ForSequenceClassification",
        _DEBERTA | {"share_att_key": True},
        _text,
    ),
    (
        "gpt2",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        _text,
    ),
    ("llama", "LlamaForCausalLM", _DECODER, _text),
    ("smollm", "LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}, _text),
    ("qwen2", "Qwen2ForCausalLM", _DECODER, _text),
    ("mistral", "MistralForCausalLM", _DECODER, _text),
    ("mixtral", "MixtralForCausalLM", _DECODER | {"num_local_experts": 4}, _text),
    ("mamba", "MambaForCausalLM", _TEXT | {"state_size": 8}, _text),
    ("t5", "T5ForConditionalGeneration", _T5, _translation),
    (
        "t5 v1.1",
        "T5ForConditionalGeneration",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _translation,
    ),
    ("vit", "ViTForImageClassification", _VISION, _pixels),
    ("dinov2", "Dinov2Model", _VISION, _pixels),
    ("clip", "CLIPModel", _TOWERS | {"projection_dim": 24}, _pairs),
    ("siglip", "SiglipModel", _TOWERS, _pairs),
    ("whisper", "WhisperForConditionalGeneration", _WHISPER, _spectrogram),
    ("wav2vec2", "Wav2Vec2ForCTC", _SPEECH, _sound),
)
_HF_READ = {"mamba": r".*\.(conv1d|dt_proj)"}


def _transformer(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def _hugging_face() -> Iterator[Network]:
    for name, kind, options, inputs in _HUGGING_FACE:
        build = functools.partial(_transformer, kind, options)
        read = _HF_READ.get(name, _NONE)
        yield Network(f"hf:{name}".replace(" ", "_"), build, inputs, read=read)


# -- the contract ----------------------------------------------------------------------------------

QUICK = {
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "regnet_y_400mf",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "lraspp_mobilenet_v3_large",
    "timm:resnext50_32x4d",
    "timm:convnext_atto",
    "timm:tf_efficientnet_lite0",
    "timm:mobilenetv3_small_050",
    "timm:test_nfnet",
    "timm:vit_tiny_patch16_224",
    "timm:swinv2_tiny_window8_256",
    "timm:test_coatnet",
    "hf:bert",
    "hf:deberta-v2_with_shared_keys",
    "hf:gpt2",
    "hf:smollm",
    "hf:mixtral",
    "hf:t5",
    "hf:clip",
    "hf:whisper",
    "hf:wav2vec2",
}
_GROUPS = (_classification, _detection, _segmentation, _video, _timms, _hugging_face)
ZOO = [network for group in _GROUPS for network in group() if network.id not in HUGE]


def _parametrised(networks: list[Network]) -> pytest.MarkDecorator:
    """The quick ones, and the others as slow tests."""
    marks = {network.id: () if network.id in QUICK else pytest.mark.slow for network in networks}
    return pytest.mark.parametrize(
        "network", [pytest.param(n, id=n.id, marks=marks[n.id]) for n in networks]
    )


def _repeated(model: nn.Module, largest: int = 800) -> dict[str, None]:
    """Overrides that leave dense what would take minutes and shows nothing new.

    That is the second and later layers of one description and one place, and the largest matrices.
    """
    places = {
        child: (type(module), name)
        for module in model.modules()
        for name, child in module.named_children()
    }
    seen = set()
    dense = {}
    for site in survey(model):
        if site.spec is None or site.obstacle:
            continue
        side = min(site.spec.in_channels, site.spec.out_channels) // site.spec.groups
        key = (places[site.module], site.spec)
        if key in seen or side * max(site.spec.kernel_size, default=1) > largest:
            dense[site.name] = None
        seen.add(key)
    return dense


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """Every matrix of the model belongs to a layer that has ranks or a reason."""
    assert all(layer.reason for layer in plan.layers)
    assert all(layer.dense != bool(layer.scheme and layer.rank) for layer in plan.layers)
    listed = {name for layer in plan.layers for name in (layer.name, *layer.tied)}
    for name, parameter in model.named_parameters():
        if sum(side > 1 for side in parameter.shape) > 1:
            assert name.rpartition(".")[0] in listed, name


def _check_factors(network: Network, compact: nn.Module, calls: Calls | None) -> None:
    """Every factor has its part in the answer, so none is passed by."""
    answers = [answer for answer in network.answers(compact, calls) if answer.requires_grad]
    sum((answer / answer.detach().abs().max()).square().mean() for answer in answers).backward()
    for name, low_rank in low_rank_layers(compact).items():
        if re.fullmatch(network.unused, name):
            continue
        for factor in low_rank:
            assert factor.weight.grad is not None, name
            assert factor.weight.grad.any(), name
    compact.zero_grad()


def _check_answers(received: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(received) == len(expected) > 0
    for one, other in zip(received, expected, strict=True):
        assert relative_error(one, other) <= tolerance


def _check_uncalled(network: Network, model: nn.Module) -> None:
    """Layers whose weights are read, or not used at all, are found: factors would bring nothing."""
    for site in survey(model, profile(model, network.inputs())):
        uncalled = site.obstacle.startswith("not called")
        if uncalled or not site.obstacle:
            pattern = f"{network.read}|{network.unused}"
            assert uncalled is bool(re.fullmatch(pattern, site.name)), site.name


def _check_contract(network: Network, folder: Path) -> None:
    model = network.model()
    plan = make_plan(model, Ratio(1.0), guard=False, overrides=_repeated(model))
    assert plan.factorized
    _check_plan(model, plan)

    compact = factorize(model, plan)
    # before it is called: RAFT keeps tensors of its last call, which torch does not copy
    copies = [copy.deepcopy(compact)]
    if not any(map(is_parametrized, compact.modules())):  # torch refuses to pickle those
        copies.append(pickle.loads(pickle.dumps(compact)))
    calls = network.calls(model)
    with torch.no_grad():
        expected = network.answers(model, calls)
        received = network.answers(compact, calls)
    _check_answers(received, expected, 1e-4)
    _check_factors(network, compact, calls)
    _check_uncalled(network, model)

    for again in copies:
        with torch.no_grad():
            _check_answers(network.answers(again, calls), received, 0.0)

    save(compact, folder, plan=plan)
    fresh = load(network.blank(), folder)
    with torch.no_grad():
        _check_answers(network.answers(fresh, calls), received, 0.0)
    names = [name for name, _ in compact.named_parameters()]
    assert names == [name for name, _ in fresh.named_parameters()]


@_parametrised(ZOO)
def test_plan_factorise_copy_save_and_load(
    network: Network, tmp_path: Path, trials: Trials
) -> None:
    """Networks of torchvision, timm and transformers keep the contract from plan to loaded file."""
    _leave_large(network, trials)
    with trials.one():
        _check_contract(network, tmp_path)


def _leave_large(network: Network, trials: Trials) -> None:
    if LARGE.fullmatch(network.id) and not trials.full:
        pytest.skip("large, and a smaller one's layers: --full")


def _convolutions() -> Iterator[Network]:
    """Those of torchvision's classifiers that have any to choose a scheme for."""
    for network in _classification():
        if network.id not in HUGE and not network.id.startswith("vit"):
            yield network


@_parametrised(list(_convolutions()))
def test_every_scheme_for_convolutions(network: Network, trials: Trials) -> None:
    """At full rank "auto" takes the cheapest scheme, which is one for nearly all layers."""
    _leave_large(network, trials)
    model = network.model()
    with torch.no_grad():
        expected = network.answers(model)
    dense = _repeated(model, largest=400)
    for site in survey(model):
        if site.spec is None or max(site.spec.kernel_size, default=1) == 1:
            dense[site.name] = None
    for scheme in ("channel", "spatial", "decoupled", "depthwise"):
        plan = make_plan(model, Ratio(1.0), guard=False, scheme=scheme, overrides=dense)
        compact = factorize(model, plan)
        with torch.no_grad():
            _check_answers(network.answers(compact), expected, 1e-4)


def _regnet_y_128gf() -> nn.Module:
    # torchvision computes its widths with tensors, and tensors on meta have no values
    params = models.regnet.BlockParams.from_init_params(27, 456, 160.83, 2.52, 264, se_ratio=0.25)
    with torch.device("meta"):
        return models.regnet.RegNet(params)


def _vit_h_14() -> nn.Module:
    with torch.device("meta"):
        return models.vit_h_14()


@pytest.mark.parametrize("build", [_regnet_y_128gf, _vit_h_14])
def test_layers_of_the_largest_networks_are_described(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e8
    sites = survey(model)
    described = [site for site in sites if not site.obstacle]
    assert all(applicable(site.spec, "auto")[0] for site in described if site.spec)
    assert sum(site.dense_params for site in described) > 4e8


# Models of these go through boxes, or through code that torch.export cannot follow.
_NOT_EXPORTED = {"fasterrcnn_mobilenet_v3_large_320_fpn", "hf:mixtral"}
EXPORTED = [network for network in ZOO if network.id in QUICK - _NOT_EXPORTED]


@pytest.mark.slow
@pytest.mark.parametrize("network", EXPORTED, ids=lambda network: network.id)
def test_export_answers_the_same(network: Network) -> None:
    """By torch.export, bit for bit."""
    model = network.model()
    plan = make_plan(model, Ratio(0.4), guard=False, overrides=_repeated(model))
    compact: Any = factorize(model, plan).eval()
    for module in compact.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # transformers' caches are no tensors
    inputs = network.inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    with torch.no_grad():
        program = torch.export.export(compact, args, kwargs, strict=False)
        expected = _tensors(compact(*args, **kwargs))
        _check_answers(_tensors(program.module()(*args, **kwargs)), expected, 0.0)
