"""Options, rank rules as text, models by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rankprune import EVBMF, Budget, Energy, FixedRank, Ratio, StableRank, Threshold
from rankprune.errors import ConfigError, FileError
from rankprune.recipes.config import PRESETS, make_config, parse_rule, read_yaml, to_yaml
from rankprune.recipes.models import build_model, is_trusted_name

BASE = {"data": "fake", "model": "digits_cnn"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("energy:0.98", Energy(0.98)),
        ("ratio:0.5", Ratio(0.5)),
        ("fixed:8", FixedRank(8)),
        ("threshold:0.1", Threshold(0.1)),
        ("relative:0.1", Threshold(0.1, relative=True)),
        ("evbmf", EVBMF()),
        ("stable:2", StableRank(2.0)),
    ],
)
def test_rules_are_read(text: str, rule: object) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize("text", ["enrgy:1", "energy", "energy:x", "energy:2", "fixed:1.5", ""])
def test_bad_rules_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rule(text)


def test_options_survive_the_file(tmp_path: Path) -> None:
    config = make_config({**BASE, "flops": 0.5, "params": 0.6, "seed": 7})
    (tmp_path / "c.yaml").write_bytes(to_yaml(config))
    assert make_config(read_yaml(tmp_path / "c.yaml")) == config
    assert config.target() == Budget(flops=0.5, params=0.6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flops": 0.5, "epoch": 3}, "did you mean 'epochs'"),
        ({"flops": 0.5, "epochs": 0}, "epochs=0: "),
        ({"flops": 0.5, "precision": "fp8"}, "precision='fp8'"),
        ({"flops": 0.5, "scheme": "spatiel"}, "did you mean 'spatial'"),
        ({"flops": 0.5, "rank": "evbmf"}, "not both"),
        ({"flops": 0}, "greater than 0"),
        ({"flops": 1.5}, "at most 1"),
        ({}, "give a target"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config({**BASE, **values})


@pytest.mark.parametrize(("preset", "epochs"), [("paper", 164), ("paper-imagenet", 10)])
@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled", "depthwise"])
def test_presets_are_complete(preset: str, epochs: int, scheme: str) -> None:
    config = make_config({**BASE, **PRESETS[preset], "scheme": scheme, "nuclear": 0.0})
    assert (config.epochs, config.every, config.rank) == (epochs, 20, "energy:0.98")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.getcwd []", "\x00"])
def test_bad_yaml_is_refused_and_runs_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(FileError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("resnet20_cifar10", 10),
        ("preresnet20_cifar10", 10),
        ("resnet20_cifar100", 100),
        ("torchvision:resnet18", 7),
        ("timm:resnet10t", 7),
    ],
)
def test_models_have_the_outputs_asked_for(name: str, classes: int) -> None:
    model = build_model(name, classes=classes).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, classes)


def own_model(num_classes: int) -> nn.Module:
    """What a user's function may look like."""
    return nn.Linear(4, num_classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21_cifar10", "did you mean 'resnet20_cifar10'"),
        ("torchvision:resnet19", "unknown torchvision model"),
        ("timm:nothing_here", "unknown timm model"),
        ("no.such.module:make", "cannot import"),
        ("math:nothing", "has no function"),
        ("math:sqrt", "cannot be built"),
    ],
)
def test_unknown_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, classes=10)


def test_own_functions_are_called_but_never_trusted_in_files() -> None:
    name = f"{__name__}:own_model"
    assert build_model(name, classes=5)(torch.zeros(1, 4)).shape == (1, 5)
    assert not is_trusted_name(name)
    assert is_trusted_name("torchvision:resnet18")
    assert is_trusted_name("digits_cnn")
