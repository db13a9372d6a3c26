"""Training checkpoints: one file, replaced atomically, with the sha256 of its content in front.

Written by torch.save and read with `weights_only=True`, which runs no code from the file.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from rankprune.errors import FileError
from rankprune.files import read_bytes, reporting, write_atomically

_MAGIC = b"rankprune checkpoint 1\n"
_MAX_BYTES = 2**40


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a reader sees the old one or the new one.

    Raises:
        FileError: it cannot be written; the old one is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, _MAGIC + hashlib.sha256(content).digest() + content)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU.

    Raises:
        FileError: missing, damaged, or not a checkpoint.
    """
    content = read_bytes(path, _MAX_BYTES)
    start = len(_MAGIC) + 32
    if content[: len(_MAGIC)] != _MAGIC:
        raise FileError(f"{path}: not a rankprune checkpoint")
    payload = content[start:]
    if hashlib.sha256(payload).digest() != content[len(_MAGIC) : start]:
        raise FileError(
            f"{path}: damaged: its content does not match its sha256; remove it to start anew"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever odd bytes lead to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(f"{path}: refused: {reason}") from None
    if not isinstance(state, dict):
        raise FileError(f"{path}: not a checkpoint: holds a {type(state).__name__}")
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether there is a file that begins as a checkpoint does."""
    if not path.is_file():
        return False
    with reporting(path, "read"), open(path, "rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC
