"""Saving and loading: nothing lost, nothing believed, nothing run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cases import (
    Conv1D,
    SharedModule,
    TiedConvs,
    TiedEmbedding,
    TiedLinears,
    cnn_input,
    mlp,
    resnet18,
    small_cnn,
    write_plan,
)
from rankprune import (
    FileError,
    FixedRank,
    LayerError,
    PlanError,
    RankPruneError,
    Ratio,
    count_params,
    factorize,
    load,
    make_plan,
    plan_of,
    read_plan,
    save,
    serialize,
)
from rankprune.files import file_sha256
from rankprune.low_rank import low_rank_layers
from runs import equal, exit_code, in_child

WEIGHTS, PLAN = "model.safetensors", "plan.json"


def _compact(build: Callable[[], nn.Module], share: float = 0.4) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    # channel's matrices are the quickest to decompose
    scheme = "channel" if build is resnet18 else "auto"
    return factorize(model, make_plan(model, Ratio(share), scheme=scheme, guard=False))


def _fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(99)
    return build()


def _states_equal(one: nn.Module, other: nn.Module) -> bool:
    return equal(one.state_dict(), other.state_dict())


def _listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _bfloat16() -> nn.Module:
    return small_cnn().to(torch.bfloat16)


def _double() -> nn.Module:
    return small_cnn().double()


def _channels_last() -> nn.Module:
    return small_cnn().to(memory_format=torch.channels_last)


def _hugging_face() -> nn.Module:
    return nn.Sequential(Conv1D(20, 12), nn.ReLU(), nn.Linear(20, 12))


def _without_bias() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ConvTranspose2d(8, 8, 3, bias=False))


SAVED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "small_cnn": (small_cnn, cnn_input()),
    "bf16": (_bfloat16, cnn_input().to(torch.bfloat16)),
    "fp64": (_double, cnn_input().double()),
    "tied_linears": (TiedLinears, torch.ones(2, 20)),
    "tied_convs": (TiedConvs, torch.ones(2, 12, 6, 6)),
    "tied_embedding": (TiedEmbedding, torch.arange(6).view(2, 3)),
    "shared_module": (SharedModule, torch.ones(2, 20)),
    "hugging_face": (_hugging_face, torch.ones(2, 12)),
    "without_bias": (_without_bias, torch.ones(1, 3, 6, 6)),
    "resnet18": (resnet18, torch.ones(1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_loaded_model_answers_exactly_the_same(name: str, tmp_path: Path) -> None:
    build, x = SAVED[name]
    model = _compact(build).eval()
    assert save(model, tmp_path / "out") == tmp_path / "out"
    fresh = _fresh(build)
    loaded = load(fresh, tmp_path / "out").eval()
    assert loaded is fresh
    assert _states_equal(loaded, model)
    assert count_params(loaded) == count_params(model)
    assert plan_of(loaded) == plan_of(model) == read_plan(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [WEIGHTS, PLAN]


def test_a_channels_last_model_keeps_its_weights(tmp_path: Path) -> None:
    model = _compact(_channels_last)
    save(model, tmp_path)
    assert _states_equal(load(_fresh(small_cnn), tmp_path), model)
    dense = _channels_last()
    save(dense, tmp_path / "dense")
    assert _states_equal(load(_fresh(small_cnn), tmp_path / "dense"), dense)


def test_a_dense_model_can_be_saved_too(tmp_path: Path) -> None:
    model = small_cnn()
    save(model, tmp_path)
    loaded = load(_fresh(small_cnn), tmp_path)
    assert _states_equal(loaded, model)
    assert not low_rank_layers(loaded)


def test_dtype_mode_and_gradients_of_a_loaded_model(tmp_path: Path) -> None:
    """The saved dtype, the fresh model's modes and requires_grad."""
    save(_compact(_double), tmp_path)
    fresh = _fresh(small_cnn).eval()
    fresh[0].weight.requires_grad_(False)
    loaded = load(fresh, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert not any(module.training for module in loaded.modules())
    assert not any(p.requires_grad for p in (loaded[0][0].weight, loaded[0][1].weight))
    assert loaded[3][0].weight.requires_grad


def test_shared_tensors_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    model = _compact(TiedLinears)
    save(model, tmp_path)
    assert "b.0.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = load(_fresh(TiedLinears), tmp_path)
    assert loaded.a[0].weight is loaded.b[0].weight


def test_a_factorised_part_of_a_larger_model_is_found_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), _compact(mlp))
    save(model, tmp_path)
    loaded = load(nn.Sequential(nn.Linear(16, 16), mlp()), tmp_path)
    assert _states_equal(loaded, model)


