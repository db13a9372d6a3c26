"""Image data sets: uint8 images in memory, or files that are decoded when they are needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankprune.errors import ConfigError, FileError, MissingExtraError, near

DATA_SETS = ("digits", "cifar10", "cifar100", "fake", "imagefolder:DIR")
# Images that may be used as they are, and kept; larger sets are cropped, batch by batch.
MAX_CACHE_BYTES = 4 * 2**30
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DEFAULT_SIZE = 224
_PARTS = ("train", "val", "test")
# What Pillow's decoder gains from threads ends about here.
_THREADS = 4


class Images(Protocol):
    """A list of labelled images."""

    @property
    def labels(self) -> Tensor:
        """Class of every image: [n]."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def fetch(self, index: int, *, train: bool) -> Tensor:
        """An image as uint8 [C, H, W], all of one size; `train` allows a random crop of a file."""
        ...


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: pixels [n, C, H, W] uint8, labels [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, index: int, *, train: bool) -> Tensor:
        return self.pixels[index]


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded to RGB when they are needed.

    Attributes:
        paths: encoded, in one array; a million strings would be copied into every worker process.
        labels: class of every image.
        size: side to which images are brought.
        alike: whether the files have that size; others are resized and cropped.
    """

    paths: npt.NDArray[np.bytes_]
    labels: Tensor
    size: int
    alike: bool

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, index: int, *, train: bool) -> Tensor:
        from torchvision.transforms import v2

        path = Path(os.fsdecode(self.paths[index]))
        image = decode(path)
        if self.alike:
            if image.shape[1:] != (self.size, self.size):
                raise FileError(
                    f"{path}: {image.shape[2]}×{image.shape[1]} pixels, others have "
                    f"{self.size}×{self.size}; resize or remove it, or give another image_size, "
                    "to which all are brought"
                )
            return image
        if train:
            cropped: Tensor = v2.RandomResizedCrop(self.size, antialias=True)(image)
            return cropped
        # 256 for 224, as everybody evaluates ImageNet
        shorter = round(self.size * 256 / 224)
        centre: Tensor = v2.CenterCrop(self.size)(v2.Resize(shorter, antialias=True)(image))
        return centre


@dataclass(frozen=True)
class Subset:
    """Some of the images of another list."""

    images: Images
    indices: Tensor

    @cached_property
    def labels(self) -> Tensor:
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, index: int, *, train: bool) -> Tensor:
        return self.images.fetch(int(self.indices[index]), train=train)


@dataclass(frozen=True)
class ImageData:
    """A data set in three parts.

    Attributes:
        train, val, test: `val` is split off the training images where there is no such part. All
            three are one where the images come without parts.
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
    stream: bool = False,
) -> ImageData:
    """Load a data set by name.

    Args:
        name: one of `DATA_SETS`. An image folder has train/CLASS/IMAGE, and val/ or test/ or both
            beside train/; or CLASS/IMAGE without parts, for all but training.
        root: where torchvision's data sets lie.
        download: fetch a torchvision data set that is missing.
        image_size: side to which image files are brought, or of fake images; None takes the files'
            own where all are alike, else 224. Files that have another size, or that do not fit in
            memory, are decoded batch by batch and cropped at random to train.
        val_fraction: share of the training images that becomes the validation part.
        seed: of that split.
        stream: decode image files batch by batch, also where they would fit in memory. The images
            are the same.

    Raises:
        ConfigError: unknown name, or an image_size that its images do not have.
        FileError: missing or empty folders, files that are no images.
    """
    kind, _, argument = name.partition(":")
    if kind == "imagefolder" and argument:
        return _image_folder(Path(argument), image_size, val_fraction, seed, stream)
    if argument or kind not in ("digits", "cifar10", "cifar100", "fake"):
        raise ConfigError(f"unknown data set {name!r}; {near(name, DATA_SETS)}")
    if kind == "digits":
        train, test, classes = _digits()
    elif kind == "fake":
        train, test, classes = _fake(image_size or 32)
    else:
        train, test, classes = _cifar(kind, root, download)
    side = train.pixels.shape[-1]
    if image_size not in (None, side):
        raise ConfigError(
            f"{name}: its images have {side}×{side} pixels; image_size={image_size} is for image "
            "folders"
        )
    fit, val = _split(train, val_fraction, seed)
    return _as_they_are(train, fit, val, test, classes, flip=kind != "digits")


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


