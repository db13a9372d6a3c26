"""The benchmarks run, and print what others read."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import rankprune as rp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def _run(script: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["quick"] is True
    return found


@pytest.mark.slow
def test_projection() -> None:
    network = _run("projection.py", "--networks", "resnet20", "--threads", "1")["networks"][
        "resnet20"
    ]
    assert network["speedup_vs_svd"] > 0
    assert network["speedup_cold"] > 0
    assert 1 - 1e-6 <= network["residual_ratio_max"] <= 1.0001


@pytest.mark.slow
def test_training_overhead() -> None:
    ratios = _run("training_overhead.py", "--batch", "8", "--threads", "1")["resnet20"]
    assert all(ratios[name] > 0 for name in ("m20", "m1", "authors"))
    ratios = _run("training_overhead.py", "--taught", "--batch", "8", "--threads", "1")["resnet20"]
    assert all(ratios[name] > 0 for name in ("taught", "taught_mirrored"))


@pytest.mark.slow
def test_projection_shared() -> None:
    found = _run("projection_shared.py", "--network", "resnet20")
    assert found["steady"]["two_by_one"]["median"] > 0


@pytest.mark.slow
def test_latency() -> None:
    """What a crowded machine measures may put a budget out of reach: then the row says so."""
    found = _run("latency.py", "--part", "budget", "--part", "zoo", "--threads", "1")
    (budget,), (zoo,) = found["budget"], found["zoo"]
    assert "refused" in budget or budget["dense_ms"] > 0
    assert "left_dense" in zoo or zoo["flops_reduction"] >= 2


@pytest.mark.slow
def test_separable() -> None:
    rows = _run("separable.py", "--threads", "1")["layers"]
    assert {row["backend"] for row in rows} >= {"onnxruntime", "eager"}
    for row in rows:
        names = {"decoupled", "depthwise", "spatial"}
        if row["backend"] != "eager":
            names |= {"decoupled by torch", "depthwise by torch"}
        assert set(row["speedups"]) == names
        assert all(value["median"] > 0 for value in row["speedups"].values())


@pytest.mark.slow
def test_cifar10_methods(tmp_path: Path) -> None:
    """Every method that trains, on a few images: decomposed and projected answer alike."""
    for part, count in (("train", 26), ("test", 4)):
        for label in range(2):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    methods = [
        "ours",
        "ours-labels-only",
        "ours-decay-products",
        "ours-separable-by-outputs",
        "svd-matched-spatial",
        "nuclear-only-spatial",
        "trp-authors-channel",
    ]
    script = str(BENCHMARKS / "cifar10" / "run.py")
    options = ["--data", str(tmp_path), "--epochs", "2", "--batch", "8", "--validate"]
    options += ["--results", str(tmp_path / "rows.json")]
    done = subprocess.run(
        [sys.executable, script, *options, "--threads", "1", "--method", *methods],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["method"] for row in rows] == methods
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert sorted(row["method"] for row in kept) == sorted(methods)
    for row in rows:
        assert row["projected_accuracy"] in (None, row["accuracy"])
        if row["target"] is not None:
            assert row["flops_reduction"] >= row["target"]


def test_cifar10_compressed_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's network comes back from its file: one layer made two, and channels removed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "cifar10"))
    compressed, networks = map(importlib.import_module, ("compressed", "networks"))
    dense = networks.build("resnet20", None, 0)
    compact = copy.deepcopy(dense)
    compact.layer2[0].conv1 = nn.Sequential(
        nn.Conv2d(16, 5, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
        nn.Conv2d(5, 32, (1, 3), stride=(1, 2), padding=(0, 1)),
    )
    block = compact.layer3[1]
    block.conv1 = nn.Conv2d(64, 7, 3, padding=1, bias=False)
    block.bn1 = nn.BatchNorm2d(7)
    block.conv2 = nn.Conv2d(7, 64, 3, padding=1, bias=False)
    path = compressed.location(tmp_path, "peer", "resnet20", 2.5, compressed.fingerprint(dense))
    compressed.save(path, compact, "resnet20", dense, {"target": 2.5})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded, about = compressed.load(path)
    assert about == {
        "network": "resnet20",
        "dense": compressed.fingerprint(copy.deepcopy(dense).to(memory_format=torch.channels_last)),
        "target": 2.5,
    }
    assert about["dense"] != compressed.fingerprint(networks.build("resnet20", None, 1))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(x), compact.eval()(x))
    # what the file names is a layer or nothing
    block.bn1 = nn.ReLU()
    with pytest.raises(KeyError):
        compressed.save(path, compact, "resnet20", dense, {})
    with pytest.raises(ValueError, match="ReLU"):
        compressed._layer({"kind": "ReLU"})


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_how_they_were_measured(path: Path) -> None:
    document = json.loads(path.read_text())
    # one measurement, or rows that were measured one by one
    parts = [rows for rows in document.values() if isinstance(rows, list)]
    for result in [document] if "date" in document else [row for rows in parts for row in rows]:
        assert result["quick"] is False
        for condition in ("date", "commit", "python", "torch", "cpu", "cores", "threads"):
            assert result[condition], condition


def test_one_command_makes_every_committed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "cifar10"))
    monkeypatch.setenv("WEIGHTS", "weights")
    run = importlib.import_module("run")
    parser, folder = run._parser(), BENCHMARKS / "cifar10"
    grid = parser.parse_args(["--grid", str(folder / "committed.txt")])
    asked = {(row.args.results.name, *row.key.values()) for row in run._asked(parser, grid)}
    committed = {
        (name, *(row[key] for key in run.KEY))
        for name in ("results.json", "validation.json")
        for row in json.loads((folder / name).read_text())
    }
    assert asked == committed


def test_cifar10_composed_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes in the factors' place gives their outputs and their gradients."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "cifar10"))
    composed_convolutions = importlib.import_module("loop")._composed
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
    ).double()
    plan = rp.make_plan(model, rp.FixedRank(2), scheme="spatial", guard=False)
    compact = rp.factorize(model, plan)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def passed() -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = compact(images)
        gradients = torch.autograd.grad(output.square().sum(), list(compact.parameters()))
        return output.detach(), list(gradients)

    output, gradients = passed()
    calls = Counter[str]()
    for name, module in compact.named_modules():
        module.register_forward_hook(lambda *_, n=name: calls.update([n]))
    with composed_convolutions(compact):
        composed, others = passed()
    assert calls["0.0"] == 0  # the factors themselves were not called
    torch.testing.assert_close(composed, output)
    torch.testing.assert_close(others, gradients)
    torch.testing.assert_close(compact(images), output)
    assert calls["0.0"] == 1
