"""Compressing a transformers checkpoint block by block, for models that do not fit in memory.

The model is built without weights. What stands before the blocks is read, the texts are brought to
the first block, and then each block in its turn is read from the shards, calibrated with what the
compressed blocks before it return, planned, factorised and written. So one block, its inputs'
moments and the texts' states are all that is held.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankprune.blocks import Block, find_blocks, walk
from rankprune.budget import Budget
from rankprune.errors import ConfigError, FileError, MissingExtraError
from rankprune.factorize import factorize
from rankprune.files import (
    commit,
    read_bytes,
    remove_stale,
    reporting,
    temporary_file,
    write_atomically,
)
from rankprune.integrations.huggingface import RankPruneConfig, state_with_ranks
from rankprune.plan import LayerPlan, Plan
from rankprune.planner import UNCHOSEN, make_plan, realise
from rankprune.profile import count_params
from rankprune.ranks import RankRule
from rankprune.recipes.hf import LanguageModel, model_class, open_tokenizer

try:
    from accelerate import init_empty_weights
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise  # it is installed, but lacks something itself
    raise MissingExtraError("streaming", "accelerate", "transformers") from None

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_GENERATION = "generation_config.json"
_MAX_INDEX_BYTES = 64 * 2**20


class Shards:
    """The tensors of a checkpoint in safetensors, read one at a time.

    Args:
        folder: what save_pretrained wrote: one file, or shards and their index.

    Raises:
        FileError: there is none, the index is malformed or names a file elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        index = folder / INDEX
        # as transformers looks for them: an index may be left of an earlier save
        if index.exists() and not (folder / SINGLE).exists():
            self.files = _read_index(index)
        else:
            for key in self._keys(SINGLE):
                self.files[key] = SINGLE

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by name, as they are stored.

        Raises:
            FileError: one is missing, or a file is damaged.
        """
        found = {}
        for name in names:
            if name not in self.files:
                raise FileError(f"{self.folder}: the checkpoint holds no {name!r}")
            path = self.folder / self.files[name]
            try:
                with safe_open(path, framework="pt") as archive:
                    found[name] = archive.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise FileError(f"{path}: cannot read {name!r}: {error}") from None
        return found

    def _keys(self, file: str) -> list[str]:
        path = self.folder / file
        if not path.is_file():
            raise FileError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}")
        try:
            with safe_open(path, framework="pt") as archive:
                return list(archive.keys())
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path}: not a complete safetensors file: {error}") from None


def compress_streaming(
    folder: Path,
    out: Path,
    target: RankRule | Budget,
    *,
    text: Path,
    window: int = 1024,
    windows: int = 128,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Compress a causal language model's blocks, holding one of them at a time.

    Args:
        folder: what save_pretrained wrote, with its tokenizer.
        out: another folder; `from_pretrained` reads it as in `integrations.huggingface`. A model
            that lies there is gone from the first block on.
        target: a rule, or a budget of parameters that every block has to keep by itself.
        text: a plain text file to calibrate with.
        window: tokens in a window.
        windows: how many, at most; their states [windows, T, C] are held.
        progress: called with the name of each block when it is done.

    Returns:
        The plan of all blocks.

    Raises:
        ConfigError: not a causal language model of blocks of one kind, the same folder twice, or a
            target that is no rule and bounds more than parameters.
        FileError: the checkpoint or the text cannot be read, or the folder not be written.
        BudgetError: a block cannot keep to the budget.
    """
    if isinstance(target, Budget) and set(target.bounds()) != {"params"}:
        raise ConfigError("block by block a budget can bound params alone")
    if out.exists() and out.samefile(folder):
        raise ConfigError(f"{out}: is the model's own folder; choose another one")
    config, kind = model_class(folder)
    kinds = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()))
    if len(kinds) > 1:
        raise ConfigError(
            f"{kind.__name__} has blocks of several kinds ({', '.join(kinds)}), which are called "
            "differently; compress it in one piece"
        )
    shards = Shards(folder)
    with init_empty_weights(include_buffers=False):
        model = kind(config)
    model.eval()
    language = LanguageModel(model, open_tokenizer(folder))
    if not language.causal:
        raise ConfigError(f"{kind.__name__} is no causal language model; compress it in one piece")
    model.tie_weights()
    total = count_params(model)
    prefix = find_blocks(model)
    head = _name_of(model, model.get_output_embeddings())
    first = [name for name in model.state_dict() if not name.startswith((f"{prefix}.", f"{head}."))]
    # all but the blocks and the head; calibration computes in fp32
    model.load_state_dict(_widened(shards.read(first)), strict=False, assign=True)
    batches = list(language.text(text, window=window, windows=windows))
    layers = [
        layer.left_dense("outside of the blocks") if layer.reason == UNCHOSEN else layer
        for layer in realise(model, {}).layers
        if not layer.name.startswith(f"{prefix}.")
    ]
    written: dict[str, str] = {}
    with reporting(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        for file in (INDEX, SINGLE):  # an earlier model's, which would be one of mixed blocks
            (out / file).unlink(missing_ok=True)
        for block in walk(model, batches, prefix):
            _forget(model, first)
            compact, dtypes = _compress_block(block, shards, target)
            layers += compact
            file = f"{block.name.replace('.', '-')}.safetensors"
            state = _state(block, dtypes)
            _write(out / file, state)
            written |= dict.fromkeys(state, file)
            block.module.to(device="meta")
            if progress is not None:
                progress(block.name)
        for name in shards.files:
            if not name.startswith(f"{prefix}."):
                file = f"{name.replace('.', '-')}.safetensors"
                _write(out / file, shards.read([name]))
                written[name] = file
        plan = Plan(layers=tuple(layers), dense_params=total)
        config.quantization_config = RankPruneConfig(replace(plan, layers=plan.factorized))
        config.save_pretrained(out)
        language.tokenizer.save_pretrained(out)
        if (folder / _GENERATION).is_file():
            shutil.copyfile(folder / _GENERATION, out / _GENERATION)
        # last, since it is what makes the folder a model
        index = {"metadata": {}, "weight_map": written}
        write_atomically(out / INDEX, json.dumps(index, indent=1).encode())
    return plan


def _compress_block(
    block: Block, shards: Shards, target: RankRule | Budget
) -> tuple[list[LayerPlan], dict[str, torch.dtype]]:
    """Read a block, factorise it, go on; its plan by names in the model, and the stored dtypes."""
    names = {f"{block.name}.{name}": name for name in block.module.state_dict()}
    stored = shards.read(list(names))
    dtypes = {names[name]: value.dtype for name, value in stored.items()}
    own = {names[name]: value for name, value in _widened(stored).items()}
    block.module.load_state_dict(own, assign=True)
    stats = block.calibrate()
    plan = make_plan(block.module, target, stats=stats)
    factorize(block.module, plan, stats=stats, inplace=True)
    block.advance()
    return [
        replace(
            layer,
            name=f"{block.name}.{layer.name}",
            tied=tuple(f"{block.name}.{name}" for name in layer.tied),
        )
        for layer in plan.layers
    ], dtypes


def _forget(model: nn.Module, names: list[str]) -> None:
    """Let go of what stands before the blocks: the texts are past it."""
    held = model.state_dict()
    empty = {name: held[name].to("meta") for name in names}
    model.load_state_dict(empty, strict=False, assign=True)


def _state(block: Block, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """A block's tensors by their names in the model, in the dtypes that it was stored in."""

    def dtype(name: str) -> torch.dtype:
        layer, _, kind = name.rpartition(".")  # a factor's is that of its layer
        return dtypes.get(name) or dtypes[f"{layer.rpartition('.')[0]}.{kind}"]

    return {
        f"{block.name}.{name}": value.to(dtype(name)) if value.is_floating_point() else value
        for name, value in state_with_ranks(block.module).items()
    }


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with temporary_file(path.parent, path.name, alone=True) as temporary:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise FileError(f"{path}: cannot write: {error}") from error
        commit(temporary, path)


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(read_bytes(path, _MAX_INDEX_BYTES)).get("weight_map")
    except (ValueError, RecursionError, AttributeError) as error:
        raise FileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise FileError(f"{path}: 'weight_map' must map names to files")
    for file in set(found.values()):
        if Path(file).name != file or (path.parent / file).is_symlink():
            raise FileError(f"{path}: refused shard {file[:80]!r}: not a file of this folder")
    return found