def _as_they_are(
    all_train: Images,
    train: Images,
    val: Images,
    test: Images,
    classes: tuple[str, ...],
    *,
    flip: bool,
) -> ImageData:
    channels, height, width = all_train.fetch(0, train=False).shape
    mean, std = _moments(all_train)
    return ImageData(
        train, val, test, classes, (channels, height, width), mean, std, flip=flip, crop=True
    )


def _moments(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, exactly, from counts of pixel values."""

    step = 128

    def count(start: int) -> Tensor:
        indices = range(start, min(start + step, len(images)))
        pixels = torch.stack([images.fetch(index, train=False) for index in indices])
        channels = pixels.transpose(0, 1).flatten(1)
        return torch.stack([torch.bincount(values, minlength=256) for values in channels])

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(count, range(0, len(images), step))
        counts = torch.stack(list(parts)).sum(0).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for share in counts / counts.sum(1, keepdim=True):
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
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[count:]), Subset(images, order[:count])


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
    folder: Path, image_size: int | None, val_fraction: float, seed: int, stream: bool
) -> ImageData:
    if not folder.is_dir():
        raise FileError(f"{folder}: no such folder")
    names = [name for name in _PARTS if (folder / name).is_dir()]
    whole = not names and any(child.is_dir() for child in folder.iterdir())
    if not whole and (len(names) < 2 or names[0] != "train"):
        raise FileError(
            f"{folder}: expected train/CLASS/IMAGE, and val/ or test/ beside train/; "
            "or CLASS/IMAGE, to evaluate or calibrate with"
        )
    classes, *listed = _list_images([folder / name for name in names or [""]])
    size, alike = _common_size(listed[0][0])
    side = image_size or (size if alike else _DEFAULT_SIZE)
    total = sum(len(paths) for paths, _ in listed) * 3 * side * side
    alike = alike and side == size and total <= MAX_CACHE_BYTES
    files = [FileImages(paths, labels, side, alike) for paths, labels in listed]
    parts: list[Images] = [*files]
    if alike and not stream:
        parts = [_decode_all(part) for part in files]
    all_train, test = parts[0], parts[-1]
    train, val = all_train, parts[len(parts) // 2]
    if len(parts) == 2:
        train, val = _split(all_train, val_fraction, seed)
    if alike:
        return _as_they_are(all_train, train, val, test, classes, flip=True)
    shape = (3, side, side)
    mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    return ImageData(train, val, test, classes, shape, mean, std, flip=True, crop=False)


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
        paths = np.array([os.fsencode(path) for path, _ in found.samples])
        parts.append((paths, torch.tensor(found.targets)))
    return (classes, *parts)


def _common_size(paths: npt.NDArray[np.bytes_]) -> tuple[int, bool]:
    """Side of the images, and whether a sample of them are squares of that side."""
    step = max(1, len(paths) // 64)
    shapes = {tuple(decode(Path(os.fsdecode(path))).shape[1:]) for path in paths[::step]}
    height, width = next(iter(shapes))
    return height, len(shapes) == 1 and height == width


def _decode_all(files: FileImages) -> MemoryImages:
    pixels = torch.empty(len(files), 3, files.size, files.size, dtype=torch.uint8)

    def place(index: int) -> None:
        pixels[index] = files.fetch(index, train=False)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(place, range(len(files)), chunksize=256):
            pass
    return MemoryImages(pixels, files.labels)
