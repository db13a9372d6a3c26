"""What single layers are to get instead of the plan's own rule, by their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankprune.budget import Budget
from rankprune.errors import ConfigError, near
from rankprune.ranks import FixedRank, RankRule
from rankprune.schemes import check_scheme
from rankprune.survey import Site


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Settings for the layers that a pattern matches.

    Attributes:
        rank: an exact rank or a rule; None takes the plan's own rule or budget.
        scheme: as in `make_plan`; None takes the plan's own.
    """

    rank: int | RankRule | None = None
    scheme: str | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not (self.rank is None or isinstance(self.rank, RankRule) or whole):
            raise ConfigError(
                f"LayerConfig(rank={self.rank!r}): a whole number ≥ 1, a rank rule or None"
            )


Override = RankRule | LayerConfig | None


class ExactRank(FixedRank):
    """A rank that a layer must be able to have."""

    def __repr__(self) -> str:
        return f"rank {self.rank} by an override"


@dataclass(frozen=True)
class Settings:
    """What one layer is to get, after overrides."""

    rank: RankRule | Budget | None  # None: leave dense
    scheme: str


def resolve(
    sites: Sequence[Site],
    rank: RankRule | Budget,
    scheme: str,
    overrides: Mapping[str, Override],
) -> dict[str, Settings]:
    """Apply overrides by name; a pattern that matches nothing of use is an error."""
    settings = {site.name: Settings(rank, scheme) for site in sites}
    obstacles = {site.name: site.obstacle for site in sites}
    for pattern, override in overrides.items():
        names = [
            site.name
            for site in sites
            if any(fnmatch.fnmatchcase(name, pattern) for name in (site.name, *site.tied))
        ]
        if not names:
            raise ConfigError(f"pattern {pattern!r} matches no layer; {near(pattern, settings)}")
        if override is not None and all(obstacles[name] for name in names):
            raise ConfigError(
                f"pattern {pattern!r}: layer {names[0]!r} cannot be factorised: "
                f"{obstacles[names[0]]}"
            )
        for name in names:
            settings[name] = _overridden(override, pattern, rank, scheme)
    return settings


def _overridden(override: Override, pattern: str, rank: RankRule | Budget, scheme: str) -> Settings:
    if override is None:
        return Settings(None, scheme)
    if isinstance(override, RankRule):
        return Settings(override, scheme)
    if isinstance(override, LayerConfig):
        if override.scheme is not None:
            check_scheme(override.scheme)
        own = ExactRank(override.rank) if isinstance(override.rank, int) else override.rank
        return Settings(own or rank, override.scheme or scheme)
    raise ConfigError(
        f"override for {pattern!r} must be a rank rule, a LayerConfig or None, got {override!r}"
    )
