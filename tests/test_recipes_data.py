"""Data sets: the split, the batches' independence of how they are prepared, and bad folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rankprune.errors import ConfigError, FileError
from rankprune.recipes.batches import eval_batches, steps_per_epoch, train_batches
from rankprune.recipes.data import FileImages, MemoryImages, Subset, load_data


def write_folder(root: Path, sizes: list[tuple[int, int]], parts: tuple[str, ...]) -> Path:
    """An image folder of two classes, with one image of each size a class and part."""
    for part in parts:
        for label, colour in (("cat", 40), ("dog", 200)):
            (root / part / label).mkdir(parents=True)
            for index, size in enumerate(sizes):
                image = Image.new("RGB", size, (colour, index, 0))
                image.save(root / part / label / f"{index}.png")
    return root


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_split_is_a_partition_and_depends_on_the_seed_alone(name: str) -> None:
    first, again, other = (load_data(name, seed=seed) for seed in (1, 1, 2))
    assert isinstance(first.train, Subset)
    assert isinstance(first.val, Subset)
    assert isinstance(again.val, Subset)
    assert isinstance(other.val, Subset)
    train, val = set(first.train.indices), set(first.val.indices)
    assert not train & val
    assert len(train) + len(val) == len(first.train.images)
    assert first.val.indices == again.val.indices
    assert first.val.indices != other.val.indices


def test_moments_are_those_of_the_training_pixels() -> None:
    data = load_data("digits")
    assert isinstance(data.train, Subset)
    assert isinstance(data.train.images, MemoryImages)
    pixels = data.train.images.pixels.double() / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-9)
    assert data.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-9)


def test_batches_depend_on_seed_epoch_and_position_alone() -> None:
    data = load_data("fake")

    def epoch(**options: int) -> list[torch.Tensor]:
        batches = train_batches(data, batch=32, **{"seed": 3, "epoch": 1, **options})
        return [pixels for pixels, _ in batches]

    whole = epoch()
    torch.manual_seed(99)
    assert len(whole) == steps_per_epoch(data.train, 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, epoch(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], epoch(first=5), strict=True))
    assert not torch.equal(whole[0], epoch(epoch=2)[0])
    assert not torch.equal(whole[0], epoch(seed=4)[0])


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    data = load_data("fake")
    plain, parallel = (
        [p for p, _ in train_batches(data, batch=64, seed=0, epoch=0, workers=n)] for n in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, parallel, strict=True))


def test_processes_share_a_batch() -> None:
    data = load_data("fake")
    options = {"batch": 32, "seed": 0, "epoch": 0}
    whole = next(iter(train_batches(data, augment=False, **options)))[1]
    shares = [
        next(iter(train_batches(data, augment=False, rank=rank, world=2, **options)))[1]
        for rank in range(2)
    ]
    assert torch.equal(whole[0::2], shares[0])
    assert torch.equal(whole[1::2], shares[1])
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        next(iter(train_batches(data, world=3, **options)))


def test_every_image_is_evaluated_once_over_all_processes() -> None:
    data = load_data("digits")
    seen = [
        labels for rank in range(3) for _, labels in eval_batches(data.test, 64, rank=rank, world=3)
    ]
    assert torch.equal(torch.cat(seen).sort().values, data.test.labels.sort().values)


def test_small_images_are_kept_in_memory_and_large_ones_decoded(tmp_path: Path) -> None:
    small = load_data(
        f"imagefolder:{write_folder(tmp_path / 'a', [(8, 8)] * 5, ('train', 'test'))}"
    )
    assert small.shape == (3, 8, 8)
    assert isinstance(small.test, MemoryImages)
    assert small.classes == ("cat", "dog")
    mixed = load_data(
        f"imagefolder:{write_folder(tmp_path / 'b', [(40, 30), (50, 60)] * 3, ('train', 'val'))}",
        image_size=24,
    )
    assert isinstance(mixed.test, FileImages)
    assert [tuple(i.shape) for i in mixed.test.fetch([0, 1], train=False)] == [(3, 24, 24)] * 2
    assert mixed.test.fetch([0], train=True)[0].shape == (3, 24, 24)


def test_val_and_test_are_used_as_they_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [(8, 8)] * 5, ("train", "val", "test"))
    data = load_data(f"imagefolder:{folder}")
    assert (len(data.train), len(data.val), len(data.test)) == (10, 10, 10)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        load_data(f"imagefolder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="expected train"):
        load_data(f"imagefolder:{tmp_path / 'empty'}")
    hollow = tmp_path / "hollow"
    for part in ("train/cat", "test/cat"):
        (hollow / part).mkdir(parents=True)
    with pytest.raises(FileError, match="hollow"):
        load_data(f"imagefolder:{hollow}")
    broken = write_folder(tmp_path / "broken", [(8, 8)] * 5, ("train", "test"))
    (broken / "train" / "cat" / "3.png").write_bytes(b"not an image")
    with pytest.raises(FileError, match=r"3\.png: not a readable image"):
        load_data(f"imagefolder:{broken}")
    odd = write_folder(tmp_path / "odd", [(8, 8)] * 5, ("train", "test"))
    (odd / "test" / "dog").rename(odd / "test" / "fox")
    with pytest.raises(FileError, match="classes are not those"):
        load_data(f"imagefolder:{odd}")


@pytest.mark.parametrize("name", ["nope", "imagefolder:", "digits:x"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown data set"):
        load_data(name)


def test_missing_cifar_tells_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="--download"):
        load_data("cifar10", root=str(tmp_path))
