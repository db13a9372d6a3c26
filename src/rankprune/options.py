"""Options of Trained Rank Pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rankprune.budget import Budget
from rankprune.errors import ConfigError
from rankprune.latency import LatencyTable
from rankprune.overrides import Override
from rankprune.plan import Plan
from rankprune.ranks import RankRule
from rankprune.runtimes import Runtime

NUCLEAR_MODES = ("gradient", "decoupled")
NUCLEAR_WHEN = ("projection", "step")


@dataclass(frozen=True, kw_only=True)
class TRP:
    """Options of Trained Rank Pruning.

    Attributes:
        rank: a rank rule, applied to the spectra as they are at each projection, or a `Budget`.
        plan: fixed schemes and ranks, instead of `rank`.
        scheme: as in `make_plan`.
        overrides: as in `make_plan`.
        multiple_of: as in `make_plan`.
        runtime: as in `make_plan`; layers are measured when training starts.
        guard: as in `make_plan`; applied at the end, since training is what makes it pay.
        every: m, the period of projections in optimizer steps.
        start: first step that is projected and regularised.
        end: first step that no longer is; None for no end. `finish` projects in any case.
        descent: number of steps after `start` over which a plan's ranks, or a budget, come down
            from full to their target (cubic, fast first); 0 is at once.
        nuclear: λ, weight of the nuclear norm; 0 switches it off.
        nuclear_mode: "gradient" adds λ U Vᵀ to the gradient (the paper's); "decoupled" subtracts
            lr · λ · U Vᵀ from the weight after the step, which no optimizer rescales.
        nuclear_when: "projection" regularises in the steps that are projected and over the kept
            directions only, as the paper's experiments did: nearly free. "step" does so in every
            step over all directions, at the price of a decomposition a step.
    """

    rank: RankRule | Budget | None = None
    plan: Plan | None = None
    scheme: str = "auto"
    overrides: Mapping[str, Override] | None = None
    multiple_of: int | None = None
    runtime: Runtime | LatencyTable | None = None
    guard: bool = True
    every: int = 20
    start: int = 0
    end: int | None = None
    descent: int = 0
    nuclear: float = 0.0
    nuclear_mode: str = "gradient"
    nuclear_when: str = "projection"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.plan is None):
            raise ConfigError("TRP: give either rank=… (a rule or a Budget) or plan=…")
        if self.plan is not None:
            given = {
                "scheme": self.scheme != "auto",
                "overrides": bool(self.overrides),
                "multiple_of": self.multiple_of is not None,
            }
            for name in given:
                if given[name]:
                    raise ConfigError(f"TRP(plan=…, {name}=…): the plan has that; leave it out")
        for name, least in (("every", 1), ("start", 0), ("descent", 0), ("end", 0)):
            value = getattr(self, name)
            if value is None and name == "end":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"TRP({name}={value!r}): a whole number ≥ {least}")
        if self.end is not None and self.end <= self.start:
            raise ConfigError(f"TRP(start={self.start}, end={self.end}): end must come after start")
        if not isinstance(self.nuclear, (int, float)) or not 0 <= self.nuclear < float("inf"):
            raise ConfigError(f"TRP(nuclear={self.nuclear!r}): a finite weight ≥ 0")
        for name, known in (("nuclear_mode", NUCLEAR_MODES), ("nuclear_when", NUCLEAR_WHEN)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"TRP({name}={getattr(self, name)!r}): one of {', '.join(map(repr, known))}"
                )
        if self.descent and isinstance(self.rank, RankRule):
            raise ConfigError("TRP(descent=…) needs a plan or a Budget; a rank rule has no target")
