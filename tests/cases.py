"""The one table of layers that the contract tests run over, and the small networks they share."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankprune.layers import LayerSpec
from rankprune.schemes import SCHEMES

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Conv1D(nn.Module):
    """Stands for Hugging Face's Conv1D: a linear layer with weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True)
class Case:
    """A layer and an input for it."""

    id: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    dtype: torch.dtype

    def layer(self) -> nn.Module:
        """A fresh layer with random weights."""
        torch.manual_seed(0)
        return self.build().to(self.dtype)

    def input(self) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(self.input_shape, dtype=self.dtype)

    @functools.cached_property
    def spec(self) -> LayerSpec:
        spec = LayerSpec.of(self.layer())
        assert spec is not None
        return spec


_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# in channels, out channels, groups: plain, grouped, depthwise, depth multiplier
_CHANNELS = ((6, 8, 1), (6, 4, 2), (4, 4, 4), (3, 6, 3))
_DTYPES = (torch.float32, torch.float64)
_EXTENT = {1: (16,), 2: (12, 11), 3: (6, 7, 6)}

_CONV_AXES: dict[int, dict[str, tuple[Any, ...]]] = {
    1: {
        "kernel_size": (3, 2, 1, 4),
        "stride": (1, 2),
        "dilation": (1, 2),
        "padding": (0, 1, "same", "valid"),
        "padding_mode": ("zeros", "reflect", "replicate", "circular"),
        "channels": _CHANNELS,
        "bias": (True, False),
        "dtype": _DTYPES,
    },
    2: {
        "kernel_size": ((3, 3), (2, 2), (1, 1), (3, 1), (1, 5), (4, 3)),
        "stride": (1, 2, (2, 1)),
        "dilation": (1, 2, (1, 2)),
        "padding": (0, 1, (1, 2), "same", "valid"),
        "padding_mode": ("zeros", "reflect", "replicate", "circular"),
        "channels": _CHANNELS,
        "bias": (True, False),
        "dtype": _DTYPES,
    },
    3: {
        "kernel_size": ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 3, 2)),
        "stride": (1, 2, (1, 2, 1)),
        "dilation": (1, (2, 1, 1)),
        "padding": (0, 1, "same", "valid"),
        # torch has no 3-d reflection padding that is kept apart from the others
        "padding_mode": ("zeros", "reflect", "replicate", "circular"),
        "channels": _CHANNELS,
        "bias": (True, False),
        "dtype": _DTYPES,
    },
}
_TRANSPOSED_AXES: dict[int, dict[str, tuple[Any, ...]]] = {
    dims: {
        "kernel_size": kernels,
        "stride": (1, 2, 3),
        "dilation": (1, 2),
        "padding": (0, 1),
        "output_padding": (0, 1),
        "channels": _CHANNELS,
        "bias": (True, False),
        "dtype": _DTYPES,
    }
    for dims, kernels in {
        1: (3, 2, 1, 4),
        2: ((3, 3), (2, 2), (1, 1), (3, 1), (1, 5), (4, 3)),
        3: ((3, 3, 3), (2, 2, 2), (1, 3, 2)),
    }.items()
}


def _possible(options: dict[str, Any]) -> bool:
    """Whether torch can build and run this layer."""
    if options["padding"] == "same" and options["stride"] != 1:
        return False
    if "output_padding" in options:
        return options["output_padding"] < max(options["stride"], options["dilation"])
    # other modes than zeros differ only where something is padded
    return options["padding_mode"] == "zeros" or options["padding"] not in (0, "valid")


