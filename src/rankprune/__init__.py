"""rankprune: train networks low-rank, then decompose them without loss.

>>> import torch, rankprune as rp
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> plan = rp.make_plan(model, rp.Budget(params=0.5))
>>> compact = rp.factorize(model, plan)
>>> rp.count_params(compact) / rp.count_params(model) <= 0.5
True
"""

from rankprune.errors import (
    BudgetError,
    ConfigError,
    FileError,
    LayerError,
    MissingExtraError,
    NumericsError,
    PlanError,
    RankPruneError,
)
from rankprune.factorize import LowRank, defactorize, factorize, plan_of
from rankprune.layers import LayerSpec
from rankprune.plan import LayerPlan, Plan
from rankprune.planner import Budget, LayerConfig, make_plan
from rankprune.profile import Profile, count_bytes, count_params, profile
from rankprune.ranks import (
    EVBMF,
    Energy,
    FixedRank,
    RankRule,
    Ratio,
    Spectrum,
    StableRank,
    Threshold,
)
from rankprune.report import Report, report
from rankprune.schemes import SCHEMES, MatrixShape, Scheme
from rankprune.serialize import load, read_plan, save
from rankprune.training import TRP, Controller, attach

__version__ = "0.1.0"

__all__ = [
    "EVBMF",
    "SCHEMES",
    "TRP",
    "Budget",
    "BudgetError",
    "ConfigError",
    "Controller",
    "Energy",
    "FileError",
    "FixedRank",
    "LayerConfig",
    "LayerError",
    "LayerPlan",
    "LayerSpec",
    "LowRank",
    "MatrixShape",
    "MissingExtraError",
    "NumericsError",
    "Plan",
    "PlanError",
    "Profile",
    "RankPruneError",
    "RankRule",
    "Ratio",
    "Report",
    "Scheme",
    "Spectrum",
    "StableRank",
    "Threshold",
    "attach",
    "count_bytes",
    "count_params",
    "defactorize",
    "factorize",
    "load",
    "make_plan",
    "plan_of",
    "profile",
    "read_plan",
    "report",
    "save",
]
