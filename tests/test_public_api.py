"""The names that users see, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest

import rankprune

PUBLIC = [
    "BACKENDS",
    "Budget",
    "BudgetError",
    "ConfigError",
    "Controller",
    "EVBMF",
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
    "SCHEMES",
    "Scheme",
    "Spectrum",
    "StableRank",
    "Stats",
    "TRP",
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
ERRORS = [name for name in PUBLIC if name.endswith("Error")]
EXTRAS = [
    "torchvision",
    "timm",
    "typer",
    "rich",
    "matplotlib",
    "pydantic",
    "accelerate",
    "transformers",
    "pytorchcv",
    "sklearn",
    "yaml",
    "lightning",
    "onnx",
    "onnxruntime",
    "openvino",
]


def test_the_public_names_are_these() -> None:
    """A name that comes or goes is a decision, not an accident."""
    assert sorted(rankprune.__all__) == sorted(PUBLIC)
    assert len(set(rankprune.__all__)) == len(rankprune.__all__)
    assert set(PUBLIC) <= set(dir(rankprune))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(rankprune, name)
    if isinstance(value, (type, types.FunctionType)):
        documentation = value.__doc__ or ""
        # a dataclass without docstring gets its signature as one
        assert len(documentation) > 20
        assert not documentation.startswith(f"{name}(")


@pytest.mark.parametrize(
    "name", [n for n in PUBLIC if n[0].isupper() and n not in ("SCHEMES", "BACKENDS")]
)
def test_every_public_method_is_documented(name: str) -> None:
    for attribute, value in vars(getattr(rankprune, name)).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if attribute.startswith("_") or not isinstance(function, types.FunctionType):
            continue
        documented = [getattr(base, attribute, None) for base in getattr(rankprune, name).__mro__]
        assert any(inspect.getdoc(item) for item in documented if item), attribute


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_one_base(name: str) -> None:
    assert issubclass(getattr(rankprune, name), rankprune.RankPruneError)


def test_a_missing_extra_says_how_to_get_it() -> None:
    error = rankprune.MissingExtraError("plots", "matplotlib", "plot")
    assert isinstance(error, ImportError)
    assert "pip install 'rankprune[plot]'" in str(error)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'factorise'"):
        rankprune.factorise  # noqa: B018


def test_modules_do_not_hide_functions_of_their_name() -> None:
    import rankprune.factorize
    import rankprune.profile
    import rankprune.report

    for name in ("report", "profile", "factorize"):
        assert isinstance(getattr(rankprune, name), types.FunctionType)


IMPORTING = f"""
import sys
import rankprune as rp
assert "torch" not in sys.modules, "import rankprune loads torch"
for name in rp.__all__:
    getattr(rp, name)
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Flatten(), torch.nn.Linear(64, 64))
x = torch.zeros(1, 8, 4, 4)
compact = rp.factorize(model, rp.make_plan(model, rp.Budget(flops=0.5), example_inputs=x))
str(rp.report(model, compact, example_inputs=x))
assert not torch.cuda.is_initialized(), "CUDA was initialised"
loaded = [name for name in {EXTRAS!r} if name in sys.modules]
assert not loaded, loaded
"""


def test_importing_loads_no_extras_and_touches_no_gpu() -> None:
    """In a fresh process that uses the core; torch comes with the first name that needs it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTING],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_version_is_one() -> None:
    assert rankprune.__version__.count(".") == 2
    assert all(part.isdigit() for part in rankprune.__version__.split(".")[:2])
