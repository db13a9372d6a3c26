"""What C code prints, which Python's own redirections do not reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable

from rankprune.process_setting import ProcessSetting


def c_stdout_to_stderr() -> contextlib.AbstractContextManager[None]:
    """Send the standard output of the process, C's buffer included, to standard error.

    HiGHS now and then leaves a line of debugging on standard output, silenced or not (issue 312 of
    HiGHS.jl), where the command line may be about to print JSON. What other threads print meanwhile
    goes there too.
    """
    return _OUTPUT.changed()


def _redirect() -> Callable[[], None]:
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        return lambda: None
    _flush()
    with contextlib.suppress(OSError):
        os.dup2(2, 1)

    def restore() -> None:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)

    return restore


def _flush() -> None:
    """C's buffers; where its library is not found by this name, they stay as they are."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)


_OUTPUT = ProcessSetting(_redirect)
