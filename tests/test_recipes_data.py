"""Data sets: the split, the batches' independence of how they are prepared, and bad folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rankprune.errors import ConfigError, FileError
from rankprune.recipes.batches import eval_batches, steps_per_epoch, train_batches
from rankprune.recipes.config import TrainConfig
from rankprune.recipes.data import FileImages, ImageData, MemoryImages, Subset, decode, load_data
from rankprune.recipes.run import load


def write_folder(root: Path, sizes: list[tuple[int, int]], parts: tuple[str, ...]) -> Path:
    """An image folder of two classes, with one image of noise of each size a class and part."""
    generator = np.random.default_rng(0)
    for part in parts:
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for index, (width, height) in enumerate(sizes):
                pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.png")
    return root


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def epoch(data: ImageData, batch: int, **options: int) -> Batches:
    return list(train_batches(data, batch=batch, **{"seed": 3, "epoch": 1, **options}))


def same(first: Batches, second: Batches) -> bool:
    """Bit for bit, images and labels."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Files of many sizes, which are decoded batch by batch."""
    sizes = [(40 + 3 * index, 64 - 2 * index) for index in range(10)]
    folder = write_folder(tmp_path_factory.mktemp("large"), sizes, ("train", "val"))
    return load_data(f"imagefolder:{folder}", image_size=32)


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_split_is_a_partition_and_depends_on_the_seed_alone(name: str) -> None:
    first, again, other = (load_data(name, seed=seed) for seed in (1, 1, 2))
    assert isinstance(first.train, Subset)
    assert isinstance(first.val, Subset)
    assert isinstance(again.val, Subset)
    assert isinstance(other.val, Subset)
    train, val = set(first.train.indices.tolist()), set(first.val.indices.tolist())
    assert not train & val
    assert len(train) + len(val) == len(first.train.images)
    assert torch.equal(first.val.indices, again.val.indices)
    assert not torch.equal(first.val.indices, other.val.indices)


def test_moments_are_those_of_the_training_pixels() -> None:
    data = load_data("digits")
    assert isinstance(data.train, Subset)
    assert isinstance(data.train.images, MemoryImages)
    pixels = data.train.images.pixels.double() / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-9)
    assert data.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-9)


def test_batches_depend_on_seed_epoch_and_position_alone(large: ImageData) -> None:
    for data, batch in ((load_data("fake"), 32), (large, 4)):
        whole = epoch(data, batch)
        state = torch.manual_seed(99).get_state()
        assert len(whole) == steps_per_epoch(data.train, batch)
        assert same(whole, epoch(data, batch))
        assert same(whole[2:], epoch(data, batch, first=2))
        assert not torch.equal(whole[0][0], epoch(data, batch, epoch=2)[0][0])
        assert not torch.equal(whole[0][0], epoch(data, batch, seed=4)[0][0])
        # dropout draws from here, and a resumed run prepares batches once more
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(large: ImageData) -> None:
    for data, batch in ((load_data("fake"), 64), (large, 4)):
        assert same(epoch(data, batch), epoch(data, batch, workers=2))
    alone, parallel = (list(eval_batches(large.test, 3, workers=workers)) for workers in (0, 2))
    assert same(alone, parallel)


def test_processes_share_a_batch(large: ImageData) -> None:
    """What becomes of an image does not depend on which process it falls to."""
    whole = epoch(large, 6)
    for rank in range(3):
        share = epoch(large, 6, rank=rank, world=3)
        assert same([(pixels[rank::3], labels[rank::3]) for pixels, labels in whole], share)
    with pytest.raises(ConfigError, match="cannot be shared by 4 processes"):
        epoch(large, 6, world=4)


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
    name = f"imagefolder:{write_folder(tmp_path / 'b', [(320, 256)] * 2, ('train', 'val'))}"
    wide = load_data(name, image_size=224)
    assert isinstance(wide.test, FileImages)
    assert (wide.mean, wide.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # evaluated as ImageNet is: the shorter side 256, and of that the middle 224 × 224
    whole = decode(tmp_path / "b" / "val" / "cat" / "1.png")
    assert torch.equal(wide.test.fetch(1, train=False), whole[:, 16:240, 48:272])
    crops = [wide.test.fetch(1, train=True) for _ in range(2)]
    assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2
    assert not torch.equal(*crops)


def test_streamed_images_are_those_in_memory(tmp_path: Path) -> None:
    name = f"imagefolder:{write_folder(tmp_path, [(8, 8)] * 10, ('train', 'test'))}"
    kept, streamed = load_data(name), load_data(name, stream=True)
    assert isinstance(kept.test, MemoryImages)
    assert isinstance(streamed.test, FileImages)
    assert (kept.mean, kept.std, kept.shape) == (streamed.mean, streamed.std, streamed.shape)
    assert same(epoch(kept, 6), epoch(streamed, 6))
    assert same(list(eval_batches(kept.test, 7)), list(eval_batches(streamed.test, 7)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    folder = write_folder(tmp_path, [(40, 30)] * 70, ("train", "test"))
    data = load_data(f"imagefolder:{folder}", image_size=16)
    broken = folder / "test" / "dog" / "3.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(FileError) as caught:
        list(eval_batches(data.test, 50, workers=workers))
    assert str(caught.value).startswith(f"{broken}: not a readable image")
    assert "\n" not in str(caught.value)


def test_val_and_test_are_used_as_they_are(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [(8, 8)] * 5, ("train", "val", "test"))
    data = load_data(f"imagefolder:{folder}")
    assert (len(data.train), len(data.val), len(data.test)) == (10, 10, 10)


def test_a_folder_of_classes_without_parts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [(8, 8)] * 5, ("",))
    data = load_data(f"imagefolder:{folder}")
    assert data.train is data.val is data.test
    assert (len(data.test), data.classes) == (10, ("cat", "dog"))
    config = TrainConfig(data=f"imagefolder:{folder}", model="digits_cnn")
    with pytest.raises(ConfigError, match="tested with the images it has seen"):
        load(config)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder"):
        load_data(f"imagefolder:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="expected train"):
        load_data(f"imagefolder:{tmp_path / 'empty'}")
    for parts in (("val",), ("train",), ("val", "test")):
        lacking = write_folder(tmp_path / "-".join(parts), [(8, 8)], parts)
        with pytest.raises(FileError, match="expected train"):
            load_data(f"imagefolder:{lacking}")
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


def test_images_that_are_as_they_are_have_no_other_size() -> None:
    assert load_data("digits", image_size=8).shape == (1, 8, 8)
    with pytest.raises(ConfigError, match="image_size=16 is for image folders"):
        load_data("digits", image_size=16)


def test_missing_cifar_tells_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="--download"):
        load_data("cifar10", root=str(tmp_path))
