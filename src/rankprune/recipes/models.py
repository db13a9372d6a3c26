"""Models by name: pytorchcv, torchvision, timm, the demo's own, or the user's function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from rankprune.errors import ConfigError, MissingExtraError, near


def build_model(
    name: str, *, classes: int | None, channels: int = 3, pretrained: bool = False
) -> nn.Module:
    """Build an image classifier.

    Args:
        name: a pytorchcv name ("resnet20_cifar10"), "torchvision:NAME", "timm:NAME", "digits_cnn",
            or "package.module:function" for a function that returns a module. That function is
            called with those of the keywords num_classes, in_channels, pretrained that it takes.
        classes: number of outputs; None for as many as the function makes by itself.
        channels: number of input channels.
        pretrained: load the library's weights, which must have that number of outputs.

    Raises:
        ConfigError: unknown name, or the library refuses the arguments.
        MissingExtraError: the library is not installed.
    """
    source, _, rest = name.partition(":")
    own = {} if classes is None else {"num_classes": classes}
    options: dict[str, Any] = {**own, "in_channels": channels}
    try:
        if name == "digits_cnn":
            return _without_weights(digits_cnn, name, pretrained, options)
        if source == "torchvision" and rest:
            return _torchvision(rest, own, channels, pretrained)
        if source == "timm" and rest:
            return _timm(rest, own, channels, pretrained)
        if rest:
            return _own(source, rest, {**options, "pretrained": pretrained})
        return _pytorchcv(name, pretrained, options)
    except (ConfigError, MissingExtraError):
        raise
    except Exception as error:
        raise ConfigError(
            f"model {name!r} cannot be built with {classes or 'its own'} classes and {channels} "
            f"channels: "
            f"{type(error).__name__}: {error}"
        ) from error


def is_trusted_name(name: str) -> bool:
    """Whether a name that stands in a file may be built: never a function of a module."""
    source, _, rest = name.partition(":")
    return not rest or source in ("torchvision", "timm")


def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A small VGG-like network for 8×8 images (the demo's)."""

    def block(c: int, n: int, stride: int = 1) -> list[nn.Module]:
        return [
            nn.Conv2d(c, n, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(n),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(in_channels, 32),
        *block(32, 64),
        *block(64, 64),
        *block(64, 128, stride=2),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


def _without_weights(
    make: Callable[..., nn.Module], name: str, pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    if pretrained:
        raise ConfigError(f"model {name!r} has no pretrained weights; leave --pretrained out")
    return make(**options)


def _check(name: str, known: Iterable[str], library: str) -> None:
    names = list(known)
    if name not in names:
        raise ConfigError(f"unknown {library} model {name!r}; {near(name, names)}")


def _pytorchcv(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        from pytorchcv import model_provider
    except ImportError:
        raise MissingExtraError(f"model {name!r}", "pytorchcv", "vision") from None
    known: dict[str, Any] = model_provider._models
    _check(name, [*known, "digits_cnn"], "pytorchcv")
    return model_provider.get_model(name, pretrained=pretrained, **options)


def _torchvision(name: str, classes: dict[str, int], channels: int, pretrained: bool) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError(f"model 'torchvision:{name}'", "torchvision", "vision") from None
    _check(name, models.list_models(module=models), "torchvision")
    if channels != 3:
        raise ConfigError(f"torchvision:{name} takes 3 channels, the data has {channels}")
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **classes)


def _timm(name: str, classes: dict[str, int], channels: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingExtraError(f"model 'timm:{name}'", "timm", "vision") from None
    if not timm.is_model(name):
        raise ConfigError(f"unknown timm model {name!r}; {near(name, timm.list_models())}")
    return timm.create_model(name, pretrained=pretrained, in_chans=channels, **classes)


def _own(module_name: str, function: str, options: dict[str, Any]) -> nn.Module:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a console script looks beside itself only
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model '{module_name}:{function}': cannot import {module_name!r}: {error}; known "
            "prefixes are torchvision: and timm:"
        ) from None
    make = getattr(module, function, None)
    if not callable(make):
        raise ConfigError(f"module {module_name!r} has no function {function!r}")
    taken = inspect.signature(make).parameters
    flexible = any(item.kind is item.VAR_KEYWORD for item in taken.values())
    model = make(**{key: value for key, value in options.items() if flexible or key in taken})
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"'{module_name}:{function}' must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model
