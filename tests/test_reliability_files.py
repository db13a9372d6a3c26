"""Hostile and broken files: nothing in them runs, nothing in them is believed."""

from __future__ import annotations

import cProfile
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import random
import runpy
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import time
import timeit
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import rankprune as rp
from cases import mlp, write_plan
from conftest import Trials
from rankprune.latency import LatencyTable, Request
from rankprune.recipes.bench import _forget_peak, _status_bytes
from rankprune.recipes.checkpoint import read_checkpoint, write_checkpoint
from rankprune.recipes.config import make_config, parse_latency, parse_rule, read_yaml
from rankprune.recipes.weights import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WEIGHTS, PLAN = "model.safetensors", "plan.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = mlp()
    plan = rp.make_plan(model, rp.Ratio(0.4), guard=False)
    return rp.save(rp.factorize(model, plan), tmp_path / "model", metadata={"note": "free text"})


# -- code in files ---------------------------------------------------------------------------------


class Call:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.what = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what


def _exploits(trace: Path) -> dict[str, Call]:
    """Calls that leave something where `trace` is."""
    path, code = str(trace), f"__import__('os').mkdir({str(trace)!r})"
    script = trace.parent / "script.py"
    script.write_text(code)
    return {
        "os.mkdir": Call(os.mkdir, path),
        "os.makedirs": Call(os.makedirs, path),
        "os.system": Call(os.system, f"mkdir {path}"),
        "os.popen": Call(os.popen, f"mkdir {path}"),
        "os.symlink": Call(os.symlink, "/", path),
        "subprocess.run": Call(subprocess.run, ["mkdir", path]),
        "subprocess.call": Call(subprocess.call, ["mkdir", path]),
        "subprocess.getoutput": Call(subprocess.getoutput, f"mkdir {path}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, path, "w"),
        "Path.touch": Call(Path.touch, trace),
        "shutil.copyfile": Call(shutil.copyfile, str(script), path),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "timeit.timeit": Call(timeit.timeit, code, "0", timeit.default_timer, 1),
        "cProfile.run": Call(cProfile.run, code, f"{path}.profile"),
        "sqlite3.connect": Call(sqlite3.connect, path),
        "zipfile.ZipFile": Call(zipfile.ZipFile, path, "w"),
        "tarfile.open": Call(tarfile.open, path, "w"),
        "tempfile.mkdtemp": Call(tempfile.mkdtemp, "", "trace", str(trace.parent)),
        "logging.FileHandler": Call(logging.FileHandler, path),
        "numpy.save": Call(np.save, f"{path}.npy", 0),
        "torch.save": Call(torch.save, 0, path),
        "import of a module": Call(importlib.import_module, "script"),
    }


def _traces(trace: Path) -> list[Path]:
    return list(trace.parent.glob("trace*"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with suppress(IsADirectoryError, PermissionError):
            path.unlink()
            continue
        path.rmdir()


def _torch_zip(exploit: Call) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"0.weight": exploit}}, buffer)
    return buffer.getvalue()


