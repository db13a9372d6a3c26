"""The report: what compression really did, as text and JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cases import SharedModule, TiedLinears, cnn_input, relative_error, small_cnn
from rankprune import (
    FileError,
    FixedRank,
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
    found = report(model, compact, example_inputs=cnn_input(), plan=plan, accuracies=accuracies)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == found
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
