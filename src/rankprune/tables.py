"""Figures as text, alike wherever people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rankprune.schemes import MatrixShape

# Stands for a figure that is not known.
UNKNOWN = "–"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first of them the header, in aligned columns.

    >>> print(format_table([("layer", "rank"), ("conv1", "8")]))
    layer  rank
    conv1  8
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def format_matrix(matrix: MatrixShape | None) -> str:
    """`rows×cols`, with the batch in front where there is one."""
    if matrix is None:
        return ""
    batch = f"{matrix.batch}×" if matrix.batch > 1 else ""
    return f"{batch}{matrix.rows}×{matrix.cols}"


def format_count(value: int) -> str:
    """A count with a decimal prefix.

    >>> format_count(41_300_000), format_count(272), format_count(999_999)
    ('41.3M', '272', '1M')
    """
    for limit, divisor, suffix in ((999.5e9, 1e12, "T"), (999.5e6, 1e9, "G"), (999.5e3, 1e6, "M")):
        if value >= limit:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value / 1e3:.3g}k" if value >= 1000 else str(value)


def format_change(dense: int | None, compact: int | None) -> str:
    """`dense → compact (factor)`, or the dense count alone where nothing changes."""
    if dense is None or compact is None:
        return "?"
    if dense == compact:
        return format_count(dense)
    factor = f" ({dense / compact:.2f}×)" if compact else ""
    return f"{format_count(dense)} → {format_count(compact)}{factor}"


def format_ms(value: float) -> str:
    """A time in milliseconds, to three digits.

    >>> format_ms(18.24), format_ms(0.5), format_ms(12345.6)
    ('18.2 ms', '0.5 ms', '12346 ms')
    """
    return f"{value:.0f} ms" if 999.5 <= value < 1e6 else f"{value:.3g} ms"


def format_times(dense: float | None, compact: float | None) -> str:
    """`dense → compact (factor)` in milliseconds, or the dense time alone where nothing changes.

    >>> format_times(18.21, 9.1), format_times(0.5, 0.5), format_times(None, None)
    ('18.2 ms → 9.1 ms (2.00×)', '0.5 ms', '')
    """
    if dense is None or compact is None:
        return ""
    if dense == compact:
        return format_ms(dense)
    factor = f" ({dense / compact:.2f}×)" if compact else ""
    return f"{format_ms(dense)} → {format_ms(compact)}{factor}"


def known(value: float | None) -> float | None:
    """A figure, or None for one that is not finite, as a report made by hand may hold."""
    return value if value is not None and math.isfinite(value) else None


def format_known(value: float | None, form: Callable[[float], str]) -> str:
    """A figure that may be missing.

    >>> format_known(0.5, format_percent), format_known(None, format_percent)
    ('50.00%', '–')
    """
    value = known(value)
    return UNKNOWN if value is None else form(value)


def format_percent(value: float) -> str:
    """A share: 0.5 is 50 %."""
    return f"{value:.2%}" if abs(value) < 100 else f"{value:.3g}"


def format_short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def format_factor(value: float) -> str:
    """How many times as much."""
    return f"{value:.2f}×" if abs(value) < 1e6 else f"{value:.3g}×"
