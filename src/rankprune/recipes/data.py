"""Image data sets: uint8 images in memory, or files that are decoded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rankprune.errors import ConfigError, FileError, MissingExtraError, near

DATA_SETS = ("digits", "cifar10", "cifar100", "fake", "imagefolder:DIR")
# Images that are decoded once and kept; larger sets are decoded batch by batch.
MAX_CACHE_BYTES = 4 * 2**30
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224


class Images(Protocol):
    """A list of labelled images."""

    @property
    def labels(self) -> Tensor:
        """Class of every image: [n]."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def fetch(self, indices: Sequence[int], *, train: bool) -> list[Tensor]:
        """Images as uint8 [C, H, W] of one size; `train` allows random crops of larger files."""
        ...


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: pixels [n, C, H, W] uint8, labels [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int], *, train: bool) -> list[Tensor]:
        return list(self.pixels[list(indices)].unbind(0))


@dataclass(frozen=True)
class FileImages:
    """Image files of any size, decoded to RGB and brought to one size when they are needed."""

    paths: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Sequence[int], *, train: bool) -> list[Tensor]:
        from torchvision.transforms import v2

        if train:
            fit: Any = v2.RandomResizedCrop(self.size, antialias=True)
        else:
            fit = v2.Compose(
                [v2.Resize(round(self.size * 256 / 224), antialias=True), v2.CenterCrop(self.size)]
            )
        return [fit(decode(self.paths[index])) for index in indices]


