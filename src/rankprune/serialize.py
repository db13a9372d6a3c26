"""Saving and loading: safetensors and a plan. No pickle, nothing from a file is executed.

A saved model is a folder with `plan.json` and the weights file that it names, with the sha256 of
the content of both. Replacing `plan.json` is the commit point: a save first writes the new weights
beside the old ones, then swaps the plan in, then removes what no plan refers to. A reader therefore
sees the old model or the new one, whenever it looks and wherever a writer was killed; writers wait
for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankprune.errors import FileError, LayerError, PlanError
from rankprune.factorize import check_plan, factor_skeleton
from rankprune.files import (
    commit,
    exclusive,
    file_sha256,
    read_bytes,
    remove_stale,
    reporting,
    temporary_file,
    write_atomically,
)
from rankprune.low_rank import plan_of
from rankprune.plan import Plan

PLAN = "plan.json"
WEIGHTS = "model.safetensors"
_WEIGHTS_NAME = re.compile(r"model(-[0-9a-f]{12})?\.safetensors")
_MAX_PLAN_BYTES = 64 * 2**20
# In place of the plan's own sha256 while it is computed.
_UNSEALED = "0" * 64
# In the weights' own header, where the sha256 covers them: JSON of name to name.
_ALIASES = "aliases"


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model, factorised or dense, as a folder of safetensors and plan.

    Args:
        model: what to save; its own code is not saved.
        folder: created where missing.
        plan: the plan that it was factorised with, to keep the reasons of layers left dense;
            without it, the factorised layers' own.
        metadata: JSON values that are kept in the plan (the model's name, the data set).
        overwrite: replace a model that `save` has put there; files of others are left alone.

    Returns:
        The folder.

    Raises:
        FileError: the folder holds a model already, or cannot be written; what was there stays.
        PlanError: the plan is another model's, or the metadata is not JSON.
        LayerError: the model's state holds something that is no tensor.
    """
    folder = Path(folder)
    described = _described(model, plan).with_metadata(**(metadata or {}))
    document = json.loads(described.to_json())
    tensors, aliases = _unique_tensors(model)
    with reporting(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            if (folder / PLAN).exists() and not overwrite:
                raise FileError(
                    f"{folder}: holds a saved model already; choose another folder or overwrite it"
                )
            remove_stale(folder)
            with temporary_file(folder, WEIGHTS, alone=True) as temporary:
                header = {"format": "pt", _ALIASES: json.dumps(aliases)}
                try:
                    save_file(tensors, temporary, metadata=header)
                except SafetensorError as error:
                    raise FileError(f"{folder}: cannot write: {error}") from error
                digest = file_sha256(temporary)
                name = WEIGHTS
                if (folder / PLAN).exists() or (folder / WEIGHTS).exists():
                    # a reader may have read the old plan: no other content under the old name
                    name = f"model-{digest[:12]}.safetensors"
                commit(temporary, folder / name)
            document["weights"] = {"file": name, "sha256": digest}
            write_atomically(folder / PLAN, _sealed(document))
            for other in folder.iterdir():
                if _WEIGHTS_NAME.fullmatch(other.name) and other.name != name and _is_own(other):
                    other.unlink(missing_ok=True)
    return folder


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load a saved model into a freshly built dense model.

    Everything is checked before the model is touched: the content's hash, that the plan's layers
    are the model's, and that names and shapes agree.

    Args:
        model: the dense architecture, with any weights; it is changed in place.
        folder: what `save` wrote.

    Returns:
        The model, with the saved factors and weights on its own device.

    Raises:
        FileError: missing, damaged or tampered files, or files of another model.
        PlanError: a malformed plan, or one of another model.
    """
    plan, weights, aliases = _open(Path(folder))
    check_plan(model, plan.factorized)
    _check_names(model, plan, weights, aliases, Path(folder))
    factor_skeleton(model, plan.factorized)
    slots = model.state_dict(keep_vars=True)
    for key, slot in slots.items():
        value = weights[aliases.get(key, key)]
        if slot.dtype != value.dtype:
            slot.data = slot.data.to(value.dtype)
        with torch.no_grad():
            slot.copy_(value)
    return model


def read_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan of a saved model, without its weights.

    Raises:
        FileError: the folder or its plan is missing or cannot be read.
        PlanError: the plan is malformed.
    """
    return _read_document(Path(folder))[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileError: missing, truncated, or not safetensors.
    """
    return _read_archive(path)[0]


# -- inside --------------------------------------------------------------------------------------


def _described(model: nn.Module, plan: Plan | None) -> Plan:
    found = plan_of(model)
    if plan is None:
        return found
    if [layer.name for layer in plan.factorized] != [layer.name for layer in found.layers] or any(
        planned.rank != real.rank or planned.scheme != real.scheme
        for planned, real in zip(plan.factorized, found.layers, strict=True)
    ):
        raise PlanError("the plan is not the one that this model was factorised with")
    return plan


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for names that share one, the name under which it is written."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise LayerError(
                f"cannot save the state {key!r}: it is a {type(tensor).__name__}, and such files "
                "hold tensors only; keep it as a buffer, or outside of the model"
            )
        if id(tensor) in first:
            aliases[key] = first[id(tensor)]
            continue
        first[id(tensor)] = key
        # an own copy: two views of one storage are two tensors in the file
        tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _sealed(document: dict[str, Any]) -> bytes:
    """As JSON with the sha256 of the bytes, computed with zeros in its own place."""
    text = json.dumps({"sha256": _UNSEALED} | document, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(_UNSEALED, digest, 1).encode()


def _check_seal(path: Path, content: bytes, document: dict[str, Any]) -> None:
    digest = _digest(path, document)
    zeroed = content.replace(digest.encode(), _UNSEALED.encode(), 1)
    if hashlib.sha256(zeroed).hexdigest() != digest:
        raise PlanError(
            f"{path}: damaged or changed since it was saved: its sha256 is not the {digest[:12]}… "
            "that it says; get a fresh copy, or save the model anew"
        )


def _read_archive(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with reporting(path, "read"):
        if not path.is_file():
            raise FileError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as archive:
                tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
                return tensors, archive.metadata() or {}
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise FileError(f"{path}: not a complete safetensors file: {error}") from None


def _read_document(folder: Path) -> tuple[Plan, dict[str, Any]]:
    if not folder.is_dir():
        raise FileError(f"{folder}: no such folder")
    path = folder / PLAN
    content = read_bytes(path, _MAX_PLAN_BYTES)
    try:
        text = content.decode()
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not valid JSON: {error}") from None
    plan = Plan.from_json(text, str(path))
    _check_seal(path, content, document)
    return plan, _weights_entry(path, document)


def _digest(path: Path, entry: dict[str, Any]) -> str:
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise PlanError(f"{path}: 'sha256' must be 64 hexadecimal digits")
    return digest


def _weights_entry(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    entry = document.get("weights")
    if not isinstance(entry, dict) or set(entry) != {"file", "sha256"}:
        raise PlanError(f"{path}: 'weights' must name file and sha256")
    name = entry["file"]
    if not isinstance(name, str) or not _WEIGHTS_NAME.fullmatch(name):
        raise PlanError(f"{path}: refused weights file name {str(name)[:80]!r}")
    _digest(path, entry)
    return entry


def _open(folder: Path) -> tuple[Plan, dict[str, Tensor], dict[str, str]]:
    plan, entry = _read_document(folder)
    unchanged = 0
    while True:
        try:
            return plan, *_read_weights(folder / entry["file"], entry["sha256"])
        except FileError:
            # a concurrent save may have committed a newer plan and removed these weights, and
            # another one have brought the same plan back meanwhile
            before = entry
            plan, entry = _read_document(folder)
            unchanged = unchanged + 1 if entry == before else 0
            if unchanged == 3:
                raise


def _read_weights(path: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with reporting(path, "read"):
        if path.is_symlink() or not path.is_file():
            raise FileError(f"{path}: missing, or not a regular file")
        digest = file_sha256(path)
    if digest != expected:
        raise FileError(
            f"{path}: damaged or changed: its sha256 is {digest[:12]}…, the plan says "
            f"{expected[:12]}…; get a fresh copy"
        )
    tensors, metadata = _read_archive(path)
    return tensors, _aliases(path, metadata)


def _is_own(path: Path) -> bool:
    """Whether `save` wrote a weights file; others keep theirs under the same name."""
    try:
        with safe_open(path, framework="pt") as archive:
            return _ALIASES in (archive.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _aliases(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Names that share another name's tensor, out of the weights' header."""
    try:
        aliases = json.loads(metadata.get(_ALIASES, "{}"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {_ALIASES} are not valid JSON: {error}") from None
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise FileError(f"{path}: {_ALIASES} must map names to names")
    return aliases


def _check_names(
    model: nn.Module,
    plan: Plan,
    weights: dict[str, Tensor],
    aliases: Mapping[str, str],
    folder: Path,
) -> None:
    """Compare names and shapes with what the factorised model will have."""
    expected = shapes(model.state_dict())
    places: defaultdict[int, list[str]] = defaultdict(list)  # one module may stand at many names
    for name, module in model.named_modules(remove_duplicate=False):
        places[id(module)].append(name)
    for entry in plan.factorized:
        planned = (model.get_submodule(name) for name in (entry.name, *entry.tied))
        for name in (place for module in planned for place in places[id(module)]):
            bias = expected.pop(f"{name}.bias", None)
            expected.pop(f"{name}.weight", None)
            for position, spec in enumerate(entry.factors()):
                expected[f"{name}.{position}.weight"] = spec.weight_shape
            if bias is not None:
                expected[f"{name}.1.bias"] = bias
    compare_shapes(
        expected,
        shapes(weights | {key: weights[name] for key, name in aliases.items() if name in weights}),
        str(folder),
    )
    held = model.state_dict()
    for key, value in weights.items():
        wanted = held[key].is_floating_point() if key in held else True  # factors are floats
        if value.is_floating_point() != wanted:
            raise FileError(
                f"{folder}: {key!r} is stored as {value.dtype}, of another kind of number"
            )


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of named tensors."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise `FileError` that lists the first differences between a model and a file."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    other = [key for key in expected if key in found and expected[key] != found[key]]
    if not (missing or extra or other):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing, such as {missing[0]!r}")
    if extra:
        parts.append(f"{len(extra)} unknown, such as {extra[0]!r}")
    if other:
        key = other[0]
        parts.append(
            f"{len(other)} of another shape, such as {key!r}: {found[key]} in the file, "
            f"{expected[key]} in the model"
        )
    raise FileError(f"{source}: weights of another model: {'; '.join(parts)}")