def test_the_given_plan_and_metadata_are_kept(tmp_path: Path) -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(8), example_inputs=cnn_input())
    compact = factorize(model, plan)
    save(compact, tmp_path, plan=plan, metadata={"model": "cnn", "classes": [1, 2], "x": None})
    found = read_plan(tmp_path)
    assert found.layers == plan.layers
    assert any(layer.dense for layer in found.layers)
    assert dict(found.metadata) == {"model": "cnn", "classes": [1, 2], "x": None}
    with pytest.raises(PlanError, match="not the one that this model was factorised with"):
        save(compact, tmp_path / "b", plan=make_plan(model, FixedRank(3)))
    assert not (tmp_path / "b").exists()


def test_metadata_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="metadata"):
        save(small_cnn(), tmp_path / "out", metadata={"x": object()})
    with pytest.raises(PlanError, match="metadata"):
        save(small_cnn(), tmp_path / "out", metadata={"x": float("nan")})
    assert not (tmp_path / "out").exists()


def test_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

    with pytest.raises(LayerError, match=r"'0\._extra_state': it is a dict"):
        save(nn.Sequential(Extra(8, 8)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- overwriting and crashes -----------------------------------------------------------------------


def test_a_model_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    save(_compact(mlp), tmp_path)
    before = _listing(tmp_path)
    with pytest.raises(FileError, match="holds a saved model already; choose another folder"):
        save(_compact(small_cnn), tmp_path)
    assert _listing(tmp_path) == before


def test_overwriting_leaves_the_new_model_alone(tmp_path: Path) -> None:
    """Again and again, also with a model that was there before."""
    (tmp_path / "notes.txt").write_text("mine")
    for share in (0.2, 0.4, 0.4, 0.2, 0.3):
        model = _compact(mlp, share)
        save(model, tmp_path, overwrite=True)
        assert _states_equal(load(_fresh(mlp), tmp_path), model)
        assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "notes.txt").read_text() == "mine"


# How often an overwriting save uses each; where the old model is still the one that loads.
CALLS = {
    "os.replace": (2, 2),
    "os.fsync": (4, 3),
    "os.open": (3, 2),
    "save_file": (1, 1),
    "Path.mkdir": (2, 2),
}


def _break(monkeypatch: pytest.MonkeyPatch, call: str, nth: int, error: BaseException) -> None:
    """Let the nth use of a system call raise."""
    owner: Any = {"os": os, "Path": Path, "save_file": serialize}[call.split(".")[0]]
    name = call.split(".")[-1]
    original, count = getattr(owner, name), iter(range(1000))

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(count) == nth:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FileError),
        (KeyboardInterrupt("No space left on device"), KeyboardInterrupt),
    ],
    ids=["full_disk", "ctrl_c"],
)
@pytest.mark.parametrize("call", CALLS)
def test_a_save_that_fails_leaves_the_old_model_or_the_new(
    call: str, error: BaseException, expected: type[BaseException], tmp_path: Path
) -> None:
    """Whatever fails, at whichever use: one whole model, no temporaries, a typed error."""
    old, new = _compact(mlp, 0.2), _compact(mlp, 0.5)
    uses, uncommitted = CALLS[call]
    for nth in range(uses + 1):
        folder = tmp_path / str(nth)
        save(old, folder)
        with pytest.MonkeyPatch.context() as patch:
            _break(patch, call, nth, error)
            if nth < uses:
                with pytest.raises(expected, match="No space left on device"):
                    save(new, folder, overwrite=True)
            else:
                save(new, folder, overwrite=True)
        assert _states_equal(load(_fresh(mlp), folder), old if nth < uncommitted else new)
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
        save(new, folder, overwrite=True)
        assert _states_equal(load(_fresh(mlp), folder), new)
        assert len(list(folder.iterdir())) == 2