def _product(axes: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    every = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [options for options in every if _possible(options)]


def _pairs(options: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(options.items(), 2))


def _covering(axes: dict[str, tuple[Any, ...]], more: int) -> list[dict[str, Any]]:
    """Configurations in which every possible pair of values occurs, and `more` random ones."""
    generator = random.Random(0)
    every = _product(axes)
    generator.shuffle(every)
    missing = set().union(*map(_pairs, every))
    chosen = []
    while missing:
        best = max(every[:400], key=lambda options: len(_pairs(options) & missing))
        if not _pairs(best) & missing:
            best = next(options for options in every if _pairs(options) & missing)
        chosen.append(best)
        missing -= _pairs(best)
        generator.shuffle(every)
    return chosen + every[:more]


def _conv(dims: int, options: dict[str, Any]) -> Case:
    options = dict(options)
    label = " ".join(f"{key}={value}" for key, value in options.items())
    dtype = options.pop("dtype")
    in_channels, out_channels, groups = options.pop("channels")
    kind = (_TRANSPOSED if "output_padding" in options else _CONV)[dims]
    build = functools.partial(kind, in_channels, out_channels, groups=groups, **options)
    label = label.replace("torch.", "").replace(", ", ",")
    return Case(f"{kind.__name__} {label}", build, (2, in_channels, *_EXTENT[dims]), dtype)


def _linear() -> Iterator[Case]:
    for dtype in _DTYPES:
        for out_features, in_features in ((5, 9), (9, 5), (7, 7), (2, 16)):
            for bias in (True, False):
                build = functools.partial(nn.Linear, in_features, out_features, bias=bias)
                label = f"Linear {out_features}x{in_features} bias={bias} {dtype}"
                yield Case(label, build, (2, 3, in_features), dtype)
            build = functools.partial(Conv1D, out_features, in_features)
            label = f"Conv1D {out_features}x{in_features} {dtype}"
            yield Case(label, build, (2, 3, in_features), dtype)


def every_layer() -> Iterator[Case]:
    """The whole product of kernels, strides, dilations, paddings, modes, groups, biases, dtypes."""
    yield from _linear()
    for axes in (_CONV_AXES, _TRANSPOSED_AXES):
        for dims, table in axes.items():
            yield from (_conv(dims, options) for options in _product(table))


def _sample() -> Iterator[Case]:
    yield from _linear()
    for axes, more in (
        (_CONV_AXES, {1: 6, 2: 40, 3: 2}),
        (_TRANSPOSED_AXES, {1: 6, 2: 20, 3: 2}),
    ):
        for dims, table in axes.items():
            yield from (_conv(dims, options) for options in _covering(table, more[dims]))


def schemes_of(case: Case) -> list[str]:
    """The schemes that take a layer."""
    return [name for name, scheme in SCHEMES.items() if scheme.refuses(case.spec) is None]


LAYERS = list({case.id: case for case in _sample()}.values())
CONTRACT = [(case, name) for case in LAYERS for name in schemes_of(case)]
CONTRACT_IDS = [f"{name}: {case.id}" for case, name in CONTRACT]


def relative_error(received: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value."""
    assert received.shape == expected.shape
    assert received.dtype == expected.dtype
    return float((received - expected).abs().max() / expected.abs().max())


# -- small networks --------------------------------------------------------------------------------


def small_cnn() -> nn.Sequential:
    """Strided, grouped and pointwise convolutions, BatchNorm and a classifier, for 3×12×12."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def cnn_input(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    """16 → 24 → 16, for quick training."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


class TiedLinears(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 20)
        self.b = nn.Linear(20, 20)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class TiedConvs(nn.Module):
    """Two convolutions of equal description with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(12, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class UnequallyTiedConvs(nn.Module):
    """Two convolutions that share a weight but dilate differently."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(12, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.b.weight = self.a.weight
        self.free = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.b(torch.relu(self.a(x))))


class BiasTiedLinears(nn.Module):
    """Two linear layers with one weight, of which only the second has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 20, bias=False)
        self.b = nn.Linear(20, 20)
        self.b.weight = self.a.weight
        self.free = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.b(torch.relu(self.a(x))))


class TiedEmbedding(nn.Module):
    """A language model's head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(tokens))))


class SharedModule(nn.Module):
    """One module at two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(20, 20)
        self.b = self.a
        self.c = nn.ModuleList([nn.Linear(20, 20), self.a])

    def forward(self, x: Tensor) -> Tensor:
        return self.c[1](self.c[0](self.b(torch.relu(self.a(x)))))


def resnet18() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18()


def mobilenet_v2() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.mobilenet_v2()


def resnet20() -> nn.Module:
    from pytorchcv.models.resnet_cifar import resnet20_cifar10

    torch.manual_seed(0)
    return resnet20_cifar10()


def write_plan(folder: Path, document: dict[str, Any]) -> None:
    """A saved model's plan, sealed as `save` does it: the sha256 with zeros in its own place."""
    text = json.dumps(document | {"sha256": "0" * 64}, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "plan.json").write_text(text.replace("0" * 64, digest, 1))
