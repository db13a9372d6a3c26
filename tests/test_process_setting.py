"""A setting that several want changed is changed once, and put back at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rankprune.process_setting import ProcessSetting


def test_the_first_one_in_changes_it_and_the_last_one_out_puts_it_back() -> None:
    log: list[str] = []

    def change() -> Callable[[], None]:
        log.append("changed")
        return lambda: log.append("undone")

    setting = ProcessSetting(change)
    first, second = setting.changed(), setting.changed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert log == ["changed"]
    second.__exit__(None, None, None)
    assert log == ["changed", "undone"]
    with pytest.raises(ValueError, match="inside"), setting.changed():
        raise ValueError("inside")
    assert log == ["changed", "undone"] * 2


def test_what_cannot_be_changed_is_tried_again() -> None:
    failures = [OSError("now not")]

    def change() -> Callable[[], None]:
        if failures:
            raise failures.pop()
        return lambda: None

    setting = ProcessSetting(change)
    with pytest.raises(OSError, match="now not"), setting.changed():
        pass
    with setting.changed():
        pass
    assert not failures
