"""Factorised transformers models through Hugging Face's own saving and loading."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankprune import (
    ConfigError,
    FixedRank,
    PlanError,
    defactorize,
    factorize,
    load,
    make_plan,
    plan_of,
    save,
)
from rankprune.low_rank import low_rank_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.quantizers import auto  # noqa: E402

from rankprune.integrations.huggingface import RankPruneConfig, prepare  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,  # so that outputs differ from token to token
}
TEXT = {**SIZES, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
IDS = torch.tensor([[5, 17, 42, 8, 99 - 1, 3, 60, 33]])
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _bert(name: str = "BertForSequenceClassification") -> Any:
    return getattr(transformers, name)(transformers.BertConfig(**TEXT))


def _llama(tied: bool = True) -> Any:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _qwen2() -> Any:
    config = transformers.Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config)


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **ENDS))


def _t5() -> Any:
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))


def _clip() -> Any:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
    return transformers.CLIPModel(config)


def _resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


Case = tuple[Callable[[], Any], dict[str, Tensor]]
MODELS: dict[str, Case] = {
    "bert": (_bert, {"input_ids": IDS}),
    "llama, grouped queries, tied embeddings": (_llama, {"input_ids": IDS}),
    "llama, output layer of its own": (lambda: _llama(tied=False), {"input_ids": IDS}),
    "qwen2": (_qwen2, {"input_ids": IDS}),
    "gpt2, Conv1D": (_gpt2, {"input_ids": IDS}),
    "t5": (_t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit, convolution": (_vit, {"pixel_values": PIXELS}),
    "clip": (_clip, {"input_ids": IDS, "pixel_values": PIXELS}),
    "resnet": (_resnet, {"pixel_values": PIXELS}),
}
GENERATING = [name for name in MODELS if name.startswith(("llama", "qwen2", "gpt2", "t5"))]


def _factorized(dense: Any) -> Any:
    return factorize(dense.eval(), make_plan(dense, FixedRank(4), guard=False))


@pytest.fixture(scope="module")
def compact() -> Callable[[str], Any]:
    """Prepared models by their names in MODELS, each factorised once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            torch.manual_seed(0)
            made[name] = prepare(_factorized(MODELS[name][0]()))
        return made[name]

    return get


@pytest.fixture
def bert(tmp_path: Path, compact: Callable[[str], Any]) -> Path:
    """A folder with the factorised BertForSequenceClassification."""
    compact("bert").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers as it is where rankprune has not been imported."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "rankprune")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rankprune")


def _answers(model: Any, name: str) -> Tensor:
    # Matrix products of the same numbers may round otherwise where their memory is aligned
    # otherwise, and weights read from a file lie as they do there.
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        outputs = model(**MODELS[name][1])
    return outputs.logits if "logits" in outputs else outputs.logits_per_image


def _same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        value.dtype is right[key].dtype and torch.equal(value, right[key])
        for key, value in left.items()
    )


def _tampered(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _layers(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["quantization_config"]["plan"]["layers"]


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_answers_exactly_the_same(
    name: str, compact: Callable[[str], Any], tmp_path: Path
) -> None:
    model = compact(name)
    model.save_pretrained(tmp_path / "one")
    loaded, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    assert low_rank_layers(loaded)
    assert plan_of(loaded) == plan_of(model)
    assert _same(loaded, model)
    assert torch.equal(_answers(loaded, name), _answers(model, name))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())

    stored = load_file(tmp_path / "one" / "model.safetensors")
    written = sum(value.numel() for value in stored.values()) - len(low_rank_layers(model))
    unique = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    assert written == sum(value.numel() for value in unique.values())
    assert written < plan_of(model).dense_params

    loaded.save_pretrained(tmp_path / "two")
    weights = "model.safetensors"
    assert (tmp_path / "two" / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes()
    plans = [json.loads((tmp_path / i / "config.json").read_text()) for i in ("one", "two")]
    assert plans[0]["quantization_config"] == plans[1]["quantization_config"]


@pytest.mark.parametrize("name", GENERATING)
def test_a_loaded_model_generates_the_same_tokens(
    name: str, compact: Callable[[str], Any], tmp_path: Path
) -> None:
    model = compact(name)
    model.save_pretrained(tmp_path)
    loaded_by = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    loaded = loaded_by.from_pretrained(tmp_path)
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=8, do_sample=False), tokens)


