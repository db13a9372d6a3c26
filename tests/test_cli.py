"""The command line as a person or a script uses it: in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rankprune as rp
from rankprune import latency
from rankprune.recipes.config import make_config, to_yaml
from rankprune.recipes.models import build_model
from rankprune.runtimes import Run
from runs import FORKS, cli, records, torchrun, wait_for

pytestmark = FORKS

IMAGES = ("--data", "fake", "--image-size", "16")
RUN = [
    "train",
    *IMAGES,
    "--model",
    "digits_cnn",
    "--scheme",
    "spatial",
    "--flops",
    "0.4",
    "--batch-size",
    "64",
]
REPORT_KEYS = {
    "dense",
    "projected",
    "compact",
    "layers",
    "max_logit_error",
    "environment",
    "latency",
}


def test_as_a_program() -> None:
    program = [sys.executable, "-m", "rankprune.cli"]
    for args, code in (("--help", 0), ("report none", 3)):
        done = subprocess.run(
            [*program, *args.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done
        assert ("Usage" in done.stdout) is (code == 0)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; sys.argv = ['rankprune', '--help']\nfrom rankprune import cli\n"
    code += "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("train --data nope --model digits_cnn --flops .5", 2, "unknown data set"),
        ("train --data fake --model nope --flops .5", 2, "unknown pytorchcv model"),
        ("train --data fake --model digits_cnn --flops 1.5", 2, "at most 1"),
        ("train --data fake --model digits_cnn --flops .001", 4, "closest"),
        ("train --data imagefolder:/none --model digits_cnn --flops .5", 3, "no such folder"),
        ("train --data fake --model digits_cnn --flops .5 --config none.yaml", 3, "no such file"),
        ("train --data fake --model digits_cnn --flops .5 --precision fp16", 2, "needs a GPU"),
        ("train --data fake --model digits_cnn --flops .5 --preset new", 2, "unknown preset"),
        ("train --data fake --model digits_cnn --latency fast", 2, "milliseconds, such as 12ms"),
        ("train --data fake --model digits_cnn --flops .5 --backend tpu", 2, "unknown backend"),
        ("compress none.pt --model digits_cnn --input-size 1x8x8 --flops .5", 3, "no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, args: str, code: int, message: str
) -> None:
    done = cli(*args.split(), "--out", "out", code=code, cwd=tmp_path)
    assert message in done.stderr
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("compress {} --flops .5 --out o --streaming", "--streaming is for hf: models"),
        ("compress {} --flops .5 --out o --window 9", "--window is for hf: models"),
        ("compress hf:d --flops .5 --out o --threads 2", "--threads is not for hf: models"),
        ("compress {} --model digits_cnn --flops .5 --out o --data fake --input-size 3x8x8",
         "were asked for"),
        ("compress {} --flops .5 --out o --data digits --calib digits --samples 0", "--samples"),
        ("export {} --out o --batch 0", "--batch"),
        ("train --data fake --flops .5 --model pair_net:make --out o",
         "returns a tuple in training, not logits"),
    ],
)  # fmt: skip
def test_options_are_obeyed_or_refused(tmp_path: Path, args: str, message: str) -> None:
    (tmp_path / "pair_net.py").write_text(
        "from torch import nn\n"
        "class Pair(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)), None\n"
        "def make():\n"
        "    return Pair(3 * 32 * 32, 10)\n"
    )
    weights = tmp_path / "w.pt"
    torch.save(build_model("digits_cnn", classes=10).state_dict(), weights)
    done = cli(*(arg.format(weights) for arg in args.split()), code=2, cwd=tmp_path)
    assert message in done.stderr
    assert not (tmp_path / "o").exists()


def test_weights_that_give_no_numbers(tmp_path: Path) -> None:
    state = build_model("digits_cnn", classes=10).state_dict()
    state["17.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    args = ("eval", tmp_path / "w.pt", "--model", "digits_cnn", *IMAGES, "--json")
    done = cli(*args, "--part", "val", code=1)
    assert "the loss is nan" in done.stderr
    assert "which images were kept back from training is not recorded" in done.stderr


def test_usage_errors_exit_2() -> None:
    cli("nothing", code=2)
    cli("train", "--epochs", "many", "--out", "x", code=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs, interrupted by nothing."""
    out = tmp_path_factory.mktemp("cli") / "run"
    cli(*RUN, "--epochs", 3, "--out", out)
    return out


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    document = json.loads((finished / "report.json").read_text())
    assert set(document) == REPORT_KEYS
    assert document["compact"]["flops"] <= 0.4 * document["dense"]["flops"]
    assert document["compact"]["accuracy"] == document["projected"]["accuracy"]
    assert document["max_logit_error"] < 1e-4
    compact = rp.load(build_model("digits_cnn", classes=10), finished / "compact")
    assert rp.count_params(compact) == document["compact"]["params"]
    shown = json.loads(cli("report", finished, "--json").stdout)
    assert shown == document
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    measured = json.loads(cli("eval", finished / "compact", *IMAGES, "--json").stdout)
    assert measured["accuracy"] == document["compact"]["accuracy"]
    assert measured["flops"] == document["compact"]["flops"]
    # by then the factors were trained, and they are what the checkpoint holds
    last = ("eval", finished / "checkpoint.pt", *IMAGES, "--model", "digits_cnn", "--json")
    assert json.loads(cli(*last).stdout)["flops"] == document["compact"]["flops"]
    assert (
        "factorised already"
        in cli(
            *RUN, "--weights", finished / "compact", "--out", finished.parent / "again", code=2
        ).stderr
    )


