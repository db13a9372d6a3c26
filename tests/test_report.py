"""The report: what compression really did, as text and JSON."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from cases import SharedModule, TiedLinears, cnn_input, relative_error, small_cnn
from rankprune import (
    FileError,
    FixedRank,
    NumericsError,
    Plan,
    Ratio,
    Report,
    count_bytes,
    count_params,
    factorize,
    make_plan,
    profile,
    report,
)
from rankprune.report import LatencyReport, LayerReport
from rankprune.schemes import SCHEMES

LATENCY = (
    LatencyReport("onnxruntime", 1, 2, 18.2, 9.9, 9.1, 18.2 / 9.9, 0.74),
    LatencyReport("eager", 64, 1, 1234.5, 999.0, None, 1.24, 0.5),
)


@pytest.fixture
def trio() -> tuple[nn.Module, nn.Module, Plan]:
    model = small_cnn()
    plan = make_plan(model, FixedRank(8), example_inputs=cnn_input())
    return model, factorize(model, plan), plan


def test_figures_equal_a_recount(trio: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, compact, plan = trio
    x = cnn_input()
    found = report(model, compact, example_inputs=x, plan=plan)
    for cost, network in ((found.dense, model), (found.compact, compact)):
        assert cost.params == count_params(network)
        assert cost.bytes == count_bytes(network)
        assert cost.flops == profile(network, x).flops
    assert found.flops_reduction == found.dense.flops / found.compact.flops
    assert [layer.name for layer in found.layers] == [layer.name for layer in plan.layers]
    for row, layer in zip(found.layers, plan.layers, strict=True):
        assert (row.params, row.dense_params) == (layer.params, layer.dense_params)
        assert (row.flops, row.dense_flops) == (layer.flops, layer.dense_flops)
        assert (row.scheme, row.rank, row.energy) == (layer.scheme, layer.rank, layer.energy)
        assert row.reason == layer.reason


def test_without_a_plan_the_factorised_layers_are_listed(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, compact, plan = trio
    found = report(model, compact, example_inputs=cnn_input())
    assert [layer.name for layer in found.layers] == [layer.name for layer in plan.factorized]


@pytest.mark.parametrize("build", [TiedLinears, SharedModule])
def test_shared_layers_are_counted_once(build: type[nn.Module]) -> None:
    model, x = build(), torch.ones(2, 20)
    plan = make_plan(model, FixedRank(3), example_inputs=x)
    found = report(model, factorize(model, plan), example_inputs=x, plan=plan)
    assert sum(layer.params for layer in found.layers) == found.compact.params
    assert sum(layer.flops for layer in found.layers) == found.compact.flops
    assert sum(layer.dense_params for layer in found.layers) == found.dense.params


def test_the_report_says_what_the_compact_network_has_not_what_was_planned(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, _, plan = trio
    found = report(model, model, example_inputs=cnn_input(), plan=plan)
    assert {layer.scheme for layer in found.layers} == {None}
    assert all(layer.params == layer.dense_params for layer in found.layers)
    assert (found.flops_reduction, found.max_logit_error) == (1.0, 0.0)


def test_difference_is_relative_to_the_largest_output(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, compact, _ = trio
    x = cnn_input()
    found = report(model, compact, example_inputs=x)
    with torch.no_grad():
        error = relative_error(compact.eval()(x), model.eval()(x))
    assert found.max_logit_error == pytest.approx(error)
    assert error > 1e-3
    exact = factorize(model, make_plan(model, Ratio(1.0), guard=False))
    assert (report(model, exact, example_inputs=x).max_logit_error or 1) < 1e-5


def test_difference_is_unknown_where_the_output_is_no_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), x

    model = Pair()
    compact = factorize(model, make_plan(model, FixedRank(2)))
    found = report(model, compact, example_inputs=torch.ones(1, 16))
    assert found.max_logit_error is None
    assert "difference" not in str(found)


def test_reporting_leaves_the_networks_as_they_were(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, compact, _ = trio
    model[1].eval()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, compact)]
    modes = [[module.training for module in m.modules()] for m in (model, compact)]
    report(model, compact, example_inputs=cnn_input())
    assert modes == [[module.training for module in m.modules()] for m in (model, compact)]
    for network, state in zip((model, compact), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_json_round_trip(trio: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, compact, plan = trio
    accuracies = {"dense": 0.91, "projected": 0.9, "compact": None}
    found = report(
        model,
        compact,
        example_inputs=cnn_input(),
        plan=plan,
        accuracies=accuracies,
        latency=LATENCY,
    )
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == found
    assert json.loads(text) == found.to_dict()
    assert (found.dense.accuracy, found.projected_accuracy, found.compact.accuracy) == (
        0.91,
        0.9,
        None,
    )
    assert found.environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    "document",
    [{}, {"dense": 3}, {"dense": {"params": 1}, "compact": {}}, {"dense": {"nope": 1}}],
    ids=str,
)
def test_what_is_no_report_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(FileError, match="not a rankprune report"):
        Report.from_dict(document)


def test_a_report_with_an_unknown_key_is_refused(trio: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, compact, _ = trio
    document = report(model, compact, example_inputs=cnn_input()).to_dict()
    document["layers"][0]["speed"] = 3
    with pytest.raises(FileError, match="speed"):
        Report.from_dict(document)


def test_text_is_a_table_with_totals(trio: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, compact, plan = trio
    found = report(
        model,
        compact,
        example_inputs=cnn_input(),
        plan=plan,
        accuracies={"dense": 0.9174, "projected": 0.9, "compact": 0.9},
    )
    lines = str(found).splitlines()
    assert " ".join(lines[0].split()) == "layer scheme matrix rank energy params FLOPs"
    for line, layer in zip(lines[1:], plan.layers, strict=False):
        assert line.split()[:2] == [layer.name, layer.scheme or "dense"]
    totals = "\n".join(found.totals())
    assert str(found).endswith(totals)
    assert "accuracy    dense 91.74%, projected 90.00%, compact 90.00%" in totals
    assert f"{found.flops_reduction:.2f}×" in totals
    assert "difference" in totals
    assert "latency" not in totals


def test_text_has_a_line_for_every_measured_latency(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, compact, _ = trio
    found = report(model, compact, example_inputs=cnn_input(), latency=LATENCY)
    assert found.latency == LATENCY
    assert str(found).splitlines()[-2:] == [
        "latency     onnxruntime batch 1: 18.2 ms → 9.9 ms (1.84×)",
        "latency     eager batch 64: 1234 ms → 999 ms (1.24×)",
    ]


@pytest.mark.parametrize("scheme", ["channel", "spatial", "decoupled", "depthwise", "auto"])
def test_error_and_spectrum_are_those_of_the_dense_weight(scheme: str) -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(2), scheme=scheme, guard=False)
    compact = factorize(model, plan)
    found = report(model, compact, example_inputs=cnn_input(), plan=plan)
    assert [layer.name for layer in found.layers if layer.scheme]
    for row, entry in zip(found.layers, plan.layers, strict=True):
        if entry.scheme is None or entry.spec is None or entry.rank is None:
            assert (row.error, row.singular_values) == (None, ())
            continue
        weight = model.get_submodule(entry.name).weight.detach().double()
        matrix = SCHEMES[entry.scheme].to_matrix(entry.spec, weight)
        sigma = torch.linalg.svdvals(matrix)
        expected = sigma.square().sum(0).sqrt()
        assert row.singular_values == pytest.approx(expected.tolist(), rel=1e-5)
        lost = sigma[..., entry.rank :].square().sum() / sigma.square().sum()
        assert row.error == pytest.approx(float(lost.sqrt()), rel=1e-4)


def test_the_error_is_against_the_network_that_is_given() -> None:
    model = small_cnn()
    plan = make_plan(model, FixedRank(8), example_inputs=cnn_input())
    compact = factorize(model, plan)
    exact = [layer.error for layer in report(compact, compact, example_inputs=cnn_input()).layers]
    assert exact == [0.0] * len(plan.factorized)
    negated = copy.deepcopy(model)
    for layer in plan.factorized:
        negated.get_submodule(layer.name).weight.data.mul_(-1)
    # what is kept is now wrong by twice itself, what is lost by itself
    for layer in report(negated, compact, example_inputs=cnn_input()).layers:
        assert layer.error == pytest.approx(math.sqrt(1 + 3 * (layer.energy or 0)), rel=1e-4)


def test_a_zero_weight_has_no_error_and_a_spectrum_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    compact = factorize(model, make_plan(model, FixedRank(2)))
    (row,) = report(model, compact, example_inputs=torch.ones(1, 16)).layers
    assert (row.error, row.singular_values) == (0.0, (0.0,) * 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_measured_too(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    compact = factorize(model, make_plan(model, FixedRank(4)))
    (row,) = report(model, compact, example_inputs=torch.ones(1, 16, dtype=dtype)).layers
    assert 0.1 < (row.error or 0) < 1
    assert len(row.singular_values) == 16


def test_predicted_times_come_from_the_plan(trio: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, compact, plan = trio
    for layer in plan.layers:
        object.__setattr__(layer, "latency_ms", 0.5)
        object.__setattr__(layer, "dense_latency_ms", 1.5)
    found = report(model, compact, example_inputs=cnn_input(), plan=plan)
    assert {(row.latency_ms, row.dense_latency_ms) for row in found.layers} == {(0.5, 1.5)}


def test_weights_that_are_no_numbers_are_refused_by_name(
    trio: tuple[nn.Module, nn.Module, Plan],
) -> None:
    model, compact, plan = trio
    name = plan.factorized[0].name
    with torch.no_grad():
        next(model.get_submodule(name).parameters()).view(-1)[0] = math.nan
    with pytest.raises(NumericsError, match=f"layer '{name}'"):
        report(model, compact, example_inputs=cnn_input())


def test_difference_is_unknown_where_the_outputs_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    nn.init.constant_(model[1].weight, math.inf)
    compact = factorize(model, make_plan(model, FixedRank(2), overrides={"1": None}))
    found = report(model, compact, example_inputs=torch.ones(1, 16))
    assert found.max_logit_error is None


@pytest.fixture
def document(trio: tuple[nn.Module, nn.Module, Plan]) -> dict[str, Any]:
    """A whole report as it lies on a disk."""
    model, compact, plan = trio
    found = report(model, compact, example_inputs=cnn_input(), plan=plan, latency=LATENCY)
    read: dict[str, Any] = json.loads(json.dumps(found.to_dict()))
    return read


def test_reports_of_earlier_versions_are_read(document: dict[str, Any]) -> None:
    del document["latency"]
    for layer in document["layers"]:
        for key in ("error", "singular_values", "latency_ms", "dense_latency_ms"):
            del layer[key]
    found = Report.from_dict(document)
    assert found.latency == ()
    assert {layer.singular_values for layer in found.layers} == {()}
    assert Report.from_dict(found.to_dict()) == found


def test_reading_leaves_the_document_as_it_was(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    Report.from_dict(document)
    assert document == before


WRONG: list[Any] = [
    "<script>",
    math.nan,
    -math.inf,
    1e308,
    -1,
    10**5000,
    True,
    None,
    [],
    [[]],
    {},
    {"": 0},
    "\ud800",
    "x" * 10_000,
    ["x"],
    [math.nan],
    [None],
]


def replaced(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    target: Any = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "path",
    [
        *[(key,) for key in ("dense", "compact", "projected", "layers", "latency", "environment")],
        ("max_logit_error",),
        ("projected", "accuracy"),
        *[("dense", key) for key in ("params", "flops", "bytes", "accuracy")],
        *[("layers", 0, item.name) for item in fields(LayerReport)],
        *[("latency", 0, item.name) for item in fields(LatencyReport)],
        ("layers", 0),
        ("environment", "torch"),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_wrong_value_is_refused_or_harmless(
    document: dict[str, Any], path: tuple[Any, ...]
) -> None:
    from rankprune.html import to_html

    refused = 0
    for value in WRONG:
        changed = replaced(document, path, value)
        try:
            found = Report.from_dict(changed)
        except FileError as error:
            refused += 1
            message = str(error)
            assert message.startswith("not a rankprune report: ")
            assert len(message) < 300
            assert message.isascii() or "≥" in message
            continue
        str(found)
        json.dumps(found.to_dict(), allow_nan=False)
        for page in (to_html([("x", found)]), to_html([("x", found), ("y", found)])):
            assert "<script" not in page
            page.encode()
    assert refused >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(speed=3), "speed"),
        (lambda d: d["latency"][0].update({"x" * 500: 3}), r"latency\[0\]\.xxx"),
        (lambda d: d["latency"][1].pop("speedup"), r"latency\[1\]\.speedup is missing"),
        (lambda d: d.pop("environment"), "environment is missing"),
        (lambda d: d["projected"].update(more=1), "projected"),
        (lambda d: d["layers"][0].update(singular_values=[1.0] * 10**7), "at most 131072"),
        (lambda d: d["layers"][0].update(singular_values=[1, "2"]), r"singular_values\[1\]"),
    ],
)
def test_refusals_say_where(
    document: dict[str, Any], change: Callable[[Any], Any], message: str
) -> None:
    change(document)
    with pytest.raises(FileError, match=message) as caught:
        Report.from_dict(document)
    assert len(str(caught.value)) < 300


def test_endless_nesting_is_refused(document: dict[str, Any]) -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    document["environment"]["deep"] = nested
    with pytest.raises(FileError, match="environment"):
        Report.from_dict(document)
    # torn down from outside in, without recursion
    while nested:
        nested = nested.pop()
