"""The options of a run: validated, written next to its result, and read back."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rankprune.budget import Budget
from rankprune.errors import ConfigError, FileError, near
from rankprune.files import read_bytes
from rankprune.ranks import EVBMF, Energy, FixedRank, RankRule, Ratio, StableRank, Threshold
from rankprune.runtimes import Runtime
from rankprune.schemes import check_scheme

_MAX_CONFIG_BYTES = 2**20
# Weights of a dense network's answers and blocks, where there is one to learn from.
SOFT, MATCH = 0.9, 3.0


class TrainConfig(BaseModel):
    """Everything that decides the result of a training run.

    Attributes:
        data: "digits", "cifar10", "cifar100", "fake" or "imagefolder:DIR".
        model: a pytorchcv name, "torchvision:NAME", "timm:NAME", "digits_cnn" or
            "package.module:function".
        data_root: where torchvision's data sets lie.
        download: fetch a torchvision data set that is missing.
        image_size: side of the images in pixels; None takes the data set's own.
        stream: decode image files batch by batch, also where they would fit in memory.
        pretrained: start from the model library's weights.
        weights: start from this state dict (.safetensors, .pt or a saved folder).
        method: "trp", or "dense" for a baseline without it.
        baseline: also train a dense network alike, to compare with.
        scheme: as in `make_plan`.
        flops, params: budget as fractions of the dense network.
        latency: budget as a fraction of the dense network's time, or as milliseconds ("12ms").
        backend: measure layers there, and make none slower; a latency budget takes onnxruntime.
        threads: of an operator when measuring; None for torch's number.
        batch: examples in a call when measuring.
        rank: a rank rule such as "energy:0.98", instead of a budget.
        every: period of projections in steps.
        start, descent: as shares of the run: when projections start, and how long the budget takes
            from there to come down to its target.
        tail: share of the run, at its end, in which the factors are trained instead of the dense
            weights; their ranks are those that TRP has reached by then. 0 for TRP to the end.
        nuclear, nuclear_mode, nuclear_when: as in `TRP`.
        distill: weight of the dense network's answers beside the labels, 0 to 1. The dense network
            is what the run starts from (`pretrained`, `weights`), or the `baseline`. None takes
            0.9 where there is one, and 0 elsewhere.
        match: weight of the errors of the blocks' outputs, against the dense network's, where
            `distill` is not 0. None takes 3.
        mirrored: ask the dense network about each image's mirror image too, and take the mean of
            both answers, which is more often right. None does where training images are mirrored.
        multiple_of: ranks are multiples of this.
        epochs: passes over the training part.
        batch_size: images of one optimizer step, over all processes.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        lr: learning rate at its highest.
        weight_decay: of the optimizer.
        schedule: "onecycle", "cosine", "multistep" (÷10 at 50 % and at 75 %) or "constant".
        label_smoothing: of the cross-entropy.
        precision: of training; evaluation is always fp32.
        val_fraction: share of the training images kept for validation, where the data set has no
            validation part of its own.
        augment: crop and flip the training images.
        seed: of weights, order, augmentation and split.
        workers: processes that prepare batches, beside each training process; 0 prepares them in
            it. The result does not depend on it.
        checkpoint_every: steps between checkpoints; one is always written after an epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    data: str
    model: str
    data_root: str = "data"
    download: bool = False
    image_size: int | None = Field(default=None, ge=1)
    stream: bool = False
    pretrained: bool = False
    weights: str | None = None
    method: Literal["trp", "dense"] = "trp"
    baseline: bool = False
    scheme: str = "auto"
    flops: float | None = None
    params: float | None = None
    latency: float | str | None = None
    backend: str | None = None
    threads: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    rank: str | None = None
    every: int = Field(default=10, ge=1)
    start: float = Field(default=0.0, ge=0, lt=1)
    descent: float = Field(default=0.3, ge=0, le=1)
    tail: float = Field(default=0.5, ge=0, lt=1)
    nuclear: float = Field(default=0.0, ge=0)
    nuclear_mode: Literal["gradient", "decoupled"] = "gradient"
    nuclear_when: Literal["projection", "step"] = "projection"
    distill: float | None = Field(default=None, ge=0, le=1)
    match: float | None = Field(default=None, ge=0)
    mirrored: bool | None = None
    multiple_of: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["onecycle", "cosine", "multistep", "constant"] = "onecycle"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    augment: bool = True
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)

    def target(self) -> RankRule | Budget:
        """What the run aims at.

        Raises:
            ConfigError: none or more than one of flops / params and rank.
        """
        budget = any(bound is not None for bound in (self.flops, self.params, self.latency))
        if budget == (self.rank is not None):
            raise ConfigError(
                "give a target: a budget (flops, params or latency, as fractions of the dense "
                "network) or a rank rule (rank, such as energy:0.98), and not both"
            )
        if self.rank is not None:
            return parse_rule(self.rank)
        return Budget(flops=self.flops, params=self.params, **parse_latency(self.latency))

    def runtime(self) -> Runtime | None:
        """Where layers are measured, if anywhere."""
        if self.backend is None and self.latency is None:
            return None
        return Runtime(backend=self.backend or "onnxruntime", threads=self.threads)

    def soft(self) -> float:
        """Weight of the dense network's answers in the loss.

        Raises:
            ConfigError: `distill`, `match` or `mirrored` is given, and there is nothing to learn
                from.
        """
        if self.method == "dense":
            return 0.0
        taught = self.pretrained or self.weights is not None or self.baseline
        if self.distill and not taught:
            raise ConfigError(
                f"distill={self.distill}: there is no trained dense network to learn from; start "
                "from weights (weights, pretrained), or train one beforehand (baseline)"
            )
        soft = (SOFT if taught else 0.0) if self.distill is None else self.distill
        asked = f"match={self.match}" if self.match else "mirrored" if self.mirrored else ""
        if asked and not soft:
            raise ConfigError(
                f"{asked} needs a dense network and its answers: start from weights "
                "(weights, pretrained), or train one beforehand (baseline), with distill above 0"
            )
        return soft


