"""The examples run; those that train in a framework add no more than three lines to its loop."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.low_rank import plan_of

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = ["accelerate_loop.py", "hf_trainer.py", "lightning_trainer.py", "plain_pytorch.py"]
INT8 = {
    "int8_onnxruntime.py": ("onnx", "onnxscript", "onnxruntime"),
    "int8_torchao.py": ("torchao",),
}


DISTILL = "distill_transformer.py"


def test_each_is_tested() -> None:
    assert sorted([*EXAMPLES, *INT8, DISTILL]) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_at_most_three_lines_are_added(name: str) -> None:
    """Between the markers, every line that is rankprune's is marked as such."""
    lines = [line.strip() for line in (FOLDER / name).read_text("utf-8").splitlines()]
    assert lines.count("# begin") == lines.count("# end") == 1
    loop = lines[lines.index("# begin") + 1 : lines.index("# end")]
    added = [line for line in loop if line.endswith("  # rankprune")]
    assert 1 <= len(added) <= 3
    words = re.compile(r"\b(rp|rankprune|trp|prune|RankPruneCallback)\b")
    assert [line for line in loop if words.search(line)] == added


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_the_compact_model_is_as_accurate(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path)
    accuracies = re.search(r"projected ([\d.]+)%, compact ([\d.]+)%", printed)
    assert accuracies is not None, printed
    projected, compact = map(float, accuracies.groups())
    assert projected >= 90
    # a picture on the brink may tip over
    assert abs(projected - compact) <= 0.2
    flops = re.search(r"^FLOPs +\S+ → \S+ \(([\d.]+)×\)$", printed, re.MULTILINE)
    assert flops is not None, printed
    assert float(flops[1]) >= 2.4


@pytest.mark.slow
def test_distillation_heals_and_the_saved_model_is_the_healed_one(tmp_path: Path) -> None:
    printed = run(DISTILL, tmp_path)
    found = re.findall(r"^(one shot|distilled|loaded) +([\d.]+)", printed, re.MULTILINE)
    away = {name: float(value) for name, value in found}
    assert away["distilled"] < 0.6 * away["one shot"], printed
    assert away["loaded"] == away["distilled"]
    projected = re.search(r"^TRP +([\d.]+) projected, ([\d.]+) factorised", printed, re.MULTILINE)
    assert projected is not None, printed
    assert float(projected[1]) == pytest.approx(float(projected[2]), abs=1e-4)
    assert float(projected[2]) < 0.6 * away["one shot"]


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_int8_keeps_the_accuracy_in_a_third_of_the_file(name: str, tmp_path: Path) -> None:
    for package in INT8[name]:
        pytest.importorskip(package, reason=f"{name} needs {package}")
    printed = run(name, tmp_path)
    rows = {
        label: (float(accuracy), float(size))
        for label, accuracy, size in re.findall(
            r"^(\S+ \S+) +([\d.]+)% +(\d+)kB +[\d.]+×$", printed, re.MULTILINE
        )
    }
    dense, compact = rows.pop("fp32 dense"), rows.pop("fp32 compact")
    assert dense[0] >= 94
    assert compact[0] >= dense[0] - 2
    assert compact[1] < 0.55 * dense[1]
    assert rows
    for accuracy, size in rows.values():
        assert accuracy >= compact[0] - 1
        assert size < 0.4 * compact[1]


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao_quantises_the_factors(config: str) -> None:
    """They are plain linear layers to it, and their LowRank layers are what they were."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128)).eval()
    plan = rp.make_plan(model, rp.FixedRank(16))
    compact = rp.factorize(model, plan)
    quantised = copy.deepcopy(compact)
    quantization.quantize_(quantised, getattr(quantization, config)())

    for name in ("0", "2"):
        layer = quantised.get_submodule(name)
        assert type(layer) is rp.LowRank
        assert [type(factor) for factor in layer] == [nn.Linear, nn.Linear]
        assert {type(factor.weight).__name__ for factor in layer} == {"Int8Tensor"}
    assert plan_of(quantised) == plan_of(compact)

    x = torch.randn(32, 64)
    with torch.no_grad():
        exact, answers = compact(x), quantised(x)
        assert torch.equal(copy.deepcopy(quantised)(x), answers)
    error = (answers - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def run(name: str, folder: Path) -> str:
    """What an example prints; it leaves nothing behind."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout
