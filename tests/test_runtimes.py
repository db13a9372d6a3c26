"""Runtimes: whatever runs a network, it runs the same network."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import LAYERS, Case, cnn_input, mlp, relative_error, schemes_of, small_cnn
from rankprune import (
    BACKENDS,
    SCHEMES,
    ConfigError,
    ExportError,
    FixedRank,
    LayerSpec,
    MissingExtraError,
    Runtime,
    factorize,
    make_plan,
)
from rankprune.export import onnx_session
from rankprune.profile import call
from rankprune.runtimes import (
    _chain_onnx,
    alternate,
    fill_randomly,
    random_chain,
    random_input,
)
from rankprune.signal_stack import _SignalStack

# compiling takes half a minute
_SLOW = {"compile"}
INSTALLED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW))
    for name, backend in BACKENDS.items()
    if backend.installed()
]
QUICK = [name for name, backend in BACKENDS.items() if backend.installed() and name not in _SLOW]


def _runtime(backend: str, **options: Any) -> Runtime:
    return Runtime(backend=backend, **{"threads": 1, **options})


def _first(output: Any) -> Tensor:
    """The first output, in whatever a backend wraps it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    return torch.as_tensor(np.asarray(output[0]))


# -- what may be asked for -------------------------------------------------------------------------


def test_an_unknown_backend_lists_near_names() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'onxruntime'; did you mean 'onnxrun"):
        Runtime(backend="onxruntime")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_are_a_whole_number(threads: Any) -> None:
    with pytest.raises(ConfigError, match=r"Runtime\(threads=.*a whole number ≥ 1"):
        Runtime(threads=threads)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", "bf16"), ("onnxruntime", "int8"), ("eager", "fp64"), ("openvino", None)],
)
def test_a_backend_has_its_precisions(backend: str, precision: Any) -> None:
    with pytest.raises(ConfigError, match=f"{backend} measures in fp32"):
        Runtime(backend=backend, precision=precision)


def test_threads_are_torchs_own_where_not_given() -> None:
    assert Runtime().resolved() == Runtime(threads=torch.get_num_threads())
    assert Runtime(threads=3).resolved().threads == 3


def test_the_environment_is_all_that_speed_depends_on() -> None:
    runtime = _runtime("eager")
    environment = runtime.environment()
    assert environment["torch"] == version("torch")
    assert environment["device"]
    assert json.loads(json.dumps(environment)) == environment
    others = [
        _runtime("eager", threads=2),
        _runtime("eager", precision="bf16"),
        _runtime("compile"),
    ]
    assert Runtime(backend="eager").fingerprint() == runtime.fingerprint()
    assert len({other.fingerprint() for other in [runtime, *others]}) == 4


def test_a_backends_version_is_part_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = _runtime("onnxruntime")
    before = runtime.fingerprint()
    assert runtime.environment()["onnxruntime"] != "?"
    monkeypatch.setattr("rankprune.runtimes.version", lambda package: "0.1")
    assert runtime.fingerprint() != before


@pytest.mark.parametrize(
    ("backend", "missing", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("onnxruntime", "onnxscript", "onnx"),
        ("openvino", "openvino", "openvino"),
    ],
)
def test_a_backend_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, backend: str, missing: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == missing else find(name)
    )
    runtime = Runtime(backend=backend)
    spec = LayerSpec(kind="linear", in_channels=4, out_channels=4, bias=True)
    message = rf"backend '{backend}' needs the package .*rankprune\[{extra}\]"
    for use in (
        lambda: runtime.prepare(mlp(), torch.zeros(1, 16)),
        lambda: runtime.prepare_chain([spec], (1, 4)),
        runtime.environment,
        runtime.fingerprint,
        runtime.rank_multiple,
    ):
        with pytest.raises(MissingExtraError, match=message):
            use()


@pytest.mark.parametrize(("capability", "multiple"), [("AVX2", 8), ("AVX512", 16), ("DEFAULT", 8)])
def test_ranks_fill_vectors(
    monkeypatch: pytest.MonkeyPatch, capability: str, multiple: int
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert _runtime("eager").rank_multiple() == multiple


# -- networks --------------------------------------------------------------------------------------


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a) - b