@pytest.mark.slow
def test_an_existing_run_is_never_overwritten(finished: Path) -> None:
    before = (finished / "report.json").read_bytes()
    done = cli(*RUN, "--epochs", 3, "--out", finished, code=3)
    assert "--resume auto" in done.stderr
    done = cli(*RUN, "--epochs", 4, "--out", finished, "--resume", "auto", code=2)
    assert "epochs: 3 → 4" in done.stderr
    again = cli(*RUN, "--epochs", 3, "--out", finished, "--resume", "auto", "--json")
    assert json.loads(again.stdout) == json.loads(before)
    assert (finished / "report.json").read_bytes() == before


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "compact" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_bits(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rankprune.cli", *RUN, "--epochs", "3", "--out", str(out)]
    command += ["--checkpoint-every", "3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=env)
    wait_for(out / "checkpoint.pt", lambda: process.poll() is None)
    process.send_signal(number)
    process.communicate()
    expected = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert process.returncode == expected[number]
    assert not (out / "report.json").exists()
    subprocess.run([*command, "--resume", "auto"], check=True, capture_output=True, env=env)
    resumed, straight = _weights(out), _weights(finished)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


@pytest.mark.slow
def test_demo_prints_one_json_object_and_keeps_its_promises() -> None:
    document: dict[str, Any] = json.loads(cli("demo", "--json").stdout)
    assert set(document) == REPORT_KEYS
    for side in ("dense", "compact"):
        assert set(document[side]) == {"accuracy", "params", "flops", "bytes"}
    assert document["dense"]["flops"] >= 2 * document["compact"]["flops"]
    assert document["compact"]["accuracy"] >= document["dense"]["accuracy"] - 0.005
    assert document["compact"]["accuracy"] == document["projected"]["accuracy"]
    assert document["max_logit_error"] <= 1e-4


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": build_model("digits_cnn", classes=10, channels=3).state_dict()}, path)
    return path


def test_compress_then_eval(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["compress", weights, "--model", "digits_cnn", "--input-size", "3x32x32"]
    dry = cli(*args, "--flops", 0.5, "--out", out, "--dry-run", "--json")
    assert not out.exists()
    done = cli(*args, "--flops", 0.5, "--out", out, "--json")
    document = json.loads(done.stdout)
    assert document == json.loads(dry.stdout)
    assert 0.49 <= document["compact"]["flops"] / document["dense"]["flops"] <= 0.5
    assert "exists already" in cli(*args, "--flops", 0.5, "--out", out, code=3).stderr
    cli(*args, "--flops", 0.6, "--out", out, "--force")
    cli("eval", out, "--data", "fake")
    assert (
        "factorised already"
        in cli(*["compress", out, "--flops", 0.5, "--out", tmp_path / "b"], code=2).stderr
    )


@pytest.mark.slow
def test_compress_to_a_time_then_bench_export_and_report(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By given times: whether a target can be met must not depend on what else a machine does."""

    def given(calls: Mapping[str, Run], *_: Any) -> dict[str, float]:
        for run in calls.values():
            run()
        if "compact" in calls:
            return {"dense": 10.0, "compact": 4.9}
        return {name: 10.0 if name == "dense" else 2.0 for name in calls}

    monkeypatch.setattr(latency, "measure", given)
    out, page, onnx = tmp_path / "compact", tmp_path / "page.html", tmp_path / "model.onnx"
    compress = ("compress", weights, "--model", "digits_cnn", "--input-size", "3x32x32")
    on = ("--backend", "eager", "--threads", 1, "--batch", 16)
    done = cli(*compress, *on, "--latency", 0.4, "--out", out, code=4)
    assert "takes 0.49 of the dense network's time on eager" in done.stderr
    assert not out.exists()
    done = cli(*compress, *on, "--latency", 0.5, "--out", out, "--json")
    assert "measuring layer 1 of" in done.stderr
    report = json.loads(done.stdout)
    (entry,) = report["latency"]
    assert (entry["backend"], entry["batch"], entry["threads"]) == ("eager", 16, 1)
    assert (entry["dense_ms"], entry["compact_ms"]) == (10.0, 4.9)
    assert rp.read_plan(out).metadata["latency"]["compact_ms"] == entry["compact_ms"]
    assert json.loads(cli("report", out, "--json").stdout) == report
    cli("report", out, "--html", page)
    assert "eager" in page.read_text()

    backends = ("--backend", "onnxruntime", "--backend", "eager")
    done = cli("bench", out, "--batch", 2, "--threads", 1, "--seconds", 0.1, "--json", *backends)
    measured = json.loads(done.stdout)
    assert (measured["batch"], measured["threads"]) == (2, 1)
    assert list(measured["backends"]) == ["onnxruntime", "eager"]
    for row in measured["backends"].values():
        assert {"dense_ms", "compact_ms", "speedup", "realised", "spread"} <= set(row)
        assert row["realised"] == pytest.approx(row["speedup"] / measured["flops_reduction"])
        assert row["dense"]["p20_ms"] <= row["dense_ms"] <= row["dense"]["p80_ms"]
        assert row["compact"]["file_bytes"] < row["dense"]["file_bytes"]
    assert "realised" in cli("bench", out, "--seconds", 0.1, "--backend", "eager").stdout
    assert "unknown backend" in cli("bench", out, "--backend", "tpu", code=2).stderr

    exported = json.loads(cli("export", out, "--out", onnx, "--json").stdout)
    assert exported["bytes"] == onnx.stat().st_size
    assert exported["difference"] < 1e-5
    assert "exists already" in cli("export", out, "--out", onnx, code=3).stderr
    cli("export", out, "--out", onnx, "--batch", 3, "--force")


def test_inspect_shows_spectra_and_draws_them(weights: Path, tmp_path: Path) -> None:
    args = ["inspect", weights, "--model", "digits_cnn", "--input-size", "3x32x32"]
    png = tmp_path / "spectra.png"
    document = json.loads(cli(*args, "--plot", png, "--flops", 0.5, "--json").stdout)
    assert {row["name"] for row in document["layers"]} >= {"0", "3", "17"}
    assert png.read_bytes().startswith(b"\x89PNG")
    rp.Plan.from_json(json.dumps(document["plan"]))
    assert "exists already" in cli(*args, "--plot", png, code=3).stderr


class Exploit:
    """A pickle that would leave a trace if it were run."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.trace,))


def test_a_function_that_a_file_names_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(
        "open('called', 'w').close()\nfrom torch.nn import Flatten as make\n"
    )
    options = {"data": "fake", "model": "own_net:make", "flops": 0.4}
    (tmp_path / "c.yaml").write_text(json.dumps(options))
    args = ("train", "--config", "c.yaml", "--out", "out")
    done = cli(*args, code=2, cwd=tmp_path)
    assert "confirm it with --model own_net:make" in done.stderr
    assert not (tmp_path / "called").exists()
    # then it is called; there is nothing to factorise in it
    assert "no layer" in cli(*args, "--model", "own_net:make", code=2, cwd=tmp_path).stderr
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "checkpoint.pt"])
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / name
    if name == "w.pt":
        torch.save({"state_dict": Exploit(str(trace))}, path)
    else:
        path.write_bytes(pickle.dumps(Exploit(str(trace))))
    args = ["compress", path, "--model", "digits_cnn", "--input-size", "1x8x8"]
    done = cli(*args, "--flops", 0.5, "--out", tmp_path / "out", code=3)
    assert str(path) in done.stderr.replace("\n", "")
    assert not trace.exists()


def test_weights_of_another_architecture_are_refused(weights: Path, tmp_path: Path) -> None:
    args = ["compress", weights, "--model", "resnet20_cifar10", "--input-size", "3x32x32"]
    done = cli(*args, "--flops", 0.5, "--out", tmp_path / "out", code=3)
    assert "weights of another model" in done.stderr


@pytest.mark.parametrize("flag", ["--force", "--resume auto"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, flag: str) -> None:
    """config.yaml is a common name: it does not make a folder ours."""
    (tmp_path / "config.yaml").write_text("my: own")
    (tmp_path / "thesis.txt").write_text("precious")
    done = cli(*RUN, *flag.split(), "--out", tmp_path, code=3)
    assert "something else than a run" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "thesis.txt"}


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ("--model no_such_net", 2),
        ("--flops 0.0001", 4),
        ("--precision fp16", 2),
        ("--batch-size 9999", 2),
    ],
)
@pytest.mark.parametrize("flag", ["--force", "--resume auto"])
def test_options_that_cannot_work_cost_no_earlier_run(
    tmp_path: Path, args: str, code: int, flag: str
) -> None:
    options = make_config({"data": "fake", "model": "digits_cnn", "flops": 0.4})
    (tmp_path / "config.yaml").write_bytes(to_yaml(options))
    for name in ("report.json", "notes.txt"):
        (tmp_path / name).write_text("kept")
    # resumed with other options is a usage error, whatever the options are
    cli(*RUN, *args.split(), *flag.split(), "--out", tmp_path, code=code if flag[2] == "f" else 2)
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "report.json").read_text() == "kept"