def _torch_legacy(exploit: Call) -> bytes:
    buffer = io.BytesIO()
    torch.save({"0.weight": exploit}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _checkpoint(content: bytes) -> bytes:
    return b"rankprune checkpoint 1\n" + hashlib.sha256(content).digest() + content


def _posing(folder: Path, saved: Path, exploit: Call) -> dict[str, Callable[[], Any]]:
    """Ways to have the library read a pickle as something else."""
    plain = pickle.dumps(exploit)
    files = {
        "weights.pt": plain,
        "weights.pth": _torch_zip(exploit),
        "weights.bin": _torch_legacy(exploit),
        "weights.safetensors": plain,
        "weights.ckpt": _checkpoint(_torch_zip(exploit)),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    readers: dict[str, Callable[[], Any]] = {
        name: lambda name=name: load_weights(mlp(), folder / name)
        for name in files  # type: ignore[misc]
    }
    for name, content in {"plain": plain, "zip": _torch_zip(exploit)}.items():
        path = folder / f"{name}-checkpoint.pt"
        path.write_bytes(_checkpoint(content))
        readers[path.name] = lambda path=path: read_checkpoint(path)  # type: ignore[misc]
    as_plan, as_weights = folder / "as_plan", folder / "as_weights"
    for target in (as_plan, as_weights):
        shutil.copytree(saved, target, dirs_exist_ok=True)
    (as_plan / PLAN).write_bytes(plain)
    readers["plan.json"] = lambda: rp.load(mlp(), as_plan)
    (as_weights / WEIGHTS).write_bytes(plain)
    document = json.loads((saved / PLAN).read_text())
    document["weights"]["sha256"] = hashlib.sha256(plain).hexdigest()
    write_plan(as_weights, document)
    readers["model.safetensors"] = lambda: rp.load(mlp(), as_weights)
    return readers


def test_exploits(
    saved: Path, tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pickle exploits, each posing as nine kinds of file: none runs."""
    trace = tmp_path / "trace"
    exploits = _exploits(trace)
    monkeypatch.syspath_prepend(tmp_path)
    for name, exploit in exploits.items():
        kept: Any = pickle.loads(pickle.dumps(exploit))  # it does work where it is let
        if hasattr(kept, "close"):
            kept.close()
        assert _traces(trace), name
        _remove(_traces(trace))
        for reader in _posing(tmp_path, saved, exploit).values():
            with trials.one():
                with pytest.raises(rp.RankPruneError):
                    reader()
                assert not _traces(trace), name


def test_exploits_in_hugging_face_folders(tmp_path: Path, trials: Trials) -> None:
    """The same as pytorch_model.bin and adapter code of a transformers folder: none runs."""
    transformers = pytest.importorskip("transformers")
    from rankprune.recipes.hf import open_folder

    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    folder, trace = tmp_path / "bert", tmp_path / "trace"
    folder.mkdir()
    for exploit in _exploits(trace).values():
        transformers.BertModel(config).config.save_pretrained(folder)
        document = json.loads((folder / "config.json").read_text())
        document |= {"architectures": ["BertModel"], "auto_map": {"AutoModel": "code.Model"}}
        (folder / "config.json").write_text(json.dumps(document))
        (folder / "code.py").write_text(f"__import__('os').mkdir({str(trace)!r})")
        (folder / "pytorch_model.bin").write_bytes(_torch_zip(exploit))
        with trials.one():
            with pytest.raises(rp.RankPruneError):
                open_folder(folder)
            assert not _traces(trace)


def test_exploits_in_yaml(tmp_path: Path, trials: Trials) -> None:
    """YAML that constructs Python objects, and what is no option: refused, and nothing runs."""
    path, trace = tmp_path / "options.yaml", tmp_path / "trace"
    call = f"!!python/object/apply:os.mkdir [{trace}]"
    texts = [
        f"data: {call}",
        f"? {call}\n: x",
        f"data: !!python/object/new:os.mkdir [{trace}]",
        f"- {call}",
        "data: !!python/name:os.system",
        "data: !!python/module:os",
        "data: !!python/tuple [1]",
        "data: !own x",
        "1: x",
        "?",
        "[a]: x",
        "dta: fake",
        "lr: .inf",
        "lr: .nan",
        "seed: 1e99999",
        f"seed: {'9' * 5000}",
        "data: *unknown",
        "data: \x00",
        "{" * 5000,
    ]
    # each level ten times the one below: nine levels print as a billion
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    texts.append("\n".join(["l0: &l0 [x]", *levels, "data: *l9"]))
    texts.append("\n".join(["data: &a", "  - *a"]))
    for text in texts:
        path.write_text(text)
        with trials.one():
            begin = time.process_time()
            with pytest.raises((rp.FileError, rp.ConfigError)):
                make_config({"model": "digits_cnn", "flops": 0.5, "data": "fake"} | read_yaml(path))
            assert time.process_time() - begin < 5  # PyYAML takes its time over deep nesting
            assert not trace.exists()


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def readers(saved: Path, tmp_path: Path) -> dict[Path, Callable[[], Any]]:
    """Files of every kind, and what reads them."""
    checkpoint = tmp_path / "checkpoint.pt"
    state = {"step": 3, "model": mlp().state_dict(), "records": [{"epoch": 1}]}
    write_checkpoint(checkpoint, state)
    return {
        saved / WEIGHTS: lambda: rp.load(mlp(), saved),
        saved / PLAN: lambda: rp.load(mlp(), saved),
        checkpoint: lambda: read_checkpoint(checkpoint),
    }


def _refused(path: Path, content: bytes | bytearray, read: Callable[[], Any]) -> None:
    path.write_bytes(content)
    begin = time.process_time()  # others' turns on a crowded machine are no delay of ours
    with pytest.raises(rp.RankPruneError) as caught:
        read()
    assert time.process_time() - begin < 1
    assert path.name in str(caught.value)
    assert isinstance(caught.value, (rp.FileError, rp.PlanError))


def test_truncation(readers: dict[Path, Callable[[], Any]], trials: Trials) -> None:
    """Weights, plan and checkpoint cut off at 200 offsets each: an error that names the file."""
    for path, read in readers.items():
        content = path.read_bytes()
        for index in trials.count(200, 40):
            share = index / len(trials.count(200, 40))
            with trials.one():
                _refused(path, content[: int(share * len(content))], read)
        path.write_bytes(content)
        read()


def test_flipped_bits(readers: dict[Path, Callable[[], Any]], trials: Trials) -> None:
    """1,000 bits flipped in weights, plan and checkpoint each: an error that names the file."""
    chance = random.Random(0)
    for path, read in readers.items():
        content = path.read_bytes()
        for _ in trials.count(1000, 100):
            bit = chance.randrange(8 * len(content))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            with trials.one():
                _refused(path, damaged, read)
        path.write_bytes(content)
        read()


def _header(document: Any, size: int | None = None) -> bytes:
    text = json.dumps(document).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(64)


def _tensor(shape: list[int], end: int, dtype: str = "F32", begin: int = 0) -> dict[str, Any]:
    return {"0.0.weight": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


# What a header says of sizes that are not there.
DECLARED: dict[str, bytes] = {
    "header of 2^63 bytes": _header({}, 2**63),
    "header of 2^40 bytes": _header({}, 2**40),
    "header one byte too long": _header({}, 67),
    "header of 0 bytes": _header({}, 0),
    "tensor of 2^40 numbers": _header(_tensor([2**40], 64)),
    "tensor of 2^62 numbers": _header(_tensor([2**31, 2**31], 64)),
    "tensor whose size overflows": _header(_tensor([2**32, 2**32, 2**32], 64)),
    "tensor that ends beyond the file": _header(_tensor([2**20], 2**22)),
    "tensor that ends before it begins": _header(_tensor([1], 0, begin=4)),
    "tensor of negative size": _header(_tensor([-1], 64)),
    "unknown type": _header(_tensor([1], 4, "F13")),
    "a thousand dimensions": _header(_tensor([2] * 1000, 64)),
    "no object": _header([1, 2]),
    "nothing": b"",
}


def test_declared_sizes(saved: Path, trials: Trials) -> None:
    """Headers and plans that declare sizes up to 2^63: refused within a second and 64 MB."""
    path, before = saved / WEIGHTS, json.loads((saved / PLAN).read_text())
    for content in DECLARED.values():
        document = json.loads(json.dumps(before))
        document["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        write_plan(saved, document)
        with trials.one():
            _bounded(lambda: rp.load(mlp(), saved))
    for key, value in {
        "in_channels": 2**30,
        "out_channels": 2**62,
        "groups": 2**31 - 1,
        "kernel_size": [2**31 - 1] * 3,
        "kernel_size ": [1] * 10**6,
        "padding": [2**62],
        "dilation": [2**31],
        "rank": 2**40,
        "params": 2**70,
        "dense_params": 10**4000,
        "name": "x" * 10**6,
        "tied": ["x"] * 10**6,
    }.items():
        document = json.loads(json.dumps(before))
        entry = document["layers"][0]
        (entry if key in entry else entry["spec"])[key.strip()] = value
        write_plan(saved, document)
        with trials.one():
            _bounded(lambda: rp.load(mlp(), saved))


def _bounded(read: Callable[[], Any]) -> None:
    begin, before = time.process_time(), _forget_peak()
    with pytest.raises((rp.FileError, rp.PlanError)):
        read()
    assert time.process_time() - begin < 1
    assert _more_than(before) < 64 * 2**20


def _more_than(before: int | None) -> int:
    """Bytes at the peak since the last was forgotten, above what there was; 0 but on Linux."""
    peak = _status_bytes("VmHWM")
    return 0 if before is None or peak is None else peak - before


# -- fuzzing ---------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["spatial", "conv", "linear", "zeros", "same", "Conv2d"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be put into a document."""
    found = [path] if path else []
    children: Any = ()
    if isinstance(document, dict):
        children = document.items()
    elif isinstance(document, list):
        children = enumerate(document)
    for key, value in children:
        found += _places(value, (*path, key))
    return found


def _changed(document: Any, path: tuple[Any, ...], action: str, value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    if action == "delete":
        del holder[path[-1]]
    elif action == "add" and isinstance(holder, dict):
        holder[str(value)[:20]] = value
    else:
        holder[path[-1]] = value
    return copy


def _fuzz(trials: Trials, examples: int, strategy: Any, parse: Callable[[Any], Any]) -> None:
    """Feed what comes; only our errors may come back, and memory stays bounded."""
    refused = 0

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def feed(value: Any) -> None:
        nonlocal refused
        with trials.one():
            try:
                parse(value)
            except rp.RankPruneError:
                refused += 1

    before = _forget_peak()
    feed()
    assert refused > examples / 10
    assert _more_than(before) < 256 * 2**20  # with what hypothesis keeps


def test_fuzzed_plans(saved: Path, trials: Trials) -> None:
    """Plans, 50,000 fuzzed: read, or refused with an error of ours."""
    text = (saved / PLAN).read_text()
    document = json.loads(text)
    changes = st.builds(
        lambda *how: json.dumps(_changed(document, *how)),
        st.sampled_from(_places(document)),
        st.sampled_from(["delete", "add", "put", "put"]),
        JSON,
    )
    cuts = st.builds(
        lambda at, more, skip: text[:at] + more + text[at + skip :],
        st.integers(0, len(text)),
        st.text('{}[]",:0123456789.-+eEnulltrfas \\u\n', max_size=6),
        st.integers(0, 40),
    )
    anything = JSON.map(json.dumps) | st.text(max_size=40)
    examples = len(trials.count(50_000, 1000))
    _fuzz(trials, examples, changes | cuts | anything, lambda content: rp.Plan.from_json(content))


def test_fuzzed_options(tmp_path: Path, trials: Trials) -> None:
    """Configurations, rules and latencies, 50,000 fuzzed: read, or refused with our error."""
    path = tmp_path / "options.yaml"
    options = {"data": "fake", "model": "digits_cnn", "flops": 0.5}
    names = st.sampled_from(
        ["data", "lr", "rank", "latency", "seed", "every", "scheme", "backend", "precision"]
    )
    documents = st.dictionaries(names | st.text(max_size=6), JSON, max_size=4)
    texts = documents.map(lambda found: yaml.safe_dump(options | found)) | st.text(max_size=60)
    rules = st.builds("{}:{}".format, st.sampled_from(["energy", "fixed", "evbmf", "x"]), st.text())

    def parse(found: tuple[str, str]) -> None:
        kind, text = found
        if kind == "rule":
            parse_rule(text)
        elif kind == "latency":
            parse_latency(text)
        else:
            path.write_text(text, encoding="utf-8", errors="replace")
            make_config(read_yaml(path))

    strategy = (
        st.tuples(st.just("yaml"), texts)
        | st.tuples(st.just("rule"), rules | st.text(max_size=12))
        | st.tuples(st.just("latency"), st.floats().map(str) | st.text(max_size=12))
    )
    _fuzz(trials, len(trials.count(50_000, 1000)), strategy, parse)


def test_latency_cache(tmp_path: Path, trials: Trials) -> None:
    """What is no measurement in the latency cache: measured anew, never believed."""
    spec = rp.LayerSpec.of(nn.Linear(8, 8))
    runtime = rp.Runtime(backend="eager", threads=1)
    request = Request(spec, (1, 8), {"linear": [2]})
    LatencyTable(runtime, cache=tmp_path).measure([request])
    (path,) = tmp_path.rglob("*.json")
    good = json.loads(path.read_text())
    values: list[Any] = [0.0, -1.0, 1, True, None, "1", [], {}, 1e999]
    bad = [json.dumps(good | {"milliseconds": {"dense": value}}).encode() for value in values]
    bad += [pickle.dumps(Call(os.mkdir, str(tmp_path / "trace"))), b"", b"[" * 10**5, b"\xff"]
    for content in bad:
        path.write_bytes(content)
        with trials.one():
            table = LatencyTable(runtime, cache=tmp_path)
            table.measure([request])
            assert (table.measured, table.reused) == (2, 0)
            assert not (tmp_path / "trace").exists()
            assert table.dense(spec, [(1, 8)]) > 0


def test_paths_in_plans(saved: Path, tmp_path: Path, trials: Trials) -> None:
    """Names of weights files that lead elsewhere, and symbolic links: refused."""
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    before = json.loads((saved / PLAN).read_text())
    names = ["../secret.safetensors", str(tmp_path / "secret.safetensors"), "/etc/passwd", ".."]
    names += ["./model.safetensors", "model.safetensors/", "sub/model.safetensors", "", ".", "~"]
    names += ["model.safetensors\0", "C:\\model.safetensors", "file:///etc/passwd", "MODEL.SAFE"]
    for name in names:
        document = json.loads(json.dumps(before))
        document["weights"]["file"] = name
        write_plan(saved, document)
        with trials.one(), pytest.raises(rp.PlanError, match="refused weights file name"):
            rp.load(mlp(), saved)
    write_plan(saved, before)
    rp.load(mlp(), saved)
    for name in (PLAN, WEIGHTS):
        (saved / name).rename(tmp_path / name)
        (saved / name).symlink_to(tmp_path / name)
        with trials.one(), pytest.raises(rp.FileError, match=name):
            rp.load(mlp(), saved)
        (saved / name).unlink()
        (tmp_path / name).rename(saved / name)
    rp.load(mlp(), saved)
