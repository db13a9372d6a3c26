"""Files that are whole or not there: atomic writes, bounded reads, the system's errors as ours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from rankprune.errors import FileError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        FileError: it cannot be written; the old file is as it was.
    """
    with reporting(path, "write"), temporary_file(path.parent, path.name) as temporary:
        with open(temporary, "wb") as stream:
            stream.write(content)
        commit(temporary, path)


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        FileError: missing, not a regular file, too large or unreadable.
    """
    with reporting(path, "read"):
        if path.is_symlink() or not path.is_file():
            what = "a symbolic link" if path.is_symlink() else "not a file"
            raise FileError(f"{path}: {what if path.exists() else 'no such file'}")
        size = path.stat().st_size
        if size > limit:
            raise FileError(
                f"{path}: {size} bytes, more than the {limit} that such a file may have"
            )
        return path.read_bytes()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def reporting(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors into ours, with the path and the reason."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot {verb}: {reason}") from error


@contextlib.contextmanager
def temporary_file(folder: Path, name: str, *, alone: bool = False) -> Iterator[Path]:
    """Where to write a file before it is committed, beside its place.

    Args:
        folder: where the file is to be.
        name: what it is to be called.
        alone: in a folder of its own, which goes with all that is in it: for writers that need
            temporaries too, as safetensors does.
    """
    own = folder / f".{name}.{secrets.token_hex(8)}.tmp"
    if alone:
        own.mkdir()
    try:
        yield own / f"{name}.part" if alone else own
    finally:
        _remove(own)


def commit(temporary: Path, path: Path) -> None:
    """Make a temporary file durable under its name, readable as other new files are."""
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors writes files for their owner alone
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    if fcntl is None:
        return  # Windows opens no folders
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other writers of a folder waiting, for as long as they ask; a killed one holds nobody.

    File systems without locks, and Windows, let them in: then writers must not meet.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a path holds what a writer has not committed yet, or never will."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_stale(folder: Path) -> None:
    """Remove temporaries that a killed writer left behind."""
    for path in filter(is_temporary, folder.iterdir()):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for inner in path.iterdir():
        _remove(inner)
    path.rmdir()
