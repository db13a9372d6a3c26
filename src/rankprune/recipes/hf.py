"""Compressing a transformers model from a local folder, into a folder that transformers reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankprune.blocks import factorize_blocks
from rankprune.budget import Budget
from rankprune.calibrate import Stats, calibrate
from rankprune.errors import ConfigError, FileError, MissingExtraError
from rankprune.factorize import factorize
from rankprune.files import reporting
from rankprune.overrides import Override
from rankprune.plan import Plan
from rankprune.planner import make_plan
from rankprune.ranks import RankRule
from rankprune.report import Report, report

PREFIX = "hf:"
# windows that weigh layers against each other: ranks need few, factors many
SENSITIVITY = 16
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class LanguageModel:
    """A transformers model and its tokenizer, from a local folder.

    Attributes:
        model: in eval mode, on the CPU, of the class that its config names.
        tokenizer: None where the folder has none.
    """

    model: Any
    tokenizer: Any

    @property
    def causal(self) -> bool:
        """Whether it reads text from left to right, in windows without special tokens."""
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def window(self, wanted: int) -> int:
        """Tokens in a window: as wanted, or as many as the model can take."""
        limits = [getattr(self.model.config, "max_position_embeddings", None)]
        limits.append(getattr(self.tokenizer, "model_max_length", None))
        return min([wanted, *(limit for limit in limits if limit)])

    def example_inputs(self, tokens: int = 16) -> dict[str, torch.Tensor]:
        """Random tokens of one sequence, the same every time."""
        generator = torch.Generator().manual_seed(0)
        size = getattr(self.model.config.get_text_config(), "vocab_size", None)
        if size is None:
            raise ConfigError(
                f"{type(self.model).__name__} does not read text; compress it in Python, with "
                "make_plan and factorize"
            )
        return self._inputs(torch.randint(0, size, (1, tokens), generator=generator))

    def text(self, path: Path, *, window: int, windows: int) -> Iterator[dict[str, torch.Tensor]]:
        """What to call the model with, from a plain text file.

        A decoder gets windows of running text; others get one line at a time, with their special
        tokens.

        Raises:
            FileError: it cannot be read, or holds no text.
            ConfigError: the folder has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError("calibration with text needs a tokenizer in the model's folder")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: cannot read as text: {error}") from None
        size = self.window(window)
        pieces = self._running(text, size) if self.causal else self._lines(text, size)
        found = 0
        for ids in pieces:
            if found == windows:
                break
            found += 1
            yield self._inputs(ids)
        if not found:
            raise FileError(f"{path}: holds no text")

    def _running(self, text: str, size: int) -> Iterator[torch.Tensor]:
        ids = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids
        if ids.shape[1]:
            yield from (
                part for part in ids.split(size, 1) if part.shape[1] in (size, ids.shape[1])
            )

    def _lines(self, text: str, size: int) -> Iterator[torch.Tensor]:
        for line in filter(None, map(str.strip, text.splitlines())):
            yield self.tokenizer(
                line, truncation=True, max_length=size, return_tensors="pt"
            ).input_ids

    def _inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids}
        if self.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs


def open_folder(folder: Path) -> LanguageModel:
    """Load a model from a local folder; nothing is fetched, and no code of the folder's runs.

    Raises:
        FileError: no such folder, or transformers cannot load it.
        ConfigError: its config names no class of transformers.
        MissingExtraError: transformers is not installed.
    """
    _, kind = model_class(folder)
    try:
        model = kind.from_pretrained(folder, dtype="auto", **_LOCAL)
    except Exception as error:
        raise FileError(f"{folder}: {type(error).__name__}: {error}") from error
    return LanguageModel(model.eval(), open_tokenizer(folder))


def model_class(folder: Path) -> tuple[Any, Any]:
    """The config in a folder, and the class of transformers that it names.

    Raises:
        FileError, ConfigError, MissingExtraError: as in `open_folder`.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError(f"{PREFIX}{folder}", "transformers", "transformers") from None
    if not (folder / "config.json").is_file():
        raise FileError(f"{folder}: no config.json; give a folder that save_pretrained wrote")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise FileError(f"{folder}: {type(error).__name__}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder}: is factorised or quantised already; give dense weights")
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{folder}: config.json names no class of transformers, but {name!r}")
    return config, kind


def open_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None: vision and audio models have none."""
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except Exception as error:
        raise FileError(f"{folder}: its tokenizer: {type(error).__name__}: {error}") from error


def compress(
    source: LanguageModel,
    target: RankRule | Budget,
    *,
    text: Path | None = None,
    window: int = 1024,
    windows: int = 128,
    blockwise: bool = False,
    overrides: dict[str, Override] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[nn.Module, Plan, Report]:
    """Plan, factorise and compare; with text by the error of the layers' outputs on it.

    Under a budget layers are weighed by what their errors do to the answers, on the first windows.

    Args:
        source: the dense model.
        target: a rule or a budget; FLOPs are those of one sequence of 16 tokens.
        text: a plain text file to calibrate with; None looks at the weights alone.
        window: tokens in a window.
        windows: how many, at most.
        blockwise: fit each block to what the compressed ones before it return.
        overrides: as in `make_plan`.
        progress: called with the number of windows done.

    Raises:
        ConfigError, FileError: as `open_folder` and `LanguageModel.text`.
        BudgetError: the budget cannot be met.
    """
    stats: Stats | None = None
    by: Stats | None = None
    batches: list[Any] = []
    if text is not None:
        batches = list(source.text(text, window=window, windows=windows))
        by = stats = calibrate(source.model, batches, progress=progress)
        if isinstance(target, Budget):
            by = calibrate(source.model, batches[:SENSITIVITY], sensitivity=True)
    elif blockwise:
        raise ConfigError("compressing block by block needs a text to calibrate with")
    inputs = source.example_inputs()
    plan = make_plan(source.model, target, example_inputs=inputs, stats=by, overrides=overrides)
    if blockwise:
        compact = factorize_blocks(copy.deepcopy(source.model), plan, batches)
    else:
        compact = factorize(source.model, plan, stats=stats)
    return compact, plan, report(source.model, compact, example_inputs=inputs, plan=plan)


def save(source: LanguageModel, prepared: Any, folder: Path) -> None:
    """Write a compact model and its tokenizer as transformers does.

    Args:
        source: where it is from.
        prepared: by `integrations.huggingface.prepare`.
        folder: created where missing.

    Raises:
        FileError: the folder cannot be written.
    """
    with reporting(folder, "write"):
        prepared.save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
