"""Compressing folders of transformers: in one piece, block by block, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rankprune as rp
from rankprune.integrations.huggingface import prepare
from rankprune.integrations.streaming import Shards, compress_streaming
from rankprune.recipes import hf
from runs import FORKS, cli

transformers = pytest.importorskip("transformers")
pytestmark = FORKS
TEXT = "\n".join(f"line {n}: the quick brown fox, number {n * n}, and a dog" for n in range(200))
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {},
    "bert": {},
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}


def tokenizer() -> Any:
    """A tokenizer of letters, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: index + 3 for index, letter in enumerate(sorted(set(TEXT)))}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_folder(family: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **FAMILIES[family],
    )
    kind = getattr(transformers, CLASSES.get(family, "T5ForConditionalGeneration"))
    model = kind(config)
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def stored(folder: Path) -> int:
    """Numbers in a folder's safetensors."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as archive:
            total += sum(archive.get_tensor(key).numel() for key in archive.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_one_piece(family: str, tmp_path: Path, text: Path) -> None:
    source = hf.open_folder(make_folder(family, tmp_path / "dense"))
    done: list[int] = []
    compact, plan, report = hf.compress(
        source, rp.Budget(params=0.8), text=text, window=24, windows=6, progress=done.append
    )
    assert done == [1, 2, 3, 4, 5, 6]
    assert plan.params <= 0.8 * plan.dense_params
    assert report.to_dict()["compact"]["params"] == rp.count_params(compact)
    hf.save(source, prepare(compact), tmp_path / "out")
    assert stored(tmp_path / "out") < 0.85 * stored(tmp_path / "dense")
    loaded = type(source.model).from_pretrained(tmp_path / "out").eval()
    inputs = next(source.text(text, window=24, windows=1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], compact(**inputs)[0], rtol=1e-5, atol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("dog").input_ids


def test_text_is_cut_as_the_model_reads_it(tmp_path: Path, text: Path) -> None:
    decoder = hf.open_folder(make_folder("llama", tmp_path / "llama"))
    windows = list(decoder.text(text, window=50, windows=3))
    assert [tuple(window["input_ids"].shape) for window in windows] == [(1, 50)] * 3
    encoder = hf.open_folder(make_folder("bert", tmp_path / "bert"))
    lines = list(encoder.text(text, window=20, windows=3))
    assert all(line["input_ids"].shape[1] <= 20 for line in lines)
    both = hf.open_folder(make_folder("t5", tmp_path / "t5"))
    assert set(next(both.text(text, window=20, windows=1))) == {"input_ids", "decoder_input_ids"}
    assert encoder.window(10**9) == encoder.model.config.max_position_embeddings


def test_blockwise(tmp_path: Path, text: Path) -> None:
    source = hf.open_folder(make_folder("llama", tmp_path / "dense"))
    before = {key: value.clone() for key, value in source.model.state_dict().items()}
    compact, plan, _ = hf.compress(
        source, rp.Budget(params=0.8), text=text, window=24, windows=6, blockwise=True
    )
    assert plan.params == rp.count_params(compact)
    assert all(torch.equal(before[key], value) for key, value in source.model.state_dict().items())
    with pytest.raises(rp.ConfigError, match="needs a text"):
        hf.compress(source, rp.Budget(params=0.8), blockwise=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_streaming_is_blockwise_compression(sharded: bool, tmp_path: Path, text: Path) -> None:
    options = {"max_shard_size": "40KB"} if sharded else {}
    dense = make_folder("llama", tmp_path / "dense", **options)
    assert (dense / "model.safetensors.index.json").exists() == sharded
    seen: list[str] = []
    plan = compress_streaming(
        dense, tmp_path / "out", rp.Budget(params=0.7), text=text, window=24, windows=6,
        progress=seen.append,
    )  # fmt: skip
    assert seen == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert stored(tmp_path / "out") < stored(dense)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert rp.count_params(loaded) == plan.params
    # the same in memory, with the ranks that the blocks chose
    source = hf.open_folder(dense)
    batches = list(source.text(text, window=24, windows=6))
    expected = rp.factorize_blocks(source.model, plan, batches)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(
            loaded.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=lambda t, n=name: n + t
        )


def test_streaming_keeps_the_dtype(tmp_path: Path, text: Path) -> None:
    dense = make_folder("llama", tmp_path / "dense")
    half = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    half.save_pretrained(dense)
    compress_streaming(
        dense, tmp_path / "out", rp.Budget(params=0.7), text=text, window=24, windows=4
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_streaming_leaves_no_earlier_model_in_effect(tmp_path: Path, text: Path) -> None:
    dense = make_folder("llama", tmp_path / "dense")
    shutil.copytree(dense, tmp_path / "out")
    target = rp.FixedRank(3)
    killed = tmp_path / "out" / ".model-layers-0.safetensors.0123456789abcdef.tmp"
    killed.mkdir()
    (killed / ".tmpl1AVsX").write_text("half a block")
    plan = compress_streaming(dense, tmp_path / "out", target, text=text, window=24, windows=4)
    assert not killed.exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert rp.count_params(loaded) == plan.params


def test_an_earlier_save_in_shards_is_not_read(tmp_path: Path) -> None:
    """transformers takes the single file, and so do we."""
    folder = make_folder("llama", tmp_path / "dense", max_shard_size="40KB")
    index = (folder / "model.safetensors.index.json").read_bytes()
    make_folder("llama", folder)
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert set(Shards(folder).files.values()) == {"model.safetensors"}


def test_streaming_keeps_each_dtype(tmp_path: Path, text: Path) -> None:
    dense = make_folder("llama", tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    halves = {key: value if key == norm else value.bfloat16() for key, value in state.items()}
    save_file(halves, dense / "model.safetensors", metadata={"format": "pt"})
    compress_streaming(dense, tmp_path / "out", rp.FixedRank(3), text=text, window=24, windows=4)
    shards = Shards(tmp_path / "out")
    dtypes = {key: shards.read([key])[key].dtype for key in shards.files if key.endswith("weight")}
    assert dtypes[norm] == torch.float32
    assert dtypes["model.layers.1.mlp.up_proj.0.weight"] == torch.bfloat16


def test_models_that_read_no_text_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, architectures=["ViTForImageClassification"],
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(rp.ConfigError, match="does not read text"):
        hf.compress(hf.open_folder(tmp_path), rp.Budget(params=0.8))


def test_streaming_refusals(tmp_path: Path, text: Path) -> None:
    dense = make_folder("llama", tmp_path / "dense", max_shard_size="40KB")
    with pytest.raises(rp.ConfigError, match="params alone"):
        compress_streaming(dense, tmp_path / "out", rp.Budget(flops=0.5), text=text)
    bert = make_folder("bert", tmp_path / "bert")
    with pytest.raises(rp.ConfigError, match="no causal language model"):
        compress_streaming(bert, tmp_path / "out", rp.Budget(params=0.5), text=text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(rp.ConfigError, match="the model's own folder"):
        compress_streaming(dense, dense, rp.Budget(params=0.5), text=text)
    mixed = tmp_path / "mixed"
    shutil.copytree(dense, mixed)
    config = json.loads((mixed / "config.json").read_text())
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    (mixed / "config.json").write_text(json.dumps(config | {"layer_types": kinds}))
    with pytest.raises(rp.ConfigError, match="blocks of several kinds"):
        compress_streaming(mixed, tmp_path / "out", rp.Budget(params=0.5), text=text)
    index = dense / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    for bad in ("../model.safetensors", "/etc/passwd"):
        document["weight_map"]["model.norm.weight"] = bad
        index.write_text(json.dumps(document))
        with pytest.raises(rp.FileError, match="refused shard"):
            Shards(dense)
    index.write_text("[]")
    with pytest.raises(rp.FileError, match="not valid JSON"):
        Shards(dense)
    index.write_text("{}")
    with pytest.raises(rp.FileError, match="weight_map"):
        Shards(dense)
    with pytest.raises(rp.FileError, match="holds neither"):
        Shards(tmp_path)


def test_refusals(tmp_path: Path, text: Path) -> None:
    with pytest.raises(rp.FileError, match=r"no config\.json"):
        hf.open_folder(tmp_path)
    dense = make_folder("llama", tmp_path / "dense")
    source = hf.open_folder(dense)
    with pytest.raises(rp.FileError, match=r"missing\.txt: cannot read"):
        list(source.text(tmp_path / "missing.txt", window=8, windows=1))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(rp.FileError, match="holds no text"):
        list(hf.open_folder(make_folder("bert", tmp_path / "b")).text(
            tmp_path / "empty.txt", window=8, windows=1
        ))  # fmt: skip
    compact = rp.factorize(source.model, rp.make_plan(source.model, rp.Ratio(0.3)))
    hf.save(source, prepare(compact), tmp_path / "compact")
    with pytest.raises(rp.ConfigError, match="factorised or quantised already"):
        hf.open_folder(tmp_path / "compact")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"architectures": ["os.system"]}))
    with pytest.raises(rp.ConfigError, match=r"names no class of transformers, but 'os\.system'"):
        hf.open_folder(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "b" / name).unlink(missing_ok=True)
    silent = hf.open_folder(tmp_path / "b")
    assert silent.tokenizer is None
    with pytest.raises(rp.ConfigError, match="needs a tokenizer"):
        list(silent.text(text, window=8, windows=1))


def test_command_line(tmp_path: Path, text: Path) -> None:
    dense = make_folder("llama", tmp_path / "dense")
    common: list[object] = ["compress", f"hf:{dense}", "--calib", f"text:{text}", "--params", 0.9]
    common += ["--samples", 4, "--window", 24]
    report = json.loads(cli(*common, "--out", tmp_path / "out", "--json").stdout)
    assert report["compact"]["params"] <= 0.9 * report["dense"]["params"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "exists already" in cli(*common, "--out", tmp_path / "out", code=3).stderr
    streamed = cli(*common, "--out", tmp_path / "streamed", "--streaming")
    assert "model.layers.2 is done" in streamed.stderr
    for folder in ("out", "streamed"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    refused = cli(*common, "--out", tmp_path / "no", "--scheme", "channel", code=2)
    assert "--scheme is not for hf: models" in refused.stderr
