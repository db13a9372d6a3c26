"""CIFAR-10 in memory: batches that depend on the seed, the epoch and nothing else.

Imports nothing of rankprune: peers train on the same batches in environments of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2.functional import pil_to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SHIFT = 4


@dataclass(frozen=True)
class Part:
    """Pixels [n, 3, 32, 32] uint8 and labels [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        for start in range(0, len(self), size):
            span = slice(start, start + size)
            yield normalise(self.pixels[span]), self.labels[span]

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches in random order, each image shifted by up to four pixels, half mirrored."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(self), generator=generator)
        for start in range(0, len(self) - size + 1, size):
            chosen = order[start : start + size]
            yield normalise(_augment(self.pixels[chosen], generator)), self.labels[chosen]


@dataclass(frozen=True)
class Cifar:
    """The data set in three parts."""

    train: Part
    validation: Part
    test: Part


def load(source: str, *, workers: int = 2) -> Cifar:
    """Read the data set.

    Args:
        source: a folder with train/CLASS/… and test/CLASS/…, or "torchvision:FOLDER" for the
            originals as torchvision keeps them, fetched where they are missing.
        workers: threads that decode.
    """
    kind, _, folder = source.partition(":")
    if kind == "torchvision":
        train, test = (_original(Path(folder), part) for part in (True, False))
    else:
        train, test = (_decoded(Path(source) / part, workers) for part in ("train", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    # a tenth is kept back to choose by
    held, kept = (part.sort().values for part in order.tensor_split([len(order) // 10]))
    return Cifar(
        Part(train.pixels[kept], train.labels[kept]),
        Part(train.pixels[held], train.labels[held]),
        test,
    )


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to floats, channels last in memory."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, [_SHIFT] * 4)
    top, left = (torch.randint(2 * _SHIFT + 1, (count, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored, columns.flip(1), columns) + left
    rows = torch.arange(height) + top
    images = torch.arange(count).view(-1, 1, 1)
    # [n, 32, 32, 3]: the index of the channels stands between, so they come last
    return padded[images, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _original(folder: Path, train: bool) -> Part:
    found = datasets.CIFAR10(folder, train=train, download=True)
    return Part(torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets))


def _decoded(folder: Path, workers: int) -> Part:
    found = datasets.ImageFolder(folder)
    with ThreadPoolExecutor(workers) as pool:
        pixels = pool.map(lambda sample: pil_to_tensor(found.loader(sample[0])), found.samples)
        return Part(torch.stack(list(pixels)), torch.tensor(found.targets))
