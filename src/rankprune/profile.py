"""What a network costs: parameters, bytes, and FLOPs by torch's own counter on the real network.

`profile` runs the network once on example inputs and records, for every layer, the FLOPs that
torch counts inside it and the shapes that it really sees, however often it is called.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankprune.errors import ConfigError
from rankprune.layers import LayerSpec
from rankprune.sharded import reshard

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class LayerProfile:
    """Cost of one layer for the example inputs.

    Attributes:
        flops: FLOPs of all its calls.
        input_shapes: shape of the first input, one entry a call.
    """

    flops: int
    input_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Profile:
    """Cost of a network for the example inputs.

    Attributes:
        params: parameters, shared ones once.
        bytes: size of parameters and buffers, shared ones once.
        flops: FLOPs of one forward pass (a multiply-add is two).
        layers: by qualified name; layers that were never called are missing.
    """

    params: int
    bytes: int
    flops: int
    layers: Mapping[str, LayerProfile]


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Size of all parameters and buffers in bytes, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run the model on its example inputs."""
    args, kwargs = arguments(example_inputs)
    return model(*args, **kwargs)


def arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor is the model's only argument, a tuple positional ones, a mapping keywords."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise ConfigError(
        "example_inputs must be a tensor, a tuple of positional or a mapping of keyword "
        f"arguments, got {type(example_inputs).__name__}"
    )


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer is called with: the first tensor among its arguments."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def profile(model: nn.Module, example_inputs: ExampleInputs) -> Profile:
    """Count parameters, bytes and FLOPs of a network.

    The model runs once in eval mode without gradients; its modes are put back afterwards.

    Args:
        model: any module.
        example_inputs: what it is called with, on its device.

    Raises:
        ConfigError: example_inputs of another type, or the model does not run on them.

    >>> cost = profile(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.zeros(1, 8))
    >>> cost.flops, cost.params, cost.layers["0"].input_shapes
    (64, 36, ((1, 8),))
    """
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    flops: dict[str, int] = defaultdict(int)
    counter = FlopCounterMode(display=False)

    def shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        tensor = first_tensor(args, kwargs)
        return () if tensor is None else tuple(tensor.shape)

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            started: list[int] = []

            def enter(
                _: nn.Module, args: Any, kwargs: Any, *, n: str = name, s: list[int] = started
            ) -> None:
                shapes[n].append(shape_of(args, kwargs))
                s.append(counter.get_total_flops())

            def leave(
                _: nn.Module, __: Any, ___: Any, *, n: str = name, s: list[int] = started
            ) -> None:
                flops[n] += counter.get_total_flops() - s.pop()

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled())
        stack.enter_context(_frozen(model))
        stack.enter_context(_plain_attention())
        try:
            stack.callback(reshard, model)
            with torch.no_grad(), counter:
                call(model, example_inputs)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the model does not run on example_inputs: {type(error).__name__}: {error}"
            ) from error
    return Profile(
        params=count_params(model),
        bytes=count_bytes(model),
        flops=counter.get_total_flops(),
        layers={
            name: LayerProfile(flops[name], tuple(calls)) for name, calls in shapes.items() if name
        },
    )


def factor_flops(factors: tuple[LayerSpec, ...], input_shapes: tuple[tuple[int, ...], ...]) -> int:
    """FLOPs of a chain of layers on these inputs, counted by torch on shapes alone."""
    chain = nn.Sequential(*(spec.build(device="meta") for spec in factors))
    total = 0
    for shape in input_shapes:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            chain(torch.empty(shape, device="meta"))
        total += counter.get_total_flops()
    return total


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if type(module).train is not nn.Module.train:
                module.train(training)  # it may drop what it keeps for evaluation
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Call models without torch.compile's code, which knows no hooks that came after it."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """torch's counter looks for gradients of what modules get, and fails at views of parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """The fused inference path of nn.MultiheadAttention hides its FLOPs and its layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