def _compact() -> nn.Module:
    model = small_cnn()
    return factorize(model, make_plan(model, FixedRank(3), guard=False))


_PAIR = (torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 12).view(3, 4))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "compact": (_compact, cnn_input()),
    "tuple": (_Two, _PAIR),
    "mapping": (_Two, {"b": _PAIR[1], "a": _PAIR[0]}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", INSTALLED)
def test_a_network_gives_torchs_answers(backend: str, name: str) -> None:
    build, inputs = NETWORKS[name]
    model = build().eval()
    with torch.no_grad():
        expected = call(model, inputs)
    run = _runtime(backend).prepare(model, inputs)
    for _ in range(2):
        assert relative_error(_first(run()), expected) <= 1e-4


@pytest.mark.parametrize("backend", QUICK)
def test_a_network_in_training_runs_in_eval_mode_and_keeps_its_own(backend: str) -> None:
    model, x = small_cnn(), cnn_input()
    model.train()
    model[4].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = _runtime(backend).prepare(model, x)
    received = _first(run())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert relative_error(received, model.eval()(x)) <= 1e-4


def test_eager_runs_in_bf16() -> None:
    model, x = small_cnn().eval(), cnn_input()
    with torch.no_grad():
        expected = model(x)
    received = _runtime("eager", precision="bf16").prepare(model, x)()
    assert received.dtype is torch.bfloat16
    assert 1e-5 < relative_error(received.float(), expected) < 0.05
    assert model[0].weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_eager_runs_in_the_precision_asked_for(dtype: torch.dtype) -> None:
    """Whatever the network is in."""
    model = mlp().eval().to(dtype)
    received = _runtime("eager").prepare(model, torch.randn(2, 16, dtype=dtype))()
    assert received.dtype is torch.float32
    assert model[0].weight.dtype is dtype


def test_eager_passes_whole_numbers_on() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    received = _runtime("eager", precision="bf16").prepare(model, {"input": tokens})()
    assert received.shape == (1, 3, 2)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0]) < 0:
            raise RuntimeError("negative")
        self.threads.append(torch.get_num_threads())
        assert torch.is_inference_mode_enabled()
        return x


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_hold_for_the_call_alone(threads: int) -> None:
    model = _Counting().eval()
    before = torch.get_num_threads()
    _runtime("eager", threads=threads).prepare(model, torch.ones(1))()
    assert model.threads == [threads]
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="negative"):
        _runtime("eager", threads=threads).prepare(model, -torch.ones(1))()
    assert torch.get_num_threads() == before


# -- chains of layers ------------------------------------------------------------------------------


def _distinct(cases: list[Case]) -> list[Case]:
    """Cases that differ in more than the dtype."""
    return list({(case.spec, case.input_shape): case for case in cases}.values())


def _onnx_runs(spec: LayerSpec) -> bool:
    """ONNX Runtime takes no output padding as large as the stride, torch does."""
    return all(p < s or not p for p, s in zip(spec.output_padding, spec.stride, strict=True))


def _plain(spec: LayerSpec) -> bool:
    return spec.padding_mode == "zeros" and not isinstance(spec.padding, str)


CASES = [case for case in _distinct(LAYERS) if _onnx_runs(case.spec)]
PLAIN = [case for case in CASES if _plain(case.spec)]


def _chains(case: Case) -> list[tuple[LayerSpec, ...]]:
    """The layer alone, and what each scheme makes of it; with one kernel a channel and two."""
    factors = [
        SCHEMES[name].factor_specs(case.spec, rank) for name in schemes_of(case) for rank in (1, 2)
    ]
    return [(case.spec,), *factors]


