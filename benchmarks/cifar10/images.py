"""CIFAR-10 in memory: batches that depend on the seed, the epoch and nothing else.

    .venv/bin/python benchmarks/cifar10/images.py FOLDER cifar10.safetensors

decodes a folder of images once for all; the runner takes the file in the folder's place.

Imports nothing of rankprune: peers read images and accuracies in environments of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

    def to(self, device: torch.device) -> Part:
        """The same on a device, where batches are then prepared."""
        return Part(self.pixels.to(device), self.labels.to(device))

    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        for start in range(0, len(self), size):
            span = slice(start, start + size)
            yield normalise(self.pixels[span]), self.labels[span]

    def epoch(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Full batches in random order, each image shifted by up to four pixels, half mirrored.

        What is drawn does not depend on the device.
        """
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        count = len(self)
        drawn = (
            torch.randperm(count, generator=generator),
            *(torch.randint(2 * _SHIFT + 1, (count,), generator=generator) for _ in range(2)),
            torch.randint(2, (count,), generator=generator),
        )
        order, *shifts = torch.stack(drawn).to(self.labels.device)
        # a GPU prepares many batches in the time of one
        many = size * (64 if self.labels.is_cuda else 1)
        for start in range(0, count // size * size, many):
            span = slice(start, min(start + many, count // size * size))
            pixels = _augment(self.pixels[order[span]], *(shift[span] for shift in shifts))
            labels = self.labels[order[span]]
            yield from zip(normalise(pixels).split(size), labels.split(size), strict=True)


@dataclass(frozen=True)
class Cifar:
    """The data set in three parts."""

    train: Part
    validation: Part
    test: Part

    def to(self, device: torch.device) -> Cifar:
        """The same on a device."""
        return Cifar(self.train.to(device), self.validation.to(device), self.test.to(device))


def load(source: str, *, workers: int = 2) -> Cifar:
    """Read the data set.

    Args:
        source: a folder with train/CLASS/… and test/CLASS/…, what `pack` has made of it, or
            "torchvision:FOLDER" for the originals as torchvision keeps them, fetched where they
            are missing.
        workers: threads that decode.
    """
    kind, _, folder = source.partition(":")
    if kind == "torchvision":
        train, test = (_original(Path(folder), part) for part in (True, False))
    elif source.endswith(".safetensors"):
        found = load_file(source)
        train, test = (
            Part(found[f"{part}.pixels"], found[f"{part}.labels"]) for part in ("train", "test")
        )
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


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Accuracy in percent, in fp32."""
    was = model.training
    model.eval()
    hits = sum((model(x).argmax(1) == y).sum() for x, y in part.batches())
    model.train(was)
    return 100 * int(hits) / len(part)


def pack(folder: Path, file: Path, *, workers: int = 2) -> None:
    """Decode a folder into one file."""
    tensors = {}
    for name in ("train", "test"):
        part = _decoded(folder / name, workers)
        tensors |= {f"{name}.pixels": part.pixels, f"{name}.labels": part.labels}
    save_file(tensors, file)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to floats, channels last in memory."""
    mean, std = (_statistics(values, pixels.device) for values in (MEAN, STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@lru_cache
def _statistics(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def _augment(pixels: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    count, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, [_SHIFT] * 4)
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    columns = torch.where(mirrored.bool()[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height, device=pixels.device) + top[:, None]
    images = torch.arange(count, device=pixels.device).view(-1, 1, 1)
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


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
