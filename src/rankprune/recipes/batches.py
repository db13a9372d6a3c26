"""Batches whose content depends on the seed, the epoch and the position, and on nothing else.

So a run can stop after any batch and go on with the next, with any number of worker processes.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rankprune.errors import ConfigError, FileError
from rankprune.recipes.data import ImageData, Images


def seed_for(*parts: int) -> int:
    """A seed that differs wherever one of its parts does."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Normalise:
    """uint8 [n, C, H, W] to normalised floats on a device.

    Args:
        data: gives mean and standard deviation.
        device: where the batches go.
    """

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(data.mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(data.std, device=device).view(1, -1, 1, 1) * 255

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.device, non_blocking=True).float()
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class _TrainBatches(Dataset[tuple[Tensor, Tensor]]):
    """One epoch's batches of one process; what becomes of an image depends on its index alone."""

    def __init__(
        self, data: ImageData, batch: int, seed: int, epoch: int, share: slice, augment: bool
    ) -> None:
        self.images, self.batch, self.seed, self.epoch = data.train, batch, seed, epoch
        self.share = share
        generator = torch.Generator().manual_seed(seed_for(seed, epoch))
        self.order = torch.randperm(len(self.images), generator=generator)
        self.augment = _augmentation(data) if augment else None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chosen = self.order[index * self.batch : (index + 1) * self.batch][self.share]
        with torch.random.fork_rng(devices=[]):
            pixels = torch.stack([self._image(i) for i in chosen.tolist()])
        return pixels, self.images.labels[chosen]

    def _image(self, index: int) -> Tensor:
        if self.augment is None:
            return self.images.fetch(index, train=False)
        # the CPU's generator only: torch.manual_seed would seed the training's on a GPU too
        torch.default_generator.manual_seed(seed_for(self.seed, self.epoch, index))
        image: Tensor = self.augment(self.images.fetch(index, train=True))
        return image


class _EvalBatches(Dataset[tuple[Tensor, Tensor]]):
    """All images of one process in order, the last batch as short as it comes."""

    def __init__(self, images: Images, batch: int, share: range) -> None:
        self.images, self.batch, self.share = images, batch, share

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chosen = list(self.share[index * self.batch : (index + 1) * self.batch])
        pixels = torch.stack([self.images.fetch(i, train=False) for i in chosen])
        return pixels, self.images.labels[chosen]


def steps_per_epoch(images: Images, batch: int) -> int:
    """Full batches in an epoch; the last incomplete one is left out."""
    return len(images) // batch


def check_batch(data: ImageData, batch: int, world: int) -> int:
    """Steps of an epoch.

    Raises:
        ConfigError: the batch cannot be shared by the processes, or exceeds the training images.
    """
    if batch % world:
        raise ConfigError(f"batch_size={batch} cannot be shared by {world} processes")
    count = steps_per_epoch(data.train, batch)
    if not count:
        raise ConfigError(
            f"batch_size={batch} exceeds the {len(data.train)} training images; lower it"
        )
    return count


def train_batches(
    data: ImageData,
    *,
    batch: int,
    seed: int,
    epoch: int,
    first: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    augment: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, from the `first` on: uint8 images and labels of this process.

    Raises:
        ConfigError: the batch cannot be shared by the processes, or exceeds the training images.
    """
    count = check_batch(data, batch, world)
    dataset = _TrainBatches(data, batch, seed, epoch, slice(rank, None, world), augment)
    return _prepared(dataset, range(first, count), workers)


def eval_batches(
    images: Images, batch: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of this process in order, the last batch as short as it comes."""
    dataset = _EvalBatches(images, batch, range(rank, len(images), world))
    return _prepared(dataset, range(len(dataset)), workers)


def _deaf(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepared(
    dataset: Dataset[tuple[Tensor, Tensor]], order: range, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, prepared by worker processes where there are any.

    Raises:
        FileError: a file is no image, or damaged.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # of its own: it draws a number when it starts, and a resumed run starts once more
        generator=torch.Generator(),
        worker_init_fn=_deaf,
    )
    prepared: Any = iter(loader)
    try:
        yield from prepared
    except FileError as error:
        # what comes from a worker has its traceback in front
        raise FileError(str(error).rpartition("FileError: ")[2].strip()) from None
    finally:
        # an error keeps this frame alive, and with it the workers, whose later end torch
        # would report in the middle of something else
        if workers:
            prepared._shutdown_workers()


def _augmentation(data: ImageData) -> torch.nn.Module:
    """Shift by up to an eighth of the side, and mirror where that keeps the class."""
    from torchvision.transforms import v2

    side = data.shape[1]
    steps: list[torch.nn.Module] = []
    if data.crop:
        steps.append(v2.RandomCrop(side, padding=max(1, side // 8)))
    if data.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps) if steps else v2.Identity()