def _expected(specs: tuple[LayerSpec, ...], shape: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        return random_chain(specs)(random_input(shape))


def test_chains_written_by_hand_answer_as_torch_does() -> None:
    """Each layer that needs one node, dense and factorised, in its own ONNX graph."""
    assert len(PLAIN) > 60
    kinds = set()
    for case in PLAIN:
        for specs in _chains(case):
            content = _chain_onnx(specs, case.input_shape)
            assert content is not None
            session = onnx_session(content, 1)
            (received,) = session.run(None, {"x": random_input(case.input_shape).numpy()})
            expected = _expected(specs, case.input_shape)
            assert relative_error(torch.from_numpy(received), expected) <= 1e-5, case.id
            kinds.add((specs[0].kind, specs[0].dims, len(specs)))
    assert len(kinds) == 2 * 8 - 1  # Conv1D becomes two plain linear layers


def test_layers_that_need_more_than_a_node_are_left_to_the_exporter() -> None:
    others = [case for case in CASES if not _plain(case.spec)]
    assert len(others) > 40
    assert all(_chain_onnx((case.spec,), case.input_shape) is None for case in others)
    conv = LayerSpec.of(nn.Conv2d(3, 4, 3))
    assert conv is not None
    assert _chain_onnx((conv,), (1, 3, 8, 8)) is not None
    assert _chain_onnx((conv,), (3, 8, 8)) is None  # without a batch


@pytest.mark.parametrize("shape", [(3, 6), (6,), (2, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("backend", QUICK)
def test_linear_layers_take_any_shape(backend: str, shape: tuple[int, ...]) -> None:
    specs = tuple(
        LayerSpec(kind="linear", in_channels=6, out_channels=n, bias=bias)
        for n, bias in ((6, False), (4, True))
    )
    received = _first(_runtime(backend).prepare_chain(specs, shape)())
    assert relative_error(received, _expected(specs, shape)) <= 1e-4


CHAINS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 8)),
    "same": (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "3-d": (nn.Conv3d(4, 6, 2), (1, 4, 5, 4, 3)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("backend", [name for name, x in BACKENDS.items() if x.installed()])
def test_chains_answer_as_torch_does(backend: str, name: str) -> None:
    layer, shape = CHAINS[name]
    spec = LayerSpec.of(layer)
    assert spec is not None
    specs = SCHEMES["channel"].factor_specs(spec, 3)
    if (backend, name) == ("openvino", "circular"):
        with pytest.raises(ExportError, match=r"OpenVINO cannot read .*: \w+"):
            _runtime(backend).prepare_chain(specs, shape)
        return
    run = _runtime(backend).prepare_chain(specs, shape)
    assert relative_error(_first(run()), _expected(specs, shape)) <= 1e-4


@pytest.mark.parametrize("backend", QUICK)
def test_preparing_draws_no_random_numbers(backend: str) -> None:
    """Else a measurement in a training run would change what comes after it."""
    spec = LayerSpec.of(nn.Linear(6, 4))
    assert spec is not None
    state = torch.random.get_rng_state()
    _runtime(backend).prepare_chain([spec], (2, 6))()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_weights_keep_activations_of_ordinary_size() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    nn.init.constant_(model[3].weight, float("nan"))
    fill_randomly(model)
    with torch.no_grad():
        assert 0.1 < float(model(torch.randn(8, 256)).std()) < 10
    assert not torch.equal(model[0].weight, model[1].weight)


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = alternate(calls, 3)
    assert order == list("abc") * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


SIGNALLED = """
import gc, os, signal
import torch
from rankprune.runtimes import Runtime

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
network, x = torch.nn.Linear(64, 64).eval(), torch.zeros(1, 64)
runs = [Runtime(backend={backend!r}, threads=1).prepare(network, x) for _ in "ab"]
while runs:
    runs.pop(0)()
    gc.collect()
torch.zeros(2**24)  # what was freed is used for something else
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_signals_are_handled_after_a_network_has_run(backend: str) -> None:
    """Of two OpenVINO networks the second puts back the first one's signal stack, freed by then."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SIGNALLED.format(backend=backend)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.split() == ["handled", "alive"]


@pytest.mark.skipif(sys.platform != "linux", reason="the signal stack is kept on Linux alone")
def test_openvino_leaves_the_signal_stack_alone() -> None:
    def stack() -> tuple[int, int, int]:
        found = _SignalStack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.address or 0, found.flags, found.size

    before = stack()
    run = _runtime("openvino").prepare(mlp(), torch.zeros(1, 16))
    run()
    assert stack() == before


def test_the_default_dtype_and_device_are_not_asked() -> None:
    spec = LayerSpec.of(nn.Linear(16, 16))
    assert spec is not None
    torch.set_default_dtype(torch.float64)
    try:
        run = _runtime("onnxruntime").prepare_chain([spec], (2, 16))
        run()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert random_input((2, 3)).device.type == "cpu"
