"""Every error that rankprune raises on purpose.

One base class, so that a caller can catch all of them; one subclass for each thing a caller
would do differently. Messages name the layer or the file, what was received, and the remedy.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class RankPruneError(Exception):
    """Base class of all errors raised by rankprune."""


class ConfigError(RankPruneError, ValueError):
    """An option has a value that cannot work (unknown scheme, period 0, no layer matched)."""


class LayerError(RankPruneError, ValueError):
    """A layer's shape or type does not allow what was asked of it."""


class NumericsError(RankPruneError, ArithmeticError):
    """A weight holds NaN or infinity, or a decomposition did not converge."""


class PlanError(RankPruneError, ValueError):
    """A plan is malformed or was made for another model."""


class BudgetError(RankPruneError, ValueError):
    """A budget cannot be met.

    Attributes:
        closest: the smallest reachable fraction of the dense cost, by quantity
            (``{"flops": 0.12}``).
    """

    def __init__(self, message: str, closest: dict[str, float]) -> None:
        super().__init__(message)
        self.closest = closest


class ExportError(RankPruneError, RuntimeError):
    """A network cannot be exported, or what was exported gives other answers."""


class FileError(RankPruneError, OSError):
    """A file is missing, damaged, of another format, or does not fit the model."""


class MissingExtraError(RankPruneError, ImportError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'rankprune[{extra}]'"
        )


@contextlib.contextmanager
def naming(*layers: str) -> Iterator[None]:
    """Put the layers into the message of a `NumericsError` that does not name one."""
    try:
        yield
    except NumericsError as error:
        if not layers or str(error).startswith(("layer ", "one of the layers ")):
            raise
        names = ", ".join(map(repr, layers[:3])) + (", …" if len(layers) > 3 else "")
        subject = "layer" if len(layers) == 1 else "one of the layers"
        raise NumericsError(f"{subject} {names}: {error}") from error


def near(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return a hint that lists the known names nearest to a mistyped one.

    >>> near("chanel", ["channel", "spatial"])
    "did you mean 'channel'?"
    >>> near("xyz", ["channel", "spatial"])
    "known: 'channel', 'spatial'"
    """
    names = list(known)
    matches = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    shown = ", ".join(repr(known_name) for known_name in names[:8])
    return f"known: {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def reason(error: BaseException) -> str:
    """What went wrong first: torch wraps it in pages of advice."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {first_line(cause)}"


def first_line(error: BaseException) -> str:
    """Of its message."""
    return (str(error).strip().splitlines() or [""])[0]
