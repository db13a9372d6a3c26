"""Measured times: each layer once, kept on disk, believed only where they are plausible."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cases import TiedLinears, cnn_input, small_cnn
from rankprune import ConfigError, FixedRank, LatencyTable, LayerSpec, Runtime, latency, make_plan
from rankprune.latency import DENSE, Clock, Request, default_cache, timings
from rankprune.low_rank import low_rank_layers
from runs import exit_code, in_child

EAGER = Runtime(backend="eager", threads=1)
SPEC = LayerSpec(kind="linear", in_channels=16, out_channels=16, bias=True)
SHAPE = (2, 16)
REQUEST = Request(SPEC, SHAPE, {"linear": [2, 4, 8]})


class _Machine:
    """Stands for a machine on which a parameter takes a microsecond an example."""

    def __init__(self) -> None:
        self.speed = 1.0
        self.measured: list[list[str]] = []

    def takes(self, chain: tuple[Sequence[LayerSpec], Sequence[int]]) -> float:
        specs, shape = chain
        return sum(spec.params for spec in specs) * shape[0] / 1000 / self.speed

    def __call__(self, calls: Mapping[str, Any], *_: Any) -> dict[str, float]:
        self.measured.append(list(calls))
        return {name: self.takes(chain) for name, chain in calls.items()}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> _Machine:
    made = _Machine()
    if "real" not in request.fixturenames:
        monkeypatch.setattr(Runtime, "prepare_chain", lambda self, specs, shape: (specs, shape))
        monkeypatch.setattr(latency, "measure", made)
    return made


@pytest.fixture
def real() -> None:
    """Really measure."""


def _table(folder: Path | str, **options: Any) -> LatencyTable:
    return LatencyTable(EAGER, cache=folder, **options)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _file(folder: Path) -> Path:
    (path,) = _files(folder)
    return path


def _times(table: LatencyTable) -> list[float]:
    ranks = [table.factorized(SPEC, "linear", rank, [SHAPE]) for rank in (2, 4, 8)]
    return [table.dense(SPEC, [SHAPE]), *ranks]


# 16·16+16 parameters and (16+16)·r+16, on two examples
TIMES = pytest.approx([0.544, 0.16, 0.288, 0.544])

# -- what is measured ------------------------------------------------------------------------------


def test_equal_layers_are_measured_once(machine: _Machine) -> None:
    table = _table("")
    table.measure([REQUEST, REQUEST, Request(SPEC, SHAPE, {"linear": [4, 12]})])
    assert machine.measured == [[DENSE, "linear:2", "linear:4", "linear:8", "linear:12"]]
    assert (table.measured, table.reused) == (5, 0)
    assert _times(table) == TIMES
    table.measure([REQUEST])
    assert (table.measured, table.reused) == (5, 4)
    assert len(machine.measured) == 1


def test_other_shapes_and_layers_are_measured_apart(machine: _Machine) -> None:
    wide = LayerSpec(kind="linear", in_channels=16, out_channels=32, bias=True)
    table = _table("")
    table.measure([REQUEST, Request(SPEC, (6, 16), {"linear": [2]}), Request(wide, SHAPE, {})])
    assert len(machine.measured) == 3
    assert table.dense(SPEC, [SHAPE, (6, 16), SHAPE]) == pytest.approx(0.544 * (1 + 3 + 1))
    assert table.factorized(SPEC, "linear", 2, [SHAPE, (6, 16)]) == pytest.approx(0.16 * 4)
    assert table.knows(SPEC, [SHAPE, (6, 16)])
    assert not table.knows(SPEC, [SHAPE, (7, 16)])
    assert not table.knows(SPEC, [])


@pytest.mark.parametrize(
    "other",
    [
        LayerSpec(kind="linear", in_channels=16, out_channels=16, bias=False),
        LayerSpec(kind="hf_conv1d", in_channels=16, out_channels=16, bias=True),
    ],
    ids=["without_bias", "Conv1D"],
)
def test_layers_that_compute_alike_share_a_measurement(machine: _Machine, other: LayerSpec) -> None:
    table = _table("")
    table.measure([REQUEST, Request(other, SHAPE, {"linear": [2]})])
    assert len(machine.measured) == 1
    assert table.dense(other, [SHAPE]) == table.dense(SPEC, [SHAPE])


def test_ranks_between_are_interpolated_and_those_beyond_scaled() -> None:
    table = _table("")
    table.measure([REQUEST])
    at = [table.factorized(SPEC, "linear", rank, [SHAPE]) for rank in (1, 2, 3, 6, 8, 16)]
    assert at == pytest.approx([0.16, 0.16, 0.224, 0.416, 0.544, 1.088])
    with pytest.raises(ConfigError, match="no rank of scheme 'channel' was measured"):
        table.factorized(SPEC, "channel", 2, [SHAPE])


def test_more_ranks_are_tied_to_the_first_measurement(machine: _Machine, tmp_path: Path) -> None:
    """By the dense layer, which is measured again: here the machine has become half as fast."""
    _table(tmp_path).measure([REQUEST])
    machine.speed = 0.5
    table = _table(tmp_path)
    table.measure([Request(SPEC, SHAPE, {"linear": [4, 6]})])
    assert machine.measured[1:] == [[DENSE, "linear:6"]]
    assert (table.measured, table.reused) == (1, 2)
    assert table.factorized(SPEC, "linear", 6, [SHAPE]) == pytest.approx(0.416)
    assert _times(table) == TIMES
    stored = json.loads(_file(tmp_path).read_text())["milliseconds"]
    assert stored.keys() == {DENSE, "linear:2", "linear:4", "linear:6", "linear:8"}
    assert stored[DENSE] == pytest.approx(0.544)


def test_progress_is_told_before_each_layer_and_at_the_end() -> None:
    told: list[tuple[int, int, str]] = []
    table = _table("", progress=lambda *args: told.append(args))
    conv = LayerSpec.of(nn.Conv2d(3, 8, 3))
    assert conv is not None
    table.measure([REQUEST, Request(conv, (1, 3, 8, 8), {"channel": [2]}), REQUEST])
    assert told == [
        (0, 2, "linear 16 → 16 on 2×16"),
        (1, 2, "conv 3 → 8 3×3 on 1×3×8×8"),
        (2, 2, ""),
    ]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=400, unique=True).map(sorted))
def test_a_sample_of_ranks(ranks: list[int]) -> None:
    """Some of them, ascending, the first and the last among them, denser at the start."""
    few = LatencyTable.sample(ranks)
    places = [ranks.index(rank) for rank in few]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, len(ranks) - 1)
    assert len(few) <= 10
    assert len(few) == len(ranks) or len(ranks) > 2
    steps = [b - a for a, b in itertools.pairwise(places)]
    assert all(after >= before - 1 for before, after in itertools.pairwise(steps))


# -- the cache -------------------------------------------------------------------------------------


def test_a_measurement_is_kept(machine: _Machine, tmp_path: Path) -> None:
    first = _table(tmp_path)
    first.measure([REQUEST])
    path = _file(tmp_path)
    assert path.parent == tmp_path / "latency-2" / EAGER.fingerprint()
    document = json.loads(path.read_text())
    assert document["environment"] == EAGER.environment()
    assert document["shape"] == [2, 16]
    assert document["layer"]["in_channels"] == 16
    second = _table(tmp_path)
    second.measure([REQUEST])
    assert (second.measured, second.reused) == (0, 4)
    assert _times(second) == _times(first) == TIMES
    assert len(machine.measured) == 1


def test_another_runtime_measures_anew(machine: _Machine, tmp_path: Path) -> None:
    _table(tmp_path).measure([REQUEST])
    other = LatencyTable(Runtime(backend="eager", threads=2), cache=tmp_path)
    other.measure([REQUEST])
    assert (other.measured, other.reused) == (4, 0)
    assert len(_files(tmp_path)) == 2


_GOOD = {DENSE: 3.0, "linear:2": 1.0}
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"milliseconds": {"dense": 3.0, "lin',
    "binary": bytes(range(256)),
    "nested": b"[" * 200_000,
    "null": b"null",
    "a list": b"[1]",
    "a number": b"3",
    "another file": b'{"name": "x"}',
    "no times": b'{"milliseconds": null}',
    "times in a list": b'{"milliseconds": ["dense", 3.0]}',
    "huge": json.dumps({"milliseconds": _GOOD, "x": " " * 2**20}).encode(),
    "a huge number": b'{"milliseconds": {"dense": ' + b"9" * 5000 + b"}}",
    **{
        label: json.dumps({"milliseconds": entry}).encode()
        for label, entry in {
            "nothing": {},
            "no dense": {"linear:2": 1.0},
            "nan": {**_GOOD, "linear:2": math.nan},
            "infinite": {**_GOOD, DENSE: math.inf},
            "zero": {**_GOOD, DENSE: 0.0},
            "negative": {**_GOOD, "linear:4": -1.0},
            "text": {**_GOOD, DENSE: "3.0"},
            "true": {**_GOOD, DENSE: True},
            "rank in words": {**_GOOD, "linear:two": 1.0},
            "rank 0": {**_GOOD, "linear:0": 1.0},
            "negative rank": {**_GOOD, "linear:-2": 1.0},
            "no rank": {**_GOOD, "linear": 1.0},
            "endless rank": {**_GOOD, "linear:" + "9" * 5000: 1.0},
        }.items()
    },
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=[k.replace(" ", "_") for k in CONTENTS])
def test_what_is_no_measurement_is_written_anew(tmp_path: Path, content: bytes) -> None:
    _table(tmp_path).measure([REQUEST])
    good = _file(tmp_path).read_bytes()
    _file(tmp_path).write_bytes(content)
    table = _table(tmp_path)
    table.measure([REQUEST])
    assert (table.measured, table.reused) == (4, 0)
    assert _times(table) == TIMES
    assert _file(tmp_path).read_bytes() == good


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    """And links are replaced, not followed."""
    _table(tmp_path / "cache").measure([REQUEST])
    path = _file(tmp_path / "cache")
    outside = tmp_path / "outside"
    path.unlink()
    if kind == "link":
        outside.write_text(json.dumps({"milliseconds": _GOOD}))
    if "link" in kind:
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    table = _table(tmp_path / "cache")
    table.measure([REQUEST])
    assert (table.measured, table.reused) == (4, 0)
    assert _times(table) == TIMES
    assert outside.exists() == (kind == "link")
    if kind == "link":
        assert json.loads(outside.read_text()) == {"milliseconds": _GOOD}
    if kind != "folder":
        assert not path.is_symlink()
        assert json.loads(path.read_text())["milliseconds"][DENSE] == pytest.approx(0.544)
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/rankprune"])
def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("here")
    table = _table(tmp_path / folder)
    table.measure([REQUEST])
    assert _times(table) == TIMES
    assert [path.name for path in _files(tmp_path)] == ["file"]
    assert (tmp_path / "file").read_text() == "here"


def test_no_cache_is_kept_where_none_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANKPRUNE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for _ in range(2):
        table = _table("")
        table.measure([REQUEST])
        assert table.measured == 4
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKPRUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "rankprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == tmp_path / "home" / ".cache" / "rankprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "rankprune"
    monkeypatch.setenv("RANKPRUNE_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    LatencyTable(EAGER).measure([REQUEST])
    assert _file(tmp_path).is_relative_to(tmp_path / "own" / "latency-2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_several_processes_share_a_cache(tmp_path: Path) -> None:
    """Nobody ever reads half an entry; what one of them loses to another is measured again."""

    def fill(first: int) -> None:
        for turn in range(150):
            rank = 1 + (7 * turn + first) % 64
            table = _table(tmp_path)
            table.measure([Request(SPEC, SHAPE, {"linear": [rank]})])
            assert table.dense(SPEC, [SHAPE]) == pytest.approx(0.544)
            for path in tmp_path.rglob("*.json"):
                json.loads(path.read_text())

    children = [in_child(lambda first=first: fill(first)) for first in range(4)]  # type: ignore[misc]
    assert [exit_code(child) for child in children] == [0] * 4
    assert len(json.loads(_file(tmp_path).read_text())["milliseconds"]) > 10


# -- whole networks --------------------------------------------------------------------------------


class _Recorder:
    """Stands for `Runtime.prepare`: keeps the networks that are to be timed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks: list[nn.Module] = []
        monkeypatch.setattr(Runtime, "prepare", self._prepare)
        self.answers = iter([{DENSE: 5.0}, {DENSE: 4.0, "compact": 3.0}])
        monkeypatch.setattr(latency, "measure", lambda calls, *_: next(self.answers))

    def _prepare(self, model: nn.Module, inputs: Any) -> Callable[[], None]:
        self.networks.append(model)
        return lambda: None


