"""What C code prints, which Python's own redirections do not reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator


@contextlib.contextmanager
def c_stdout_to_stderr() -> Iterator[None]:
    """Send the standard output of the process, C's buffer included, to standard error.

    HiGHS now and then leaves a line of debugging on standard output, silenced or not (issue 312 of
    HiGHS.jl), where the command line may be about to print JSON.
    """
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        _flush()
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """C's buffers; where its library is not found by this name, they stay as they are."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
