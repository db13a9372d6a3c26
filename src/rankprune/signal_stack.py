"""The stack that a thread handles signals on, kept from libraries that replace it for good."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _SignalStack(ctypes.Structure):
    """Linux's `stack_t`."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put the thread's signal stack back afterwards; on Linux alone.

    OpenVINO's CPU plugin installs one of its own, and with its network puts back the one that it
    found: of two networks, the second that of the first, which is freed by then. The next signal
    that Python handles, such as Ctrl-C, would kill the process without a word.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    known = libc.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            libc.sigaltstack(ctypes.byref(before), None)