def test_a_first_save_that_fails_is_no_model(tmp_path: Path) -> None:
    for nth in range(2):
        folder = tmp_path / str(nth)
        with pytest.MonkeyPatch.context() as patch:
            _break(patch, "os.replace", nth, OSError(errno.EIO, "Input/output error"))
            with pytest.raises(FileError, match="Input/output error"):
                save(_compact(mlp), folder)
        with pytest.raises(FileError, match="no such file"):
            load(_fresh(mlp), folder)
        save(_compact(mlp), folder)
        assert _states_equal(load(_fresh(mlp), folder), _compact(mlp))
        assert len(list(folder.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    """100 times SIGKILL, spread over everything that a save asks of the system."""
    old, new = _compact(mlp, 0.2), _compact(mlp, 0.5)
    save(old, tmp_path)
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir"}
    outcomes = {"killed": 0, "old": 0, "new": 0}
    turn = (old, new)
    for attempt in range(100):
        left = [attempt % 25]

        def kill(event: str, _: Any, left: list[int] = left) -> None:
            if event in events:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        def killed_save(kill: Any = kill, model: nn.Module = turn[1]) -> None:
            sys.addaudithook(kill)
            save(model, tmp_path, overwrite=True)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later Pythons warn of fork beside threads
            code = exit_code(in_child(killed_save))
        assert code in (0, -signal.SIGKILL)
        outcomes["killed"] += code != 0
        loaded = load(_fresh(mlp), tmp_path)
        found = [model for model in turn if _states_equal(loaded, model)]
        assert len(found) == 1, attempt
        outcomes["old" if found[0] is turn[0] else "new"] += 1
        if found[0] is turn[1]:
            turn = (turn[1], turn[0])
    assert all(count >= 10 for count in outcomes.values()), outcomes
    save(old, tmp_path, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_stale_temporaries_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stale = [".plan.json.0123456789abcdef.tmp", ".model.safetensors.00000000ffffffff.tmp"]
    kept = [".plan.json.tmp", "notes.tmp", ".hidden", "model-notes.safetensors.bak"]
    for name in stale + kept:
        (tmp_path / name).write_text("x")
    half_written = tmp_path / ".model.safetensors.fedcba9876543210.tmp"
    half_written.mkdir()
    (half_written / WEIGHTS).write_text("x")
    (half_written / ".tmpl1AVsX").write_text("x")  # safetensors' own
    save(_compact(mlp), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, WEIGHTS, PLAN}


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder_is_a_typed_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileError, match="Permission denied"):
            save(_compact(mlp), tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileError, match="cannot write"):
        save(_compact(mlp), tmp_path / "out")
    with pytest.raises(FileError, match="no such folder"):
        load(mlp(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model whose two first layers share a weight, and a third has the same shape."""
    save(_compact(_look_alike), tmp_path / "out", metadata={"note": "free text", "n": 12})
    return tmp_path / "out"


def _look_alike() -> nn.Module:
    """Layers that one flipped bit of a name turns into each other."""
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(12, 12) for i in range(4)})
    layers["layer1"].weight = layers["layer0"].weight
    return _Chain(layers)


class _Chain(nn.Module):
    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def _answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 24).view(2, 12))


def _survives(folder: Path, expected: Tensor) -> bool:
    """Whether it loads; if so the answers must be the same, if not it must be a typed error."""
    model = _fresh(_look_alike)
    before = _answers(model)
    try:
        read_plan(folder)
        load(model, folder)
    except RankPruneError:
        # refused before the model was touched
        assert torch.equal(_answers(model), before)
        return False
    assert torch.equal(_answers(model), expected)
    return True


def test_flipped_bits_never_change_an_answer(saved: Path) -> None:
    """200 in the weights, 300 in the plan: all are refused."""
    expected = _answers(load(_fresh(_look_alike), saved))
    generator = random.Random(0)
    for name, count in ((WEIGHTS, 200), (PLAN, 300)):
        path = saved / name
        content = path.read_bytes()
        for bit in generator.sample(range(8 * len(content)), count):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert not _survives(saved, expected), (name, bit)
        path.write_bytes(content)
    assert _survives(saved, expected)


@pytest.mark.slow
def test_no_flipped_bit_of_the_plan_is_missed(saved: Path) -> None:
    """Every bit there is."""
    path = saved / PLAN
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(PlanError):
            read_plan(saved)


def test_a_plan_changed_by_hand_is_refused(saved: Path) -> None:
    """Also where the change would mean nothing."""
    text = (saved / PLAN).read_text()
    for changed in (
        text.replace("free text", "true text"),
        text + " ",
        text.replace("sha256", "x"),
    ):
        (saved / PLAN).write_text(changed)
        with pytest.raises(PlanError, match=r"plan\.json: (damaged or changed|'sha256' must be)"):
            read_plan(saved)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_truncated_files_are_refused(saved: Path, name: str) -> None:
    path = saved / name
    content = path.read_bytes()
    ends = sorted({0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content), len(content) // 40)})
    for end in ends:
        path.write_bytes(content[:end])
        with pytest.raises(RankPruneError):
            load(_fresh(_look_alike), saved)
    path.write_bytes(content + b"\0")
    with pytest.raises(RankPruneError):
        load(_fresh(_look_alike), saved)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / PLAN).read_text())
    change(document)
    write_plan(folder, document)


def _put(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: (document[section] if section else document).update(values)


HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_put("weights", file="../secret.safetensors"), "refused weights file name"),
    (_put("weights", file="/etc/passwd"), "refused weights file name"),
    (_put("weights", file="model.safetensors/../x"), "refused weights file name"),
    (_put("weights", file="model.safetensors\n"), "refused weights file name"),
    (_put("weights", file="model.pt"), "refused weights file name"),
    (_put("weights", file=".."), "refused weights file name"),
    (_put("weights", file=""), "refused weights file name"),
    (_put("weights", file=None), "refused weights file name"),
    (_put("weights", file="model-0123456789ab.safetensors"), "missing, or not a regular file"),
    (_put("weights", sha256="0" * 64), "damaged or changed"),
    (_put("weights", sha256="xyz"), "64 hexadecimal digits"),
    (_put("weights", sha256=None), "64 hexadecimal digits"),
    (_put("weights", extra=1), "must name file and sha256"),
    (_put("", weights=[]), "must name file and sha256"),
    (_put("", weights=None), "must name file and sha256"),
    (_put("", schema_version=99), "newer than this rankprune reads"),
    (_put("", layers=[]), "weights of another model"),
    (lambda d: d["layers"][0].update(rank=1), "weights of another model"),
    (lambda d: d["layers"][0].update(tied=["layers.layer2"]), "listed twice"),
    (
        lambda d: (d["layers"].pop(1), d["layers"][0].update(tied=["layers.layer2"])),
        "share one weight in the plan",
    ),
    (lambda d: d["layers"][0].update(tied=[]), "weights of another model"),
    (lambda d: d["layers"][0].update(name="layers.layer9"), "did you mean"),
    (lambda d: d["layers"][0].update(unknown=1), "unknown key 'unknown'"),
    (lambda d: d["layers"][0]["spec"].update(in_channels=13), "does not fit the plan"),
    (lambda d: d["layers"].pop(), "weights of another model"),
]


@pytest.mark.parametrize(("change", "complaint"), HOSTILE, ids=[row[1] for row in HOSTILE])
def test_hostile_plans_are_refused(
    saved: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    save_file({"x": torch.zeros(1)}, saved.parent / "secret.safetensors")
    _rewrite(saved, change)
    model = _fresh(_look_alike)
    before = _answers(model)
    with pytest.raises(RankPruneError, match=complaint):
        load(model, saved)
    assert torch.equal(_answers(model), before)
    assert not low_rank_layers(model)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_links_are_not_followed(saved: Path, name: str) -> None:
    moved = saved.parent / name
    shutil.move(saved / name, moved)
    (saved / name).symlink_to(moved)
    with pytest.raises(FileError, match=r"symbolic link|not a regular file"):
        load(_fresh(_look_alike), saved)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_missing_files_and_folders_in_their_place_are_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileError, match=r"no such file|missing"):
        load(_fresh(_look_alike), saved)
    (saved / name).mkdir()
    with pytest.raises(FileError, match="not a"):
        load(_fresh(_look_alike), saved)


CONTENTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "nan": b'{"schema_version": NaN}',
    "nested": b"[" * 200_000,
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00",
    "utf-16": '{"schema_version": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_is_no_plan_is_refused(saved: Path, content: bytes) -> None:
    (saved / PLAN).write_bytes(content)
    for read in (lambda: read_plan(saved), lambda: load(_fresh(_look_alike), saved)):
        with pytest.raises(PlanError, match=r"plan\.json: not valid JSON"):
            read()


def test_a_plan_of_enormous_size_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialize, "_MAX_PLAN_BYTES", 100)
    with pytest.raises(FileError, match="more than the 100"):
        read_plan(saved)


def _resign(folder: Path) -> None:
    """Make the plan's hash right again, as somebody would who tampers on purpose."""
    digest = file_sha256(folder / WEIGHTS)
    _rewrite(folder, _put("weights", sha256=digest))


def _retensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"aliases": "{}"})
        _resign(folder)

    return rewrite


def _rehead(header: dict[str, str]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=header)
        _resign(folder)

    return rewrite


def _raw(content: bytes) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)
        _resign(folder)

    return rewrite


def _whole_numbers(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as archive:
        header = archive.metadata()
    tensors = load_file(folder / WEIGHTS)
    first = min(key for key in tensors if key.endswith("weight"))
    tensors[first] = tensors[first].long()
    save_file(tensors, folder / WEIGHTS, metadata=header)
    _resign(folder)


_KEY = "layers.layer3.0.weight"
TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor less": (_retensor(lambda t: t.pop(_KEY)), "missing, such as"),
    "a tensor more": (_retensor(lambda t: t.update(x=torch.zeros(1))), "unknown, such as 'x'"),
    "another shape": (_retensor(lambda t: t.update({_KEY: torch.zeros(7)})), "another shape"),
    "whole numbers": (_whole_numbers, r"stored as torch\.int64"),
    "no aliases": (_rehead({}), "missing, such as 'layers.layer1.0.weight'"),
    "aliases of nothing": (_rehead({"aliases": '{"a": "b"}'}), "missing, such as"),
    "aliases not JSON": (_rehead({"aliases": "{"}), "not valid JSON"),
    "aliases deeply nested": (_rehead({"aliases": "[" * 100_000}), "not valid JSON"),
    "aliases a list": (_rehead({"aliases": "[1]"}), "must map names to names"),
    "aliases of numbers": (_rehead({"aliases": '{"a": 1}'}), "must map names to names"),
    "empty": (_raw(b""), "not a complete safetensors file"),
    "a huge header": (_raw(b"\xff" * 16), "not a complete safetensors file"),
    "a pickle": (_raw(b"\x80\x04cos\nsystem\n(S'true'\ntR."), "not a complete safetensors file"),
}


@pytest.mark.parametrize(
    ("tamper", "complaint"), TAMPERED.values(), ids=[key.replace(" ", "_") for key in TAMPERED]
)
def test_weights_that_were_tampered_with_and_signed_anew_are_refused(
    saved: Path, tamper: Callable[[Path], None], complaint: str
) -> None:
    tamper(saved)
    model = _fresh(_look_alike)
    before = _answers(model)
    with pytest.raises(FileError, match=complaint):
        load(model, saved)
    assert torch.equal(_answers(model), before)
    assert not low_rank_layers(model)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (mlp, "not in the model"),
        (lambda: _compact(_look_alike), "the model has LowRank"),
        (
            lambda: _Chain(nn.ModuleDict({f"layer{i}": nn.Linear(12, 12) for i in range(4)})),
            "share one weight in the plan, but not in the model",
        ),
    ],
    ids=["other", "factorised", "untied"],
)
def test_a_wrong_model_is_refused_untouched(
    saved: Path, other: Callable[[], nn.Module], complaint: str
) -> None:
    model = other()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RankPruneError, match=complaint):
        load(model, saved)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_dense_models_weights_do_not_fit_another(tmp_path: Path) -> None:
    save(small_cnn(), tmp_path)
    with pytest.raises(FileError, match="weights of another model: 2 missing, such as"):
        load(mlp(), tmp_path)


def test_no_code_from_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pickle nor eval nor exec is so much as called."""
    save(_compact(mlp), tmp_path)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("code from a file")

    for module, names in (("pickle", "load loads Unpickler"), ("builtins", "eval exec")):
        for name in names.split():
            monkeypatch.setattr(f"{module}.{name}", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    load(mlp(), tmp_path)


def test_a_reader_beside_a_writer_sees_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that commits between the reader's two files."""
    old, new = _compact(mlp, 0.2), _compact(mlp, 0.5)
    save(old, tmp_path)
    read = serialize._read_document
    pending: Iterator[nn.Module] = iter([new])

    def interrupted(folder: Path) -> Any:
        result = read(folder)
        for model in pending:
            save(model, tmp_path, overwrite=True)
        return result

    monkeypatch.setattr(serialize, "_read_document", interrupted)
    assert _states_equal(load(_fresh(mlp), tmp_path), new)


def test_others_may_read_what_new_files_may(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(_compact(mlp), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
