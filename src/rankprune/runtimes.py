"""Where a network runs: the same question, "how long does it take?", put to every runtime.

A backend turns a module, or a chain of layer specs, into a call without arguments. Whoever times
such calls need not know what is behind them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import platform
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rankprune.errors import ConfigError, ExportError, MissingExtraError, near
from rankprune.export import OPSET, feed, onnx_program, onnx_session, tensors
from rankprune.layers import LayerSpec
from rankprune.multiplier import Repeat, SumOfParts, unrolled
from rankprune.profile import ExampleInputs, arguments
from rankprune.signal_stack import kept_signal_stack

Run = Callable[[], Any]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a network is to be fast on.

    Attributes:
        backend: "onnxruntime", "openvino", "compile" (torch.compile) or "eager".
        threads: that an operator may use; None for torch's present number.
        precision: "fp32", or "bf16" and "fp16" where the backend has them.
        device: "cpu", or for the two torch backends also a GPU, such as "cuda", on which the model
            and the example inputs must be.
    """

    backend: str = "onnxruntime"
    threads: int | None = None
    precision: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"unknown backend {self.backend!r}; {near(self.backend, BACKENDS)}")
        whole = type(self.threads) is int and self.threads >= 1
        if self.threads is not None and not whole:
            raise ConfigError(f"Runtime(threads={self.threads!r}): a whole number ≥ 1")
        offered = BACKENDS[self.backend].precisions
        if self.precision not in offered:
            raise ConfigError(
                f"{self.backend} measures in {', '.join(offered)}, not in {self.precision!r}"
            )
        if self.device != "cpu" and not isinstance(BACKENDS[self.backend], Eager):
            raise ConfigError(f"{self.backend} measures on the CPU, not on {self.device!r}")

    def resolved(self) -> Runtime:
        """The same runtime with the number of threads that it stands for."""
        return replace(self, threads=self.threads or torch.get_num_threads())

    def prepare(self, model: nn.Module, example_inputs: ExampleInputs) -> Run:
        """A call that runs the whole network once.

        Raises:
            MissingExtraError: the backend is not installed.
            ExportError: the network cannot be exported for it.
        """
        return self._backend().model(model, example_inputs, self.resolved())

    def prepare_chain(self, specs: Sequence[LayerSpec], shape: Sequence[int]) -> Run:
        """A call that runs these layers in a row on an input of this shape, with random weights."""
        return self._backend().chain(specs, tuple(shape), self.resolved())

    def rank_multiple(self) -> int:
        """What ranks should be multiples of: channels that one vector instruction holds."""
        return self._backend().rank_multiple()

    def environment(self) -> dict[str, Any]:
        """What a measurement depends on: device, versions, threads, precision."""
        return {**asdict(self.resolved()), "hardware": _hardware(), **self._backend().versions()}

    def fingerprint(self) -> str:
        """A short name of the environment."""
        text = json.dumps(self.environment(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _backend(self) -> Backend:
        backend = BACKENDS[self.backend]
        if not backend.installed():
            raise MissingExtraError(f"backend {self.backend!r}", backend.packages[0], backend.extra)
        return backend


class Backend(ABC):
    """One runtime. Stateless; the instances are in `BACKENDS`."""

    name: str
    packages: tuple[str, ...] = ()
    extra = ""
    precisions: tuple[str, ...] = ("fp32",)

    def installed(self) -> bool:
        """Whether it can be used here."""
        return all(importlib.util.find_spec(package) is not None for package in self.packages)

    def versions(self) -> dict[str, str]:
        """Versions that its speed depends on."""
        return {package: _version(package) for package in ("torch", *self.packages)}

    def rank_multiple(self) -> int:
        """Channels that the kernels take at a time."""
        return 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8

    @abstractmethod
    def model(self, model: nn.Module, inputs: ExampleInputs, runtime: Runtime) -> Run:
        """As `Runtime.prepare`."""

    @abstractmethod
    def chain(self, specs: Sequence[LayerSpec], shape: tuple[int, ...], runtime: Runtime) -> Run:
        """As `Runtime.prepare_chain`."""


class Eager(Backend):
    """torch as it is."""

    name = "eager"
    precisions = ("fp32", "bf16", "fp16")

    def model(self, model: nn.Module, inputs: ExampleInputs, runtime: Runtime) -> Run:
        dtype = _DTYPES[runtime.precision]
        places = {t.device.type for t in (*tensors(inputs), *model.parameters())}
        if places - {torch.device(runtime.device).type}:
            raise ConfigError(
                f"the model and its inputs are on {' and '.join(sorted(places))}, but "
                f"Runtime(device={runtime.device!r}) measures there"
            )
        network = model
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if dtypes - {dtype} or any(module.training for module in model.modules()):
            network = copy.deepcopy(model).eval().to(dtype)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, arguments(inputs)
        )
        gpus = {t.device for t in (*tensors(inputs), *model.parameters()) if not t.is_cpu}
        ready = self.ready(network)

        def run() -> Any:
            with _threads(runtime.threads), torch.inference_mode():
                result = ready(*args, **kwargs)
                for gpu in gpus:
                    torch.accelerator.synchronize(gpu)
                return result

        return run

    def ready(self, network: nn.Module) -> nn.Module:
        return network

    def chain(self, specs: Sequence[LayerSpec], shape: tuple[int, ...], runtime: Runtime) -> Run:
        chain = random_chain(specs).to(runtime.device)
        return self.model(chain, random_input(shape).to(runtime.device), runtime)


class Compiled(Eager):
    """torch.compile.

    Single layers are measured in eager mode: both call the same kernels for convolutions and
    matrix products, and compiling hundreds of layers takes hours.
    """

    name = "compile"

    def ready(self, network: nn.Module) -> nn.Module:
        compiled = torch.compile(network)
        assert isinstance(compiled, nn.Module)
        return compiled

    def chain(self, specs: Sequence[LayerSpec], shape: tuple[int, ...], runtime: Runtime) -> Run:
        return Eager().chain(specs, shape, runtime)


class OnnxBackend(Backend):
    """A runtime that reads ONNX files."""

    @abstractmethod
    def load(self, source: Path | bytes, inputs: ExampleInputs, runtime: Runtime) -> Run:
        """A call that runs an ONNX file, or its content."""

    def model(self, model: nn.Module, inputs: ExampleInputs, runtime: Runtime) -> Run:
        with tempfile.TemporaryDirectory(prefix="rankprune-") as folder:
            path = Path(folder, "model.onnx")
            onnx_program(model, inputs, dynamic_batch=False).save(path)
            return self.load(path, inputs, runtime)

    def chain(self, specs: Sequence[LayerSpec], shape: tuple[int, ...], runtime: Runtime) -> Run:
        inputs = random_input(shape)
        content = _chain_onnx(specs, shape)
        if content is None:
            return self.model(random_chain(specs), inputs, runtime)
        return self.load(content, inputs, runtime)


class OnnxRuntime(OnnxBackend):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx", "onnxscript")
    extra = "onnx"

    def load(self, source: Path | bytes, inputs: ExampleInputs, runtime: Runtime) -> Run:
        session = onnx_session(source, runtime.threads)
        return functools.partial(session.run, None, feed(inputs, session))


class OpenVino(OnnxBackend):
    """OpenVINO on the CPU."""

    name = "openvino"
    packages = ("openvino", "onnx", "onnxscript")
    extra = "openvino"
    precisions = ("fp32", "bf16", "fp16")

    def load(self, source: Path | bytes, inputs: ExampleInputs, runtime: Runtime) -> Run:
        import openvino

        core = openvino.Core()
        names = {"fp32": "f32", "fp16": "f16"}
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": runtime.threads,
            # it rounds to bf16 by itself where the CPU has it
            "INFERENCE_PRECISION_HINT": names.get(runtime.precision, runtime.precision),
        }
        try:
            with kept_signal_stack():
                network = core.read_model(source if isinstance(source, bytes) else str(source))
                compiled = core.compile_model(network, "CPU", options)
        except RuntimeError as error:  # circular padding, for one
            raise ExportError(
                f"OpenVINO cannot read what torch exported: {str(error).strip().splitlines()[-1]}"
            ) from error
        request = compiled.create_infer_request()
        arrays = [t.detach().cpu().numpy() for t in tensors(inputs)]
        return functools.partial(request.infer, dict(enumerate(arrays)))


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (OnnxRuntime(), OpenVino(), Compiled(), Eager())
}


