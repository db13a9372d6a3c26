"""Weights that somebody has, of a model whose number of outputs they must tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rankprune import ConfigError, FileError, FixedRank, PlanError, factorize, make_plan, save
from rankprune.recipes.checkpoint import write_checkpoint
from rankprune.recipes.compress import open_source, recorded, recorded_view
from rankprune.recipes.data import load_data
from rankprune.recipes.models import build_model
from rankprune.recipes.weights import load_weights, require_dense


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("name", "classes", "side"),
    [
        ("torchvision:resnet18", 7, 64),
        ("timm:vit_tiny_patch16_224", 5, 224),
        ("resnet20_cifar10", 10, 32),
        ("digits_cnn", 3, 8),
    ],
)
def test_the_number_of_outputs_is_read_off_any_file(
    tmp_path: Path, name: str, classes: int, side: int, suffix: str
) -> None:
    state = build_model(name, classes=classes).state_dict()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)  # in the order of the alphabet
    source = open_source(path, model=name, shape=(3, side, side))
    assert source.metadata.get("outputs", 10) == classes  # or the network's own
    assert all(torch.equal(v, state[k]) for k, v in source.model.state_dict().items())


@pytest.mark.parametrize("wrapped", ["module._orig_mod.{}", "_orig_mod.module.{}", "module.{}"])
def test_wrappers_in_any_order_are_looked_through(tmp_path: Path, wrapped: str) -> None:
    state = build_model("digits_cnn", classes=10).state_dict()
    torch.save({wrapped.format(key): value for key, value in state.items()}, tmp_path / "w.pt")
    model = load_weights(build_model("digits_cnn", classes=10), tmp_path / "w.pt")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_factors_makes_factors(tmp_path: Path) -> None:
    dense = build_model("digits_cnn", classes=10, channels=1)
    plan = make_plan(dense, FixedRank(3), guard=False)
    compact = factorize(dense, plan).eval()
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"model": compact.state_dict(), "plan": plan.to_json()})
    loaded = load_weights(build_model("digits_cnn", classes=10, channels=1), path).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), compact(x))
    with pytest.raises(ConfigError, match="factorised already"):
        require_dense(loaded)
    with pytest.raises(PlanError, match="does not fit the plan"):
        load_weights(build_model("digits_cnn", classes=11, channels=1), path)


def test_a_saved_folder_tells_how_its_data_set_was_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    told = {"shape": [3, 16, 16], "val_fraction": 0.25, "seed": 3}
    save(model, tmp_path / "model", metadata=told)
    view = recorded_view(recorded(tmp_path / "model"))
    assert view == {"image_size": 16, "val_fraction": 0.25, "seed": 3}
    data, other = load_data("fake", **view), load_data("fake", image_size=16)
    assert (len(data.val), len(other.val)) == (128, 51)
    # what a file may hold instead
    for nonsense in ({"shape": [3, "a", 4]}, {"val_fraction": 2.0, "seed": 0}, {"seed": 1}):
        assert recorded_view(nonsense) == {}
    with pytest.raises(FileError, match="no such file or folder"):
        recorded(tmp_path / "modle")


def test_a_data_set_that_contradicts_is_refused(tmp_path: Path) -> None:
    data = load_data("fake", image_size=16)
    weights = tmp_path / "w.pt"
    torch.save(build_model("digits_cnn", classes=10, channels=3).state_dict(), weights)
    for options, complaint in (
        ({"shape": (3, 8, 8)}, r"inputs of \(3, 8, 8\) were asked for"),
        ({"classes": 3}, "3 classes were asked for, and the data set has 10"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            open_source(weights, model="digits_cnn", data=data, **options)  # type: ignore[arg-type]
    for classes, complaint in (
        ([str(9 - label) for label in range(10)], "in another order"),
        (["cat", *map(str, range(9))], "'cat' is not among them"),
    ):
        folder = tmp_path / complaint.split()[0]
        model = build_model("digits_cnn", classes=10, channels=3)
        save(model, folder, metadata={"model": "digits_cnn", "classes": classes})
        with pytest.raises(ConfigError, match=complaint):
            open_source(folder, data=data)