@pytest.mark.parametrize("build", [small_cnn, TiedLinears])
def test_a_clock_times_the_network_as_it_would_be(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module]
) -> None:
    recorder = _Recorder(monkeypatch)
    model = build()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = cnn_input() if build is small_cnn else torch.randn(2, 20)
    plan = make_plan(model, FixedRank(3), guard=False)
    state = torch.random.get_rng_state()
    clock = Clock(model, x, EAGER)
    assert (clock.dense_ms, clock.compact_ms) == (5.0, 5.0)
    clock.measure(plan.layers)
    assert (clock.dense_ms, clock.compact_ms) == (4.0, 3.0)
    dense, compact = recorder.networks
    assert dense is model
    found = {name: layer.layer.rank for name, layer in low_rank_layers(compact).items()}
    expected = {name: x.rank for x in plan.factorized for name in (x.name, *x.tied)}
    assert found == expected
    with torch.no_grad():
        answers = compact.eval()(x)
    assert torch.isfinite(answers).all()
    assert answers.abs().max() > 1e-3
    # the model itself is as it was
    assert not low_rank_layers(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert clock.result() == {**EAGER.environment(), "batch": 2, "dense_ms": 4.0, "compact_ms": 3.0}
    assert json.loads(json.dumps(clock.result())) == clock.result()


def test_a_dense_plan_takes_what_the_dense_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = _Recorder(monkeypatch)
    model = small_cnn()
    clock = Clock(model, cnn_input(), EAGER)
    clock.compact_ms = 1.0
    clock.measure([layer.left_dense("") for layer in make_plan(model, FixedRank(3)).layers])
    assert (clock.dense_ms, clock.compact_ms) == (5.0, 5.0)
    assert len(recorder.networks) == 1


# -- the stop-watch --------------------------------------------------------------------------------


class _Time:
    """A clock that only its calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float, first: float = 0.0) -> Callable[[], None]:
        """A call that takes longer when it is made for the first time."""
        extra = iter([first])

        def run() -> None:
            self.order.append(name)
            self.now += seconds + next(extra, 0.0)

        return run


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(("seconds", "rounds"), [(2.0, 50), (2.01, 51), (0.001, 5), (1000.0, 101)])
def test_rounds_follow_from_the_duration(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    """By turns, after one round that warms up and one that tells how long it takes."""
    clock = _Time(monkeypatch)
    calls = {"a": clock.call("a", 1 / 128, first=9.0), "b": clock.call("b", 1 / 32)}
    found = timings(calls, seconds * (5 / 128) * 25)
    monkeypatch.undo()
    assert clock.order == ["a", "b"] * (rounds + 2)
    assert {name: set(values) for name, values in found.items()} == {"a": {1 / 128}, "b": {1 / 32}}


@pytest.mark.usefixtures("real")
def test_a_disturbed_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Time(monkeypatch)
    durations = itertools.cycle([0.5, 0.5, 8.0])

    def run() -> None:
        clock.now += next(durations)

    found = latency.measure({"a": run, "b": clock.call("b", 0.125)}, 1.0)
    monkeypatch.undo()
    assert found == {"a": 500.0, "b": 125.0}


@pytest.mark.usefixtures("real")
def test_a_layer_is_really_measured() -> None:
    table = _table("")
    table.measure([Request(SPEC, SHAPE, {"linear": [4]})])
    assert table.measured == 2
    assert 0 < table.dense(SPEC, [SHAPE]) < 1e4
    assert 0 < table.factorized(SPEC, "linear", 4, [SHAPE]) < 1e4