@pytest.mark.slow
def test_force_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    cli(*RUN, "--epochs", 1, "--out", tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    before = (tmp_path / "compact" / "plan.json").read_bytes()
    cli(*RUN, "--epochs", 1, "--seed", 1, "--out", tmp_path, "--force")
    assert (tmp_path / "compact" / "plan.json").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "kept"


def _kill_once_it_saves(command: list[str], out: Path, env: dict[str, str]) -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    wait_for(out / "checkpoint.pt", lambda: process.poll() is None)
    # torchrun's workers are in sessions of their own: they have to be killed one by one
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 3
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)
    assert not (out / "report.json").exists()


@pytest.mark.slow
def test_two_processes_train_one_network_and_resume(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = [*RUN, "--epochs", 2, "--checkpoint-every", 3]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    command = torchrun(2, *args, out=straight)
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((straight / "report.json").read_text())
    # two processes in one job, which share every batch: 7 batches of 64 are seen once, not twice
    assert document["environment"]["processes"] == 2
    assert [record["images"] for record in records(straight)] == [7 * 64] * 2
    # the saved statistics are those that were evaluated
    measured = json.loads(cli("eval", straight / "compact", *IMAGES, "--json").stdout)
    assert measured["accuracy"] == document["compact"]["accuracy"]

    command = torchrun(2, *args, out=resumed)
    _kill_once_it_saves(command, resumed, env)
    subprocess.run([*command, "--resume", "auto"], check=True, capture_output=True, env=env)
    before, after = _weights(straight), _weights(resumed)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert records(straight) == records(resumed)


def _write_jpegs(root: Path) -> Path:
    """ImageNet's folders in small: six classes, images of many sizes, some grey."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 7)):
        for label in range(6):
            folder = root / part / f"n{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(36, 90, 2)
                pixels = generator.normal(40 * label, 40, (height, width, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.convert("L" if index % 8 == 7 else "RGB").save(folder / f"{index}.JPEG")
    return root


@pytest.mark.slow
def test_three_processes_stream_a_folder_and_resume(tmp_path: Path) -> None:
    """As docs/imagenet.md says, with dropout, and with workers that differ from run to run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    data = ("--data", f"imagefolder:{_write_jpegs(tmp_path / 'data')}", "--image-size", 32)
    name = "torchvision:mobilenet_v3_small"
    torch.save(build_model(name, classes=6).state_dict(), tmp_path / "dense.pt")
    args: list[object] = ["train", "--preset", "paper-imagenet", *data, "--model", name]
    args += ["--weights", tmp_path / "dense.pt", "--scheme", "channel", "--lr", 0.01, "--every", 2]
    args += ["--epochs", 2, "--batch-size", 24, "--val-fraction", 0.2, "--checkpoint-every", 2]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    # from three on, the order in which processes add their gradients up changes the last bits
    subprocess.run(torchrun(3, *args, out=straight), check=True, capture_output=True, env=env)
    command = torchrun(3, *args, "--workers", 1, out=resumed)
    _kill_once_it_saves(command, resumed, env)
    subprocess.run([*command, "--resume", "auto"], check=True, capture_output=True, env=env)

    before, after = _weights(straight), _weights(resumed)
    assert all(torch.equal(before[key], after[key]) for key in before)
    metrics, report = records(straight), json.loads((straight / "report.json").read_text())
    assert metrics == records(resumed)
    assert report == json.loads((resumed / "report.json").read_text())
    assert [record["lr"] for record in metrics] == [0.01] * 2
    assert all(record["val_accuracy"] <= record["val_top5"] <= 1 for record in metrics)
    # 42 images over three processes are those that one process counts
    for kind, weights in (("compact", straight / "compact"), ("dense", tmp_path / "dense.pt")):
        measured = json.loads(cli("eval", weights, "--model", name, *data, "--json").stdout)
        assert measured["accuracy"] == report[kind]["accuracy"]
        assert measured["accuracy"] <= measured["top5"]
        assert measured["images"] == 42


def _documented(page: str) -> list[str]:
    """The arguments of rankprune in every command of a page."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text().replace("\\\n", " ")
    return re.findall(r"^\$ (?:rankprune|torchrun .* -m rankprune\.cli) (.+)$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("args", _documented("imagenet.md"))
def test_documented_commands_lack_nothing_but_their_files(tmp_path: Path, args: str) -> None:
    done = cli(*shlex.split(args), code=3, cwd=tmp_path)
    assert re.search(
        r"^error: (imagenet: no such folder|runs/\S+: no (report|such file))", done.stderr
    )
