"""Settings of the whole process, which several threads may want changed at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class ProcessSetting:
    """Is changed by the first thread that wants it so, and put back by the last one.

    Args:
        change: changes it, and returns what undoes that.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._undo: Callable[[], None] = lambda: None
        self._inside = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """Within it the setting is changed, for other threads as well."""
        with self._lock:
            if not self._inside:
                self._undo = self._change()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo()
