"""Plans: immutable values, with a strict JSON that says what is wrong where."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CONTRACT, cnn_input, small_cnn
from rankprune import SCHEMES, FixedRank, LayerPlan, LayerSpec, Plan, PlanError, make_plan
from rankprune.plan import SCHEMA_VERSION

names = st.text(min_size=1, max_size=20)
counts = st.integers(0, 2**62)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def layer_plans(draw: st.DrawFn) -> LayerPlan:
    """A possible entry for one of the table's layers."""
    case, scheme_name = draw(st.sampled_from(CONTRACT))
    common: dict[str, Any] = {
        "name": draw(names),
        "type": draw(names),
        "spec": case.spec,
        "reason": draw(st.text(max_size=30)),
        "dense_params": draw(counts),
        "dense_flops": draw(st.none() | counts),
        "params": draw(counts),
        "flops": draw(st.none() | counts),
        "tied": tuple(draw(st.lists(names, max_size=2))),
    }
    if draw(st.booleans()):
        return LayerPlan(**{**common, "spec": draw(st.sampled_from([case.spec, None]))})
    largest = SCHEMES[scheme_name].matrix_shape(case.spec).max_rank
    return LayerPlan(
        **common,
        scheme=scheme_name,
        rank=draw(st.integers(1, largest)),
        energy=draw(st.none() | st.floats(0, 1)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = []
    used: set[str] = set()
    for layer in draw(st.lists(layer_plans(), max_size=4)):
        own = [layer.name, *layer.tied]
        if len({*own} - used) == len(own):
            layers.append(layer)
            used.update(own)
    return Plan(
        layers=tuple(layers),
        dense_params=draw(counts),
        dense_flops=draw(st.none() | counts),
        metadata=draw(st.dictionaries(st.text(max_size=9), json_values, max_size=3)),
    )


@settings(max_examples=200)
@given(plans())
def test_json_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert back.to_json() == text


@settings(max_examples=50)
@given(plans())
def test_pickle_and_deepcopy_round_trip(plan: Plan) -> None:
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@pytest.fixture
def plan() -> Plan:
    return make_plan(small_cnn(), FixedRank(8), example_inputs=cnn_input())


def test_a_plan_cannot_be_changed(plan: Plan) -> None:
    with pytest.raises(AttributeError):
        plan.dense_params = 0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan.layers[0].rank = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.metadata["x"] = 1  # type: ignore[index]


def test_metadata_is_added_to_a_copy(plan: Plan) -> None:
    more = plan.with_metadata(model="cnn").with_metadata(data="digits")
    assert dict(more.metadata) == {"model": "cnn", "data": "digits"}
    assert dict(plan.metadata) == {}
    assert more.layers == plan.layers


def test_layers_are_found_by_name(plan: Plan) -> None:
    assert plan["0"].type == "Conv2d"
    with pytest.raises(KeyError):
        plan["nope"]


def test_totals_are_the_layers_sums(plan: Plan) -> None:
    assert plan.flops is not None
    assert plan.dense_flops is not None
    assert plan.dense_params - plan.params == sum(x.dense_params - x.params for x in plan.layers)
    assert plan.factorized == tuple(layer for layer in plan.layers if layer.rank is not None)
    assert 0 < len(plan.factorized) < len(plan.layers)
    assert replace(plan, dense_flops=None).flops is None


def test_left_dense_costs_what_dense_costs(plan: Plan) -> None:
    layer = plan.factorized[0].left_dense("because")
    assert (layer.dense, layer.scheme, layer.rank, layer.energy) == (True, None, None, None)
    assert (layer.params, layer.flops) == (layer.dense_params, layer.dense_flops)
    assert (layer.reason, layer.matrix) == ("because", None)
    with pytest.raises(PlanError, match="dense in this plan"):
        layer.factors()


def test_printed_plan_is_a_table(plan: Plan) -> None:
    text = str(plan)
    lines = text.splitlines()
    assert len(lines) == len(plan.layers) + 2
    header = "layer type scheme matrix rank energy params FLOPs why"
    assert " ".join(lines[0].split()) == header
    for line, layer in zip(lines[1:], plan.layers, strict=False):
        assert line.split()[:3] == [layer.name, layer.type, layer.scheme or "dense"]
        assert layer.reason in line
    assert f"{len(plan.factorized)} of {len(plan.layers)} layers factorised" in lines[-1]
    assert all(line == line.rstrip() for line in lines)


# -- what is not a plan ----------------------------------------------------------------------------


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *way, last = path.split(".")
        place: Any = document
        for key in way:
            place = place[int(key) if key.isdigit() else key]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return change


HUGE = 10**30
MALFORMED: list[tuple[str, object, str]] = [
    ("schema_version", SCHEMA_VERSION + 1, "newer than this rankprune reads.*upgrade"),
    ("schema_version", 0, "schema_version"),
    ("schema_version", "1", "schema_version"),
    ("schema_version", True, "schema_version"),
    ("schema_version", ..., "'schema_version' is missing"),
    ("layers", ..., "'layers' is missing"),
    ("layers", {}, "'layers' must be a list"),
    ("layers", [1], "layer 0: expected an object, got int"),
    ("dense_params", -1, "dense_params"),
    ("dense_params", 1.5, "dense_params"),
    ("dense_params", HUGE, "dense_params"),
    ("dense_flops", "many", "dense_flops"),
    ("metadata", [], "'metadata' must be an object"),
    ("layers.0.extra", 1, "unknown key 'extra'"),
    ("layers.0.name", 1, "'name' must be a string"),
    ("layers.0.name", "x" * 2000, "'name' must be a string"),
    ("layers.0.name", "3", "'3' is listed twice"),
    ("layers.0.tied", ["3"], "'3' is listed twice"),
    ("layers.0.tied", [3], "'tied' must be a list of names"),
    ("layers.0.tied", "3", "'tied' must be a list"),
    ("layers.0.scheme", "svd", "unknown scheme 'svd'"),
    ("layers.0.scheme", None, "scheme and rank go together"),
    ("layers.0.scheme", "linear", "linear is for linear layers"),
    ("layers.0.scheme", ..., "'scheme' is missing"),
    ("layers.0.rank", None, "scheme and rank go together"),
    ("layers.0.rank", 0, "rank"),
    ("layers.0.rank", 999, "rank 999 exceeds the largest possible"),
    ("layers.0.rank", 2.0, "rank"),
    ("layers.0.rank", HUGE, "rank"),
    ("layers.0.energy", "all", "energy"),
    ("layers.0.energy", True, "energy"),
    ("layers.0.reason", None, "reason"),
    ("layers.0.spec", None, "needs its spec"),
    ("layers.0.spec", 3, "expected an object, got int"),
    ("layers.0.spec.extra", 1, "unknown key 'extra'"),
    ("layers.0.spec.kind", "__import__", "kind '__import__'"),
    ("layers.0.spec.in_channels", 0, "in_channels"),
    ("layers.0.spec.in_channels", 2**31, "in_channels"),
    ("layers.0.spec.groups", 2, "groups=2 does not divide"),
    ("layers.0.spec.bias", 1, "'bias' must be true or false"),
    ("layers.0.spec.kernel_size", [3, 3, 3, 3], "kernel_size"),
    ("layers.0.spec.kernel_size", [3, -3], "kernel_size"),
    ("layers.0.spec.kernel_size", [HUGE, 3], "kernel_size"),
    ("layers.0.spec.kernel_size", [], "kernel of 0 dimensions"),
    ("layers.0.spec.stride", [0, 1], "stride"),
    ("layers.0.spec.stride", [True, 1], "stride"),
    ("layers.0.spec.padding", "full", "padding 'full'"),
    ("layers.0.spec.padding", None, "padding"),
    ("layers.0.spec.padding_mode", "mirror", "padding_mode 'mirror'"),
    ("layers.0.spec.output_padding", [1], "output_padding"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), MALFORMED)
def test_malformed_plans_are_refused(plan: Plan, path: str, value: object, complaint: str) -> None:
    assert not plan.layers[0].dense
    document = json.loads(plan.to_json())
    _set(path, value)(document)
    with pytest.raises(PlanError, match=complaint) as caught:
        Plan.from_json(json.dumps(document), "out/plan.json")
    assert str(caught.value).startswith("out/plan.json")
    assert len(str(caught.value)) < 400


NOT_JSON = {
    "empty": "",
    "a list": "[]",
    "a number": "1",
    "null": "null",
    "text": "hello",
    "truncated": '{"schema_version": 1, "layers": [',
    "NaN": '{"schema_version": 1, "dense_params": NaN}',
    "Infinity": '{"schema_version": -Infinity}',
    "deeply nested": "[" * 100_000 + "]" * 100_000,
    "deeply nested objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a huge number": '{"schema_version": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("value", ["1e999", "-1e999"])
def test_infinity_in_disguise_is_refused(plan: Plan, value: str) -> None:
    """A number that overflows to infinity would make a plan that cannot be written again."""
    document = json.loads(plan.with_metadata(x="HERE").to_json())
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(document).replace('"HERE"', value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"", {1, 2}], ids=repr)
def test_metadata_that_json_cannot_hold_is_refused(plan: Plan, value: object) -> None:
    with pytest.raises(PlanError, match="metadata"):
        plan.with_metadata(x=value).to_json()


def test_truncation_at_every_offset_is_refused(plan: Plan) -> None:
    text = plan.to_json()
    for end in range(0, len(text) - 1, 7):
        with pytest.raises(PlanError):
            Plan.from_json(text[:end])


def test_a_plan_without_specs_reads(plan: Plan) -> None:
    dense = LayerPlan(name="lstm", type="LSTM", spec=None, reason="LSTM is not supported")
    other = Plan(layers=(dense,), dense_params=7)
    assert Plan.from_json(other.to_json()) == other
    assert isinstance(plan.layers[0].spec, LayerSpec)