def alternate(
    calls: Mapping[str, Run], rounds: int, prepare: Run = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each; they take turns, so that noise hits all alike.

    Args:
        calls: what to time, by name.
        rounds: number of timed calls of each.
        prepare: done before every call, not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            prepare()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def random_input(shape: Sequence[int]) -> Tensor:
    """An input of this shape; the global random state stays as it is."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def random_chain(specs: Sequence[LayerSpec]) -> nn.Sequential:
    """Layers in a row, with random weights."""
    chain = nn.Sequential(*(spec.build(dtype=torch.float32, device="cpu") for spec in specs))
    fill_randomly(chain)
    return chain.eval()


@torch.no_grad()
def fill_randomly(module: nn.Module) -> None:
    """Weights that keep activations of ordinary size: denormal numbers would be slow.

    The global random state stays as it is: measuring must not change a training run.
    """
    for index, parameter in enumerate(module.parameters()):
        generator = torch.Generator(parameter.device).manual_seed(index)
        fan_in = max(math.prod(parameter.shape[1:]), 1)
        parameter.normal_(std=1 / math.sqrt(fan_in), generator=generator)


def _chain_onnx(specs: Sequence[LayerSpec], shape: tuple[int, ...]) -> bytes | None:
    """The chain as ONNX, written node by node: torch's exporter takes a second a layer.

    None where a layer needs more than one node; the exporter knows those.
    """
    from onnx import TensorProto, helper, numpy_helper

    layers = list(random_chain(specs))
    nodes, weights, last = [], [], "x"
    for index, layer in enumerate(unrolled(layers) or layers):
        before, last = last, f"y{index}"
        if isinstance(layer, Repeat):
            nodes.append(helper.make_node("Concat", [before] * layer.times, [last], axis=1))
            continue
        if isinstance(layer, SumOfParts):
            parts = [f"part{n}" for n in range(layer.parts)]
            nodes.append(helper.make_node("Split", [before], parts, axis=1, num_outputs=len(parts)))
            nodes.append(helper.make_node("Sum", parts, [last]))
            continue
        spec = LayerSpec.of(layer)
        assert spec is not None
        if spec.padding_mode != "zeros" or isinstance(spec.padding, str):
            return None
        if spec.dims and len(shape) != spec.dims + 2:  # without a batch
            return None
        inputs = [before, f"w{index}"]
        assert isinstance(layer.weight, Tensor)
        weight = layer.weight.detach()
        if not spec.dims:
            weight = weight.T.contiguous()
        weights.append(numpy_helper.from_array(weight.numpy(), f"w{index}"))
        if isinstance(layer.bias, Tensor):
            inputs.append(f"b{index}")
            weights.append(numpy_helper.from_array(layer.bias.detach().numpy(), f"b{index}"))
        if spec.dims:
            attributes = {
                "kernel_shape": spec.kernel_size,
                "strides": spec.stride,
                "pads": (*spec.padding, *spec.padding),
                "dilations": spec.dilation,
                "group": spec.groups,
            }
            operator = "Conv"
            if spec.kind == "conv_transpose":
                operator = "ConvTranspose"
                attributes["output_padding"] = spec.output_padding
            nodes.append(helper.make_node(operator, inputs, [last], **attributes))
        elif len(shape) == 2:
            nodes.append(helper.make_node("Gemm", inputs, [last]))
        else:
            product = f"m{index}" if spec.bias else last
            nodes.append(helper.make_node("MatMul", inputs[:2], [product]))
            if spec.bias:
                nodes.append(helper.make_node("Add", [product, inputs[2]], [last]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return model.SerializeToString()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _hardware() -> str:
    """The processor's own name, where the system tells it, and its vector instructions."""
    names = [processor(), torch.backends.cpu.get_cpu_capability()]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return ", ".join(names)


@functools.cache
def processor() -> str:
    """The processor's own name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