# The set-up of Xu et al. 2019, arXiv 1910.04576, section 4.1.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 164,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "multistep",
        "rank": "energy:0.98",
        "every": 20,
        "start": 0.0,
        "tail": 0.0,
        "distill": 0.0,
        "nuclear": 3e-4,
    },
    # From pretrained weights. One image in a hundred is kept to validate every epoch on.
    "paper-imagenet": {
        "epochs": 10,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "schedule": "constant",
        "rank": "energy:0.98",
        "every": 20,
        "start": 0.0,
        "tail": 0.0,
        "distill": 0.0,
        "nuclear": 3e-4,
        "val_fraction": 0.01,
    },
}


def parse_rule(text: str) -> RankRule:
    """Read a rank rule: a name, and a number after a colon.

    >>> parse_rule("energy:0.98"), parse_rule("evbmf")
    (Energy(keep=0.98), EVBMF(weaken=0.0))

    Raises:
        ConfigError: unknown name, or not a number.
    """
    name, _, value = text.partition(":")
    optional = {"evbmf": EVBMF, "stable": StableRank}
    required = {"energy": Energy, "ratio": Ratio, "threshold": Threshold, "relative": _relative}
    known = [*required, "fixed", *optional]
    if name not in known:
        raise ConfigError(f"unknown rank rule {name!r}; {near(name, known)}")
    example = "8" if name == "fixed" else "0.5"
    try:
        if name == "fixed":
            return FixedRank(int(value))
        if name in optional:
            return optional[name](float(value)) if value else optional[name]()
        return required[name](float(value))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"rank rule {text!r}: {name} needs a number, as in {name}:{example}"
        ) from None


def parse_latency(text: str | float | None) -> dict[str, float]:
    """Read a bound on time: a fraction of the dense network's, or milliseconds.

    >>> parse_latency("0.5"), parse_latency("12ms"), parse_latency(None)
    ({'latency': 0.5}, {'latency_ms': 12.0}, {})

    Raises:
        ConfigError: neither.
    """
    if text is None:
        return {}
    digits = str(text).strip().lower()
    try:
        if digits.endswith("ms"):
            return {"latency_ms": float(digits.removesuffix("ms"))}
        return {"latency": float(digits)}
    except ValueError:
        raise ConfigError(
            f"latency {text!r}: a fraction of the dense network's time, such as 0.5, or "
            "milliseconds, such as 12ms"
        ) from None


def _relative(value: float) -> Threshold:
    return Threshold(value, relative=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file with the safe loader.

    Raises:
        FileError: missing, too large, or not a YAML mapping.
    """
    try:
        document = yaml.safe_load(read_bytes(path, _MAX_CONFIG_BYTES))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise FileError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise FileError(f"{path}: expected a mapping of options, got {type(document).__name__}")
    strange = [key for key in document if not isinstance(key, str)]
    if strange:
        raise FileError(f"{path}: option {reprlib.repr(strange[0])} is not a name")
    return document


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Validate options.

    Raises:
        ConfigError: an unknown or impossible option; the message names it.
    """
    try:
        config = TrainConfig(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None
    check_scheme(config.scheme)
    config.runtime()
    config.soft()
    if config.method == "trp":
        descent = config.descent if isinstance(config.target(), Budget) else 0.0
        if config.start + descent + config.tail > 1 + 1e-9:
            raise ConfigError(
                f"start={config.start}, descent={descent}, tail={config.tail}: together they "
                "exceed the run; the target must be reached before the factors are trained"
            )
    return config


def to_yaml(config: TrainConfig) -> bytes:
    """The resolved options, as a file that `read_yaml` reads."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False).encode()


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown option {name!r}; {near(name, TrainConfig.model_fields)}"
    if item["type"] == "missing":
        return f"option {name!r} is missing"
    return f"{name}={reprlib.repr(item['input'])}: {item['msg'][:1].lower()}{item['msg'][1:]}"
