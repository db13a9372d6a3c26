"""rankprune: train networks low-rank, then decompose them without loss.

>>> import torch, rankprune as rp
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> plan = rp.make_plan(model, rp.Budget(params=0.5))
>>> compact = rp.factorize(model, plan)
>>> rp.count_params(compact) / rp.count_params(model) <= 0.5
True

Public names are imported when they are first used, so that the command line answers before torch
is loaded.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from rankprune._version import __version__

if TYPE_CHECKING:
    from rankprune.attach import attach
    from rankprune.blocks import factorize_blocks
    from rankprune.budget import Budget
    from rankprune.calibrate import Stats, calibrate, recalibrate_bn
    from rankprune.errors import (
        BudgetError,
        ConfigError,
        ExportError,
        FileError,
        LayerError,
        MissingExtraError,
        NumericsError,
        PlanError,
        RankPruneError,
    )
    from rankprune.export import export_onnx
    from rankprune.factorize import defactorize, factorize
    from rankprune.fold import fold
    from rankprune.latency import LatencyTable
    from rankprune.layers import LayerSpec
    from rankprune.low_rank import LowRank, plan_of
    from rankprune.options import TRP
    from rankprune.overrides import LayerConfig
    from rankprune.plan import LayerPlan, Plan
    from rankprune.planner import make_plan
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
    from rankprune.runtimes import BACKENDS, Runtime
    from rankprune.schemes import SCHEMES, MatrixShape, Scheme
    from rankprune.serialize import load, read_plan, save
    from rankprune.training import Controller, project

__all__ = [
    "BACKENDS",
    "EVBMF",
    "SCHEMES",
    "TRP",
    "Budget",
    "BudgetError",
    "ConfigError",
    "Controller",
    "Energy",
    "ExportError",
    "FileError",
    "FixedRank",
    "LatencyTable",
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
    "Runtime",
    "Scheme",
    "Spectrum",
    "StableRank",
    "Stats",
    "Threshold",
    "__version__",
    "attach",
    "calibrate",
    "count_bytes",
    "count_params",
    "defactorize",
    "export_onnx",
    "factorize",
    "factorize_blocks",
    "fold",
    "load",
    "make_plan",
    "plan_of",
    "profile",
    "project",
    "read_plan",
    "recalibrate_bn",
    "report",
    "save",
]

_MODULES = {
    "attach": "attach",
    "blocks": "factorize_blocks",
    "budget": "Budget",
    "calibrate": "Stats calibrate recalibrate_bn",
    "errors": "BudgetError ConfigError ExportError FileError LayerError MissingExtraError "
    "NumericsError PlanError RankPruneError",
    "export": "export_onnx",
    "factorize": "defactorize factorize",
    "fold": "fold",
    "latency": "LatencyTable",
    "layers": "LayerSpec",
    "low_rank": "LowRank plan_of",
    "options": "TRP",
    "overrides": "LayerConfig",
    "plan": "LayerPlan Plan",
    "planner": "make_plan",
    "profile": "Profile count_bytes count_params profile",
    "ranks": "EVBMF Energy FixedRank RankRule Ratio Spectrum StableRank Threshold",
    "report": "Report report",
    "runtimes": "BACKENDS Runtime",
    "schemes": "SCHEMES MatrixShape Scheme",
    "serialize": "load read_plan save",
    "training": "Controller project",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


class _Package(types.ModuleType):
    """The package, with public names that come on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # importing the module `report` must not hide the function of that name
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
