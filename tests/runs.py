"""Processes of their own, and what a training run leaves behind."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_child(call: Callable[[], Any]) -> int:
    """Start a call in a forked process, which exits with 1 if it raises; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a forked process; negative where a signal has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def records(run: Path) -> list[dict[str, Any]]:
    """A run's metrics, without those of the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clock = {"seconds", "images_per_second"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