@dataclass(frozen=True)
class Subset:
    """Some of the images of another list."""

    images: Images
    indices: tuple[int, ...]

    @property
    def labels(self) -> Tensor:
        return self.images.labels[list(self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: Sequence[int], *, train: bool) -> list[Tensor]:
        return self.images.fetch([self.indices[index] for index in indices], train=train)


@dataclass(frozen=True)
class ImageData:
    """A data set in three parts.

    Attributes:
        train, val, test: `val` is split off the training images where there is no such part.
        classes: names of the classes.
        shape: C, H, W.
        mean, std: for each channel, of pixel values from 0 to 1.
        flip: whether a mirrored image is of the same class.
        crop: whether to augment by shifting; files are cropped at random as they are decoded.
    """

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    crop: bool


def load_data(
    name: str,
    *,
    root: str = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """Load a data set by name.

    Args:
        name: one of `DATA_SETS`.
        root: where torchvision's data sets lie.
        download: fetch a torchvision data set that is missing.
        image_size: side to which image files are brought; None takes the files' own where all are
            alike, else 224.
        val_fraction: share of the training images that becomes the validation part.
        seed: of that split.

    Raises:
        ConfigError: unknown name.
        FileError: missing or empty folders, files that are no images.
    """
    kind, _, argument = name.partition(":")
    if kind == "imagefolder" and argument:
        return _image_folder(Path(argument), image_size, val_fraction, seed)
    if argument or kind not in ("digits", "cifar10", "cifar100", "fake"):
        raise ConfigError(f"unknown data set {name!r}; {near(name, DATA_SETS)}")
    if kind == "digits":
        train, test, classes = _digits()
    elif kind == "fake":
        train, test, classes = _fake(image_size or 32)
    else:
        train, test, classes = _cifar(kind, root, download)
    fit, val = _split(train, val_fraction, seed)
    return _in_memory(train, fit, val, test, classes, flip=kind != "digits")


def decode(path: Path) -> Tensor:
    """Decode an image file to uint8 [3, H, W].

    Raises:
        FileError: the file is no image, or damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(
            f"{path}: not a readable image ({error}); remove it or replace it"
        ) from None


def _in_memory(
    all_train: MemoryImages,
    train: Images,
    val: Images,
    test: Images,
    classes: tuple[str, ...],
    *,
    flip: bool,
) -> ImageData:
    channels, height, width = all_train.pixels.shape[1:]
    mean, std = _moments(all_train.pixels)
    return ImageData(
        train, val, test, classes, (channels, height, width), mean, std, flip=flip, crop=True
    )


def _moments(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, exactly, from counts of pixel values."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in pixels.unbind(1):
        counts = torch.bincount(channel.flatten().int(), minlength=256).double()
        share = counts / counts.sum()
        mean = float((share * levels).sum())
        variance = float((share * (levels - mean).square()).sum())
        means.append(mean)
        deviations.append(max(variance**0.5, 1e-3))
    return tuple(means), tuple(deviations)


def _split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Training and validation part, by a permutation that depends on the seed alone."""
    count = max(1, round(len(images) * fraction))
    if count >= len(images):
        raise ConfigError(
            f"val_fraction={fraction}: of {len(images)} training images none would be left"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(images, tuple(order[count:])), Subset(images, tuple(order[:count]))


def _digits() -> tuple[MemoryImages, MemoryImages, tuple[str, ...]]:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels: 1,197 to train, 600 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("the data set digits", "scikit-learn", "vision") from None
    bunch: Any = load_digits()
    pixels = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[600:], order[:600]
    return (
        MemoryImages(pixels[train], labels[train]),
        MemoryImages(pixels[test], labels[test]),
        tuple(str(name) for name in bunch.target_names),
    )


def _fake(size: int) -> tuple[MemoryImages, MemoryImages, tuple[str, ...]]:
    """Noise around one random pattern a class: learnable, and made in no time."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (10, 3, size, size), generator=generator).float()
    parts = []
    for count in (512, 256):
        labels = torch.randint(0, 10, (count,), generator=generator)
        noise = torch.randn(count, 3, size, size, generator=generator) * 64
        pixels = (patterns[labels] * 0.5 + 64 + noise).clamp(0, 255).to(torch.uint8)
        parts.append(MemoryImages(pixels, labels))
    return parts[0], parts[1], tuple(str(label) for label in range(10))


def _cifar(
    name: str, root: str, download: bool
) -> tuple[MemoryImages, MemoryImages, tuple[str, ...]]:
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingExtraError(f"the data set {name}", "torchvision", "vision") from None
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    parts, classes = [], ()
    for train in (True, False):
        try:
            data = kind(root, train=train, download=download)
        except RuntimeError as error:
            raise FileError(
                f"{root}: no complete {name} there ({error}); name its folder with --data-root, or "
                "add --download"
            ) from None
        except OSError as error:
            raise FileError(f"{root}: cannot get {name}: {error}") from None
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        parts.append(MemoryImages(pixels, torch.tensor(data.targets)))
        classes = tuple(data.classes)
    return parts[0], parts[1], classes


def _image_folder(
    folder: Path, image_size: int | None, val_fraction: float, seed: int
) -> ImageData:
    if not folder.is_dir():
        raise FileError(f"{folder}: no such folder")
    train_dir, val_dir, test_dir = (folder / part for part in ("train", "val", "test"))
    if not train_dir.is_dir() or not (val_dir.is_dir() or test_dir.is_dir()):
        raise FileError(f"{folder}: expected train/CLASS/IMAGE, and val/ or test/ beside train/")
    separate = val_dir.is_dir() and test_dir.is_dir()
    classes, *listed = _list_images(
        [train_dir, *([val_dir] if separate else []), test_dir if test_dir.is_dir() else val_dir]
    )
    size, alike = _common_size(listed[0][0])
    side = image_size or (size if alike else _DEFAULT_SIZE)
    total = sum(len(paths) for paths, _ in listed) * 3 * side * side
    if alike and side == size and total <= MAX_CACHE_BYTES:
        parts: list[Images] = [_decode_all(paths, labels, side) for paths, labels in listed]
    else:
        parts = [FileImages(tuple(paths), labels, side) for paths, labels in listed]
    all_train, test = parts[0], parts[-1]
    train, val = (all_train, parts[1]) if separate else _split(all_train, val_fraction, seed)
    if isinstance(all_train, MemoryImages):
        return _in_memory(all_train, train, val, test, classes, flip=True)
    return ImageData(
        train,
        val,
        test,
        classes,
        (3, side, side),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        flip=True,
        crop=False,
    )


def _list_images(folders: list[Path]) -> tuple[Any, ...]:
    """Class names, and for every folder its files and labels, by torchvision's conventions."""
    try:
        from torchvision import datasets
    except ImportError:
        raise MissingExtraError("imagefolder", "torchvision", "vision") from None
    parts, classes = [], None
    for folder in folders:
        try:
            found = datasets.ImageFolder(folder)
        except FileNotFoundError as error:
            raise FileError(f"{folder}: {error}") from None
        if classes is not None and tuple(found.classes) != classes:
            odd = sorted(set(found.classes) ^ set(classes))
            raise FileError(f"{folder}: its classes are not those of train/: {odd[0]!r} differs")
        classes = tuple(found.classes)
        parts.append(([Path(path) for path, _ in found.samples], torch.tensor(found.targets)))
    return (classes, *parts)


def _common_size(paths: Sequence[Path]) -> tuple[int, bool]:
    """Side of the images, and whether a sample of them are squares of that side."""
    step = max(1, len(paths) // 64)
    shapes = {tuple(decode(path).shape[1:]) for path in paths[::step]}
    height, width = next(iter(shapes))
    return height, len(shapes) == 1 and height == width


def _decode_all(paths: Sequence[Path], labels: Tensor, side: int) -> MemoryImages:
    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)

    def place(index: int) -> None:
        image = decode(paths[index])
        if image.shape[1:] != (side, side):
            raise FileError(
                f"{paths[index]}: {image.shape[2]}×{image.shape[1]} pixels, others have "
                f"{side}×{side}; give image_size to bring them all to one"
            )
        pixels[index] = image

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(place, range(len(paths)), chunksize=256):
            pass
    return MemoryImages(pixels, labels)