def test_a_pipeline_loads_the_folder(compact: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(99)}
    words_only = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="w0")
    model = compact("qwen2")
    model.save_pretrained(tmp_path)
    writer = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer)
    written = writer("w5 w17", max_new_tokens=4, do_sample=False)
    tokens = model.generate(torch.tensor([[5, 17]]), max_new_tokens=4, do_sample=False)
    assert low_rank_layers(writer.model)
    assert written[0]["generated_text"].replace("w", " w").split() == [
        f"w{token}" for token in tokens[0]
    ]


def test_shards(compact: Callable[[str], Any], tmp_path: Path) -> None:
    model = compact("t5")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert _same(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_dense_model(
    dtype: torch.dtype, compact: Callable[[str], Any], tmp_path: Path
) -> None:
    """T5 keeps some layers in fp32 when it is loaded in fp16."""
    model = compact("t5")
    model.save_pretrained(tmp_path / "compact")
    _t5().save_pretrained(tmp_path / "dense")
    loaded = type(model).from_pretrained(tmp_path / "compact", dtype=dtype)
    dense = type(model).from_pretrained(tmp_path / "dense", dtype=dtype)
    for name, low_rank in low_rank_layers(loaded).items():
        expected = dense.get_submodule(name).weight.dtype
        assert {parameter.dtype for parameter in low_rank.parameters()} == {expected}
    outputs = loaded(**MODELS["t5"][1]).logits.float()
    assert torch.allclose(outputs, _answers(model, "t5"), atol=0.1)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype is loaded.dtype


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(
    device_map: str | dict[str, str], bert: Path, compact: Callable[[str], Any]
) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(bert, device_map=device_map)
    assert _same(loaded.cpu(), compact("bert"))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_layers_offloaded_to_disk(compact: Callable[[str], Any], tmp_path: Path) -> None:
    name = "llama, output layer of its own"
    model = compact(name)
    model.save_pretrained(tmp_path / "one")
    places = {name: "cpu" for name, _ in model.model.named_children()}
    device_map = {f"model.{name}": place for name, place in places.items() if name != "layers"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    loaded = type(model).from_pretrained(
        tmp_path / "one", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.lm_head[0].weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "two")
    assert _same(type(model).from_pretrained(tmp_path / "two"), model)


@pytest.mark.slow
def test_training_goes_on_and_is_saved(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    before = copy.deepcopy(model)
    data = [{"input_ids": IDS[0].roll(i), "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    for name, low_rank in low_rank_layers(model).items():
        old = before.get_submodule(name)
        assert all(not torch.equal(new.weight, old[i].weight) for i, new in enumerate(low_rank))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert _same(saved, model)

    resumed = AutoModelForSequenceClassification.from_pretrained(bert)
    trainer = transformers.Trainer(resumed, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert _same(trainer.model, model)


def test_a_loaded_model_is_no_quantised_one(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    assert model.half().dtype is torch.float16
    assert model.float().dtype is torch.float32


def test_the_plan_travels_in_the_config(bert: Path, compact: Callable[[str], Any]) -> None:
    config = AutoConfig.from_pretrained(bert)
    assert config.quantization_config["quant_method"] == "rankprune"
    read = RankPruneConfig.from_dict(config.quantization_config)
    assert read.plan == plan_of(compact("bert"))
    assert compact("bert").config.to_dict()["quantization_config"] == config.quantization_config


def test_rankprune_saves_what_hugging_face_loaded(
    bert: Path, compact: Callable[[str], Any], tmp_path: Path
) -> None:
    save(AutoModelForSequenceClassification.from_pretrained(bert), tmp_path / "own")
    model = load(_bert(), tmp_path / "own")
    assert _same(model, compact("bert"))
    with pytest.raises(ConfigError, match=r"prepare\(model\)"):
        model.save_pretrained(tmp_path / "unprepared")


# -- another class than the saved one ------------------------------------------------------------


def test_the_base_of_a_model_with_a_head(bert: Path, compact: Callable[[str], Any]) -> None:
    model, info = AutoModel.from_pretrained(bert, output_loading_info=True)
    assert _same(model, compact("bert").bert)
    assert not info["missing_keys"]
    assert all(key.startswith("classifier.") for key in info["unexpected_keys"])
    # saved again, it has its own names
    model.save_pretrained(bert)
    assert _same(AutoModel.from_pretrained(bert), model)


def test_a_head_on_a_saved_base(tmp_path: Path) -> None:
    base = prepare(_factorized(_bert("BertModel")))
    base.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert _same(model.bert, base)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert type(model.classifier) is nn.Linear


def test_the_encoder_alone(compact: Callable[[str], Any], tmp_path: Path) -> None:
    compact("t5").save_pretrained(tmp_path)
    model, info = transformers.T5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert _same(model.encoder, compact("t5").encoder)
    assert not any(info.values())


def test_the_encoder_alone_where_only_the_decoder_was_factorised(tmp_path: Path) -> None:
    dense = _t5()
    plan = make_plan(dense, FixedRank(4), overrides={"encoder.*": None}, guard=False)
    prepare(factorize(dense, plan)).save_pretrained(tmp_path)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert _same(model.encoder, dense.encoder)
    for part in (model, model.encoder):
        part.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("part", ["vision_model", "text_model"])
def test_one_half_of_clip(part: str, compact: Callable[[str], Any], tmp_path: Path) -> None:
    whole = compact("clip")
    whole.save_pretrained(tmp_path / "clip")
    expected = getattr(whole, part)
    half, info = type(expected).from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert low_rank_layers(half)
    assert _same(half, expected)
    assert not info["missing_keys"]
    half.save_pretrained(tmp_path / "half")
    assert _same(type(expected).from_pretrained(tmp_path / "half"), expected)


def test_factors_that_two_layers_share(tmp_path: Path) -> None:
    dense = _bert("BertModel")
    shared = [layer.attention.self for layer in dense.encoder.layer]
    shared[0].query.weight = shared[0].key.weight = shared[1].value.weight
    compact = prepare(_factorized(dense))
    compact.save_pretrained(tmp_path / "one")
    for kind in (AutoModel, AutoModelForSequenceClassification):
        model = kind.from_pretrained(tmp_path / "one")
        base = getattr(model, "bert", model)
        assert _same(base, compact)
        assert plan_of(base) == plan_of(compact)
        layers = [layer.attention.self for layer in base.encoder.layer]
        for index in (0, 1):
            assert layers[0].query[index].weight is layers[1].value[index].weight
            assert layers[0].key[index].weight is layers[1].value[index].weight
    model.save_pretrained(tmp_path / "two")
    assert _same(AutoModel.from_pretrained(tmp_path / "two"), compact)


def test_layers_that_transformers_ties_itself(tmp_path: Path) -> None:
    class Twins(transformers.BertModel):
        _tied_weights_keys = {  # noqa: RUF012
            f"encoder.layer.1.{key}": f"encoder.layer.0.{key}"
            for key in ("attention.self.query.weight", "attention.self.query.bias")
        }

    config = transformers.BertConfig(**TEXT, tie_word_embeddings=True)
    compact = prepare(_factorized(Twins(config)))
    first, second = (layer.attention.self.query for layer in compact.encoder.layer)
    assert first[0].weight is second[0].weight
    compact.save_pretrained(tmp_path)
    model = Twins.from_pretrained(tmp_path)
    assert _same(model, compact)
    first, second = (layer.attention.self.query for layer in model.encoder.layer)
    assert first[0].weight is second[0].weight
    assert first.bias is second.bias


def test_a_model_that_lacks_a_planned_layer(bert: Path) -> None:
    with pytest.raises(PlanError, match=r"layer 'bert\.pooler\.dense' is not in the model"):
        transformers.BertForMaskedLM.from_pretrained(bert)
    with pytest.raises(PlanError, match=r"layer 'bert\.encoder\..*' is not in the model"):
        transformers.RobertaModel.from_pretrained(bert)


# -- never random weights ------------------------------------------------------------------------


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("name", MODELS)
def test_without_rankprune_transformers_refuses(
    name: str, compact: Callable[[str], Any], tmp_path: Path
) -> None:
    compact(name).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(compact(name)).from_pretrained(tmp_path)


def test_every_factorised_layer_stops_other_loaders(
    bert: Path, compact: Callable[[str], Any]
) -> None:
    with safe_open(bert / "model.safetensors", framework="pt") as archive:
        for name in low_rank_layers(compact("bert")):
            assert archive.get_tensor(f"{name}.weight").tolist() == [min(4, _rank(name))]


def _rank(name: str) -> int:
    return 2 if name == "classifier" else 4  # two classes


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("quantization_config"),
        lambda config: _layers(config).clear(),
        lambda config: _layers(config).pop(),
        lambda config: _layers(config)[0].update(rank=5),
    ],
    ids=["no plan", "no layers", "one layer less", "another rank"],
)
def test_a_plan_that_the_weights_do_not_fit(
    change: Callable[[dict[str, Any]], object], bert: Path
) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(_tampered(bert, change))


def test_factors_are_not_initialised_even_where_that_was_asked_for(bert: Path) -> None:
    _tampered(bert, lambda config: _layers(config)[0].update(rank=5))
    with pytest.raises(PlanError, match=r"self\.query': the checkpoint holds no '0\.weight'"):
        AutoModelForSequenceClassification.from_pretrained(bert, ignore_mismatched_sizes=True)


def test_weights_that_were_not_factorised(bert: Path) -> None:
    config = (bert / "config.json").read_text()
    _bert().save_pretrained(bert)
    (bert / "config.json").write_text(config)
    with pytest.raises(PlanError, match=r"self\.query': the checkpoint holds no '0\.weight'"):
        AutoModelForSequenceClassification.from_pretrained(bert)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["quantization_config"].pop("plan"), "'plan' is missing"),
        (lambda config: config["quantization_config"].update(plan=None), "expected an object"),
        (lambda config: _layers(config)[0].pop("rank"), "layer 0: 'rank' is missing"),
        (lambda config: _layers(config)[0].update(rank=500), r"query'\): rank 500 exceeds"),
        (lambda config: _layers(config)[0].update(energy=float("inf")), "Infinity is not JSON"),
        (lambda config: _layers(config)[0].update(name="bert.x"), "'bert.x' is not in the model"),
        (lambda config: config.update(hidden_size=16), r"query' does not fit the plan"),
    ],
    ids=["no plan", "null", "no rank", "rank", "infinity", "name", "another size"],
)
def test_a_bad_plan_says_what_is_wrong(
    change: Callable[[dict[str, Any]], object], message: str, bert: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        AutoModelForSequenceClassification.from_pretrained(_tampered(bert, change))


def test_a_dense_checkpoint_is_not_factorised_by_loading(
    tmp_path: Path, compact: Callable[[str], Any]
) -> None:
    _bert().save_pretrained(tmp_path)
    config = compact("bert").config.quantization_config
    with pytest.raises(PlanError, match="cannot factorise a dense BertForSequenceClassification"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)


# -- what cannot be prepared ---------------------------------------------------------------------


def test_only_transformers_models_can_be_prepared() -> None:
    with pytest.raises(ConfigError, match=r"got Linear; save others with rankprune\.save"):
        prepare(nn.Linear(4, 4))


def test_a_model_without_factors(compact: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="BertModel has no factorised layer"):
        prepare(_bert("BertModel"))
    with pytest.raises(PlanError, match="has no factorised layer"):
        defactorize(compact("bert")).save_pretrained(tmp_path)


def test_a_quantised_model(compact: Callable[[str], Any]) -> None:
    model = copy.deepcopy(compact("bert"))
    other = transformers.BitsAndBytesConfig
    model.hf_quantizer = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"](other(load_in_8bit=True))
    with pytest.raises(ConfigError, match=r"quantised already \(bitsandbytes\)"):
        prepare(model)


def test_a_model_that_was_not_prepared_is_not_saved(tmp_path: Path) -> None:
    """Transformers would load random weights in the factors' place."""
    model = _factorized(_clip())
    for part in (model, model.vision_model):
        with pytest.raises(ConfigError, match=r"after .*prepare\(model\)"):
            part.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    defactorize(model).save_pretrained(tmp_path / "dense")
    prepare(model).save_pretrained(tmp_path / "compact")
    assert _same(type(model).from_pretrained(tmp_path / "compact"), model)


def test_a_model_that_was_not_prepared_generates() -> None:
    model = _factorized(_llama())
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, IDS.shape[1] + 2)


def test_adapters_of_a_model_that_was_not_prepared_are_saved() -> None:
    model = _factorized(_bert("BertModel"))
    state, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    assert state.keys() == model.state_dict().keys()
