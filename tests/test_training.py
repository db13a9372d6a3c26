"""The controller: which steps project and regularise, what they do, and how a run resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import (
    SharedModule,
    TiedLinears,
    cnn_input,
    mlp,
    relative_error,
    resnet20,
    small_cnn,
)
from rankprune import (
    TRP,
    Budget,
    BudgetError,
    ConfigError,
    Controller,
    Energy,
    FixedRank,
    LayerConfig,
    NumericsError,
    Plan,
    PlanError,
    Ratio,
    attach,
    factorize,
    make_plan,
    profile,
)
from rankprune.linalg import Decomposition
from rankprune.training import REPLANS, unwrap

Optimizer = torch.optim.Optimizer


def _sgd(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def _batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(8, 16, generator=generator)


def _rank(weight: Tensor) -> int:
    values = torch.linalg.svdvals(weight.detach().double())
    return int((values > 1e-5 * values[0]).sum())


def _spy(controller: Controller) -> list[int]:
    """Steps before which the controller projects from now on."""
    steps: list[int] = []
    project = controller.project

    def recorded() -> None:
        steps.append(controller.step)
        project()

    controller.project = recorded  # type: ignore[method-assign]
    return steps


def _train(model: nn.Module, optimizer: Optimizer, steps: int, batches: Iterator[Tensor]) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(next(batches)).square().mean().backward()
        optimizer.step()


# -- when it projects ------------------------------------------------------------------------------

SCHEDULES: list[tuple[dict[str, Any], list[int]]] = [
    ({"every": 1}, list(range(13))),
    ({"every": 4}, [0, 4, 8, 12]),
    ({"every": 5, "start": 2}, [2, 7, 12]),
    ({"every": 3, "end": 7}, [0, 3, 6]),
    ({"every": 3, "start": 1, "end": 8}, [1, 4, 7]),
    ({"every": 100}, [0]),
    ({"every": 2, "start": 100}, []),
]


@pytest.mark.parametrize(("options", "expected"), SCHEDULES, ids=str)
def test_projection_happens_before_the_steps_that_are_due(
    options: dict[str, Any], expected: list[int]
) -> None:
    """Read off the weights' rank at each forward pass."""
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(3), **options))
    batches = _batches()
    projected = []
    for step in range(13):
        if _rank(model[0].weight) == 3:
            projected.append(step)
        assert trp.step == step
        _train(model, optimizer, 1, batches)
    assert projected == expected


def test_projection_is_the_nearest_of_that_rank() -> None:
    model = mlp()
    nearest = [Decomposition(model[i].weight.detach().double()).project(3) for i in (0, 2)]
    trp = attach(model, _sgd(model), TRP(rank=FixedRank(3)))
    for layer, expected in zip((model[0], model[2]), nearest, strict=True):
        assert torch.allclose(layer.weight.double(), expected, atol=1e-6)
    assert trp.ranks == {"0": 3, "2": 3}
    assert all(0 < energy < 1 for energy in trp.energies.values())


def test_rule_sees_the_spectrum_at_each_projection() -> None:
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=Energy(0.5), every=2))
    for step in range(6):
        if step % 2 == 0:
            for name, rank in trp.ranks.items():
                assert _rank(model.get_submodule(name).weight) == rank
                assert trp.energies[name] >= 0.5
        _train(model, optimizer, 1, _batches())


def test_options_are_those_of_make_plan() -> None:
    model = small_cnn()
    overrides = {"0": None, "3": LayerConfig(rank=5, scheme="spatial"), "10": FixedRank(3)}
    options = TRP(rank=FixedRank(2), scheme="channel", overrides=overrides, multiple_of=2)
    trp = attach(model, _sgd(model), options)
    # an exact rank is not rounded
    assert trp.ranks == {"3": 5, "6": 2, "10": 4, "12": 2}
    assert trp.state_dict()["layers"]["3"]["scheme"] == "spatial"
    assert trp.state_dict()["layers"]["6"]["scheme"] == "channel"


# -- the nuclear norm (floor 3) --------------------------------------------------------------------

WEIGHT = 0.07


def _nuclear_gradients(model: nn.Module, controller: Controller) -> dict[str, Tensor]:
    """λ times autograd's gradient of the sum of nuclear norms of the schemes' matrices."""
    twin = copy.deepcopy(model)
    total = torch.zeros((), dtype=torch.float64)
    for target in controller._targets:
        matrix = target.scheme.to_matrix(target.spec, twin.get_submodule(target.name).weight)
        total = total + torch.linalg.matrix_norm(matrix, "nuc").sum()
    total.backward()
    return {
        target.name: WEIGHT * twin.get_submodule(target.name).weight.grad
        for target in controller._targets
    }


@pytest.mark.parametrize("scheme", ["auto", "channel", "spatial", "decoupled", "depthwise"])
def test_regularise_adds_autograds_gradient_of_the_nuclear_norm(scheme: str) -> None:
    """In float64 at full rank, to 1e-8, on top of the gradient that is there."""
    model = small_cnn().double()
    options = TRP(rank=Ratio(1.0), scheme=scheme, nuclear=WEIGHT, nuclear_when="step")
    controller = Controller(model, options)
    expected = _nuclear_gradients(model, controller)
    assert len(expected) >= 4
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    controller.regularise()
    for name, module in model.named_modules():
        if name in expected:
            added = module.weight.grad - 2.0
            assert torch.allclose(added, expected[name], rtol=0, atol=1e-8)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight.grad, torch.full_like(module.weight, 2.0))


def _sgd_reference(
    options: TRP, regularised: Callable[[int], bool], kept: bool, steps: int = 7
) -> tuple[nn.Module, nn.Module]:
    """A model trained with `attach`, and one with the method written out in NumPy's manner."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    attach(model, optimizer, options)
    other = mlp().double()
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    batches, same = _batches(), _batches()
    for step in range(steps):
        optimizer.zero_grad()
        model(next(batches).double()).square().mean().backward()
        optimizer.step()

        kept_polars = {}
        if options.start <= step and (step - options.start) % options.every == 0:
            for layer in (other[0], other[2]):
                u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
                layer.weight.data = (u[:, :3] * s[:3]) @ vh[:3]
                kept_polars[layer] = u[:, :3] @ vh[:3]
        plain.zero_grad()
        other(next(same).double()).square().mean().backward()

        def polar(layer: nn.Linear, kept_polars: dict[nn.Module, Tensor] = kept_polars) -> Tensor:
            if kept:
                return kept_polars[layer]
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            return (u * (s > 1e-12 * s[0])) @ vh

        if regularised(step) and options.nuclear_mode == "gradient":
            for layer in (other[0], other[2]):
                layer.weight.grad += options.nuclear * polar(layer)
        plain.step()
        if regularised(step) and options.nuclear_mode == "decoupled":
            for layer in (other[0], other[2]):
                layer.weight.data -= 0.1 * options.nuclear * polar(layer)
    # attach has projected for the next step already, where it is due
    if (steps - options.start) % options.every == 0:
        for layer in (other[0], other[2]):
            u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.weight.data = (u[:, :3] * s[:3]) @ vh[:3]
    return model, other


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize("when", ["projection", "step"])
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (2, 3)])
def test_training_is_the_method_written_out(when: str, mode: str, every: int, start: int) -> None:
    """Momentum and weight decay included; in fp64, to 1e-10."""
    options = TRP(
        rank=FixedRank(3),
        every=every,
        start=start,
        nuclear=0.05,
        nuclear_when=when,
        nuclear_mode=mode,
    )

    def regularised(step: int) -> bool:
        return step >= start and (when == "step" or (step - start) % every == 0)

    model, other = _sgd_reference(options, regularised, kept=when == "projection")
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-10)


def test_no_regularisation_outside_of_start_and_end() -> None:
    model = mlp()
    options = TRP(rank=FixedRank(3), start=2, end=4, nuclear=1.0, nuclear_when="step")
    controller = Controller(model, options)
    added = []
    for _ in range(6):
        controller.before_step()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        controller.regularise()
        added.append(bool(model[0].weight.grad.any()))
        controller.after_step()
    assert added == [False, False, True, True, False, False]


def test_layers_without_gradient_are_not_regularised() -> None:
    model = mlp()
    controller = Controller(model, TRP(rank=Ratio(1.0), nuclear=1.0, nuclear_when="step"))
    controller.regularise()
    assert all(parameter.grad is None for parameter in model.parameters())


# -- what counts as a step -------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True, momentum=0.9),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "unscaled_first"])
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_are_none(
    name: str, mode: str, clip: bool
) -> None:
    """Same weights as without scaler and without the skipped batches; projections as well."""
    options = TRP(rank=FixedRank(3), every=2, nuclear=0.05, nuclear_mode=mode, nuclear_when="step")
    model, reference = mlp(), mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    plain = OPTIMIZERS[name](reference.parameters())
    trp, expected = attach(model, optimizer, options), attach(reference, plain, options)
    projected, same = _spy(trp), _spy(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    batches = _batches()
    for batch in range(9):
        x = next(batches)
        overflow = batch in (2, 3, 7)
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if overflow:
            model[0].weight.grad[0, 0] = math.inf
        if clip:
            scaler.unscale_(optimizer)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        count = trp.step
        scaler.step(optimizer)
        scaler.update()
        assert trp.step == count + (not overflow)
        if overflow:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            continue
        plain.zero_grad()
        reference(x).square().mean().backward()
        plain.step()
    assert trp.step == expected.step == 6
    assert projected == same == [2, 4, 6]
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        # powers of two scale without rounding
        assert torch.allclose(parameter, other, rtol=0, atol=2e-6)


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(3), every=2, nuclear=0.1))
    projected, batches = _spy(trp), _batches()
    for _ in range(5):
        optimizer.zero_grad()
        weights = []
        for _ in range(4):
            weights.append(model[0].weight.detach().clone())
            (model(next(batches)).square().mean() / 4).backward()
        assert all(torch.equal(weights[0], other) for other in weights)
        optimizer.step()
    assert trp.step == 5
    assert projected == [2, 4]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accelerates_optimizer_takes_the_same_steps(accumulation: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    options = TRP(rank=FixedRank(3), every=2, nuclear=0.05)
    reference = mlp()
    plain = _sgd(reference)
    expected = attach(reference, plain, options)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = mlp()
    model, optimizer = accelerator.prepare(model, _sgd(model))
    trp = attach(model, optimizer, options)
    batches, same = _batches(), _batches()
    for _ in range(5 * accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(next(batches)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    for _ in range(5):
        plain.zero_grad()
        for _ in range(accumulation):
            (reference(next(same)).square().mean() / accumulation).backward()
        plain.step()
    assert trp.step == expected.step == 5
    for parameter, other in zip(unwrap(model).parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=0, atol=1e-6)


# -- descent ---------------------------------------------------------------------------------------


def test_ranks_of_a_plan_come_down_cubically() -> None:
    model = mlp()
    plan = make_plan(model, FixedRank(2))
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(plan=plan, every=1, start=1, descent=8))
    seen = []
    for _ in range(12):
        seen.append(trp.ranks["0"])
        _train(model, optimizer, 1, _batches())
    expected = [2] + [round(2 + 14 * (1 - min(t, 8) / 8) ** 3) for t in range(11)]
    assert seen == expected
    assert {layer.rank for layer in trp.finish().layers} == {2}


def test_a_plan_is_reached_even_if_the_descent_was_not_ended() -> None:
    model = mlp()
    plan = make_plan(model, FixedRank(2))
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(plan=plan, every=1, descent=1000))
    _train(model, optimizer, 3, _batches())
    assert trp.ranks["0"] > 2
    assert [layer.rank for layer in trp.finish().layers] == [2, 2]
    assert _rank(model[0].weight) == 2


def test_a_descending_budget_is_spent_anew() -> None:
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    budget = Budget(flops=0.4)
    options = TRP(rank=budget, every=1, descent=3)
    controller = Controller(model, options, example_inputs=x)
    assert controller.ranks == {}
    shares = []
    for _ in range(5):
        controller.before_step()
        ranks = controller.ranks
        if ranks:
            overrides = {
                name: LayerConfig(
                    rank=rank, scheme=controller.state_dict()["layers"][name]["scheme"]
                )
                for name, rank in ranks.items()
            }
            others = {"*": None} | overrides
            plan = make_plan(model, Ratio(1.0), overrides=others, example_inputs=x, guard=False)
            shares.append((plan.flops or 0) / (plan.dense_flops or 1))
        else:
            shares.append(1.0)
        controller.after_step()
    spent = [min(step / 3, 1) * REPLANS // 1 for step in range(5)]  # 0, 2, 5, 8, 8 of 8
    allowed = [0.4 + 0.6 * (1 - part / REPLANS) ** 3 for part in spent]
    for share, bound in zip(shares, allowed, strict=True):
        assert bound * 0.98 <= share <= bound + 1e-12
    plan = controller.finish()
    assert 0.396 * (plan.dense_flops or 0) <= (plan.flops or 0) <= 0.4 * (plan.dense_flops or 0)


def test_an_unreachable_budget_fails_at_once_even_where_it_descends() -> None:
    with pytest.raises(BudgetError):
        Controller(mlp(), TRP(rank=Budget(params=0.01), descent=10))


# -- finish ----------------------------------------------------------------------------------------

FINISHED: list[dict[str, Any]] = [
    {"rank": FixedRank(3)},
    {"rank": Energy(0.6), "nuclear": 0.01},
    {"rank": Ratio(0.3), "scheme": "channel", "nuclear": 0.01, "nuclear_when": "step"},
    {"rank": Ratio(0.2), "scheme": "spatial", "multiple_of": 4},
    {"rank": Ratio(0.3), "scheme": "decoupled", "guard": False},
    {"rank": Ratio(0.9)},
    {"rank": Budget(flops=0.5)},
    {"rank": Budget(flops=0.5, params=0.6), "descent": 4},
    {"rank": Budget(params=0.4), "descent": 100},
    {"rank": FixedRank(3), "start": 100},
    {"rank": FixedRank(3), "end": 2},
]


@pytest.mark.parametrize("options", FINISHED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_factorising_after_finish_changes_no_answer(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The method's promise, and the plan's costs and the budget hold as counted by torch."""
    model, x = small_cnn().to(dtype), cnn_input(8).to(dtype)
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(every=3, **options), example_inputs=x)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    plan = trp.finish()
    compact = factorize(model, plan)
    model.eval()
    compact.eval()
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert relative_error(compact(x), model(x)) <= tolerance
    cost, dense = profile(compact, x), profile(model, x)
    assert (plan.params, plan.flops) == (cost.params, cost.flops)
    assert (plan.dense_params, plan.dense_flops) == (dense.params, dense.flops)
    budget = options["rank"]
    if isinstance(budget, Budget):
        for quantity, bound in budget.bounds().items():
            assert getattr(cost, quantity) <= bound * getattr(dense, quantity)
    if options.get("guard", True):
        assert all(layer.params <= layer.dense_params for layer in plan.layers)
    for layer in plan.factorized:
        assert trp.ranks[layer.name] == layer.rank
        assert trp.energies[layer.name] == layer.energy


def test_layers_that_do_not_pay_stay_as_trained() -> None:
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(15), every=100))
    _train(model, optimizer, 2, _batches())
    before = model[0].weight.detach().clone()
    plan = trp.finish()
    assert not plan.factorized
    assert "does not pay" in plan["0"].reason
    assert torch.equal(model[0].weight, before)


def test_an_end_that_fails_can_be_tried_again() -> None:
    """And until then the training goes on."""
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(3), every=1))
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(NumericsError):
        trp.finish()
    model.load_state_dict(kept)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert (trp.step, _rank(model[0].weight)) == (2, 3)
    assert trp.finish()["0"].rank == 3


def test_inputs_that_do_not_fit_a_plan_fail_at_the_start() -> None:
    model = mlp()
    with pytest.raises(ConfigError):
        Controller(
            model, TRP(plan=make_plan(model, FixedRank(3))), example_inputs=torch.randn(2, 5)
        )


@pytest.mark.parametrize("rank", [FixedRank(3), Energy(0.9)], ids=str)
def test_the_end_inside_of_autocast_is_the_end_outside(rank: Any) -> None:
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 160), nn.Linear(160, 128))
        controller = Controller(model, TRP(rank=rank))
        controller.project()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            controller.finish()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_finish_twice_is_finish_once() -> None:
    model = mlp()
    trp = attach(model, _sgd(model), TRP(rank=FixedRank(3)))
    plan = trp.finish()
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert trp.finish() is plan
    assert torch.equal(model[0].weight, weight + 1.0)


@pytest.mark.parametrize("verb", ["finish", "detach"])
def test_hooks_are_taken_off(verb: str) -> None:
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(3), every=1))
    assert optimizer._optimizer_step_pre_hooks
    assert optimizer._optimizer_step_post_hooks
    getattr(trp, verb)()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    _train(model, optimizer, 2, _batches())
    assert trp.step == 0
    assert _rank(model[0].weight) > 3


def test_realised_reasons_and_unchosen_layers() -> None:
    model = small_cnn()
    options = TRP(rank=FixedRank(3), overrides={"0": None})
    plan = attach(model, _sgd(model), options).finish()
    assert plan["0"].reason == "not chosen"
    assert plan["3"].reason == "FixedRank(rank=3)"
    plan = attach(model, _sgd(model), TRP(rank=Budget(params=0.5))).finish()
    assert {layer.reason for layer in plan.factorized} == {"budget"}
    plan = attach(model, _sgd(model), TRP(plan=plan)).finish()
    assert {layer.reason for layer in plan.factorized} == {"plan"}


def test_tied_and_shared_layers_are_trained_once() -> None:
    for model in (TiedLinears(), SharedModule()):
        x = torch.randn(4, 20)
        optimizer = _sgd(model)
        trp = attach(model, optimizer, TRP(rank=FixedRank(3), every=2, nuclear=0.1))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        compact = factorize(model, trp.finish())
        with torch.no_grad():
            assert relative_error(compact(x), model(x)) <= 1e-5
        assert _rank(model.a.weight) == 3


# -- resuming (floor 6) ----------------------------------------------------------------------------

RESUMED: dict[str, tuple[dict[str, Any], Callable[[Any], Optimizer]]] = {
    "rule": ({"rank": Energy(0.7), "every": 3}, OPTIMIZERS["sgd foreach"]),
    "nuclear": ({"rank": FixedRank(3), "every": 3, "nuclear": 0.1}, OPTIMIZERS["sgd foreach"]),
    "every step": (
        {"rank": FixedRank(3), "every": 4, "nuclear": 0.1, "nuclear_when": "step"},
        OPTIMIZERS["adamw fused"],
    ),
    "decoupled": (
        {"rank": FixedRank(3), "every": 2, "nuclear": 0.1, "nuclear_mode": "decoupled"},
        OPTIMIZERS["adamw foreach"],
    ),
    "start and end": (
        {"rank": Ratio(0.3), "every": 2, "start": 3, "end": 9, "nuclear": 0.1},
        OPTIMIZERS["sgd"],
    ),
    "budget": ({"rank": Budget(params=0.5), "every": 3, "nuclear": 0.1}, OPTIMIZERS["sgd"]),
    "descending budget": (
        {"rank": Budget(params=0.4), "every": 1, "descent": 8, "nuclear": 0.1},
        OPTIMIZERS["sgd foreach"],
    ),
    "descending plan": (
        {"rank": "plan", "every": 2, "start": 1, "descent": 8, "nuclear": 0.1},
        OPTIMIZERS["sgd foreach"],
    ),
}


def _trainer(
    name: str, state: dict[str, Any] | None = None
) -> tuple[nn.Module, Optimizer, Controller]:
    options, make = RESUMED[name]
    model = mlp()
    if options["rank"] == "plan":
        options = {**options, "plan": make_plan(model, FixedRank(3)), "rank": None}
    if state is not None:
        model.load_state_dict(state["model"])
    optimizer = make(model.parameters())
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
    trp = attach(model, optimizer, TRP(**options), state=None if state is None else state["trp"])
    return model, optimizer, trp


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_at_any_step_is_bit_identical(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By way of a file that torch reads with weights_only=True."""
    steps = 12
    model, optimizer, trp = _trainer(name)
    generator = torch.Generator().manual_seed(5)
    data = [torch.randn(8, 16, generator=generator) for _ in range(steps)]
    folder = tmp_path_factory.mktemp("checkpoints")
    history = []
    for step in range(steps + 1):
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "trp": trp.state_dict(),
        }
        torch.save(state, folder / f"{step}.pt")
        history.append({key: value.clone() for key, value in model.state_dict().items()})
        if step < steps:
            _train(model, optimizer, 1, iter([data[step]]))
    plan = trp.finish()
    final = {key: value.clone() for key, value in model.state_dict().items()}
    for step in range(steps + 1):
        state = torch.load(folder / f"{step}.pt", weights_only=True)
        model, optimizer, trp = _trainer(name, state)
        assert trp.step == step
        for later in range(step, steps + 1):
            for key, value in model.state_dict().items():
                assert torch.equal(value, history[later][key]), (step, later, key)
            if later < steps:
                _train(model, optimizer, 1, iter([data[later]]))
        assert trp.finish() == plan
        assert all(torch.equal(value, final[key]) for key, value in model.state_dict().items())


def test_the_histories_differ_so_that_resuming_could_fail() -> None:
    """A resumed run without the controller's state takes another path."""
    model, optimizer, _ = _trainer("nuclear")
    _train(model, optimizer, 4, _batches())
    other = mlp()
    other.load_state_dict(model.state_dict())
    again = RESUMED["nuclear"][1](other.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    attach(other, again, TRP(**RESUMED["nuclear"][0]))  # projects at once, as before step 0
    assert not torch.equal(other[0].weight, model[0].weight)


BAD_STATES: list[tuple[Any, str]] = [
    ({}, "not a controller's state"),
    (None, "not a controller's state"),
    ({"version": 1, "step": 0, "replans": 0, "layers": 3}, "not a controller's state"),
    ({"version": 2, "step": 0, "replans": 0, "layers": {}}, "version 2"),
    ({"version": 1, "step": 0, "replans": 0, "layers": {}}, "other layers or options"),
    (
        {"version": 1, "step": 0, "replans": 0, "layers": {"0": {}, "2": {}}},
        "controller state of layer '0'",
    ),
    (
        {
            "version": 1,
            "step": 0,
            "replans": 0,
            "layers": {
                key: {"scheme": "svd", "rank": 3, "energy": None, "polar": None} for key in "02"
            },
        },
        "unknown scheme 'svd'",
    ),
]


@pytest.mark.parametrize(("state", "complaint"), BAD_STATES, ids=[row[1] for row in BAD_STATES])
def test_another_state_is_refused(state: Any, complaint: str) -> None:
    controller = Controller(mlp(), TRP(rank=FixedRank(3)))
    before = controller.state_dict()
    with pytest.raises(ConfigError, match=complaint):
        controller.load_state_dict(state)
    assert controller.state_dict() == before


def test_the_state_of_another_plan_is_refused() -> None:
    model = small_cnn()
    states = [
        Controller(model, TRP(plan=make_plan(model, FixedRank(2), scheme=scheme))).state_dict()
        for scheme in ("channel", "spatial")
    ]
    controller = Controller(model, TRP(plan=make_plan(model, FixedRank(2), scheme="channel")))
    controller.load_state_dict(states[0])
    with pytest.raises(ConfigError, match="other layers or options"):
        controller.load_state_dict(states[1])


def test_a_state_loaded_after_the_end_ends_anew() -> None:
    model = mlp()
    controller = Controller(model, TRP(rank=FixedRank(3)))
    state = controller.state_dict()
    controller.finish()
    with torch.no_grad():
        model[0].weight.normal_()
    controller.load_state_dict(state)
    controller.finish()
    assert _rank(model[0].weight) == 3


def test_a_budget_is_not_planned_anew_for_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again on a busy machine it might be missed."""
    model, options = mlp(), TRP(rank=Budget(params=0.5))
    state = Controller(model, options).state_dict()

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("rankprune.training.make_plan", refused)
    resumed = attach(model, _sgd(model), options, state=state)
    assert resumed.state_dict()["layers"].keys() == state["layers"].keys()


def test_the_state_of_another_model_is_refused() -> None:
    controller = Controller(mlp(), TRP(rank=Budget(params=0.5)))
    state = Controller(small_cnn(), TRP(rank=Budget(params=0.5))).state_dict()
    with pytest.raises(ConfigError, match="the model has no layer"):
        controller.load_state_dict(state)


# -- wrappers, frozen and damaged weights ----------------------------------------------------------


def test_compiled_models_are_looked_through_without_compiling() -> None:
    model = mlp()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    trp = attach(compiled, optimizer, TRP(rank=FixedRank(3)))
    assert trp.model is model
    assert set(trp.ranks) == {"0", "2"}


def test_ddp_models_are_looked_through() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert unwrap(wrapped) is model
        assert unwrap(torch.compile(wrapped)) is model
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        trp = attach(wrapped, optimizer, TRP(rank=FixedRank(3), every=1))
        _train(wrapped, optimizer, 2, _batches())
        assert trp.step == 2
        assert _rank(model[0].weight) == 3
        compact = factorize(model, trp.finish())
        x = torch.randn(4, 16)
        with torch.no_grad():
            assert relative_error(compact(x), model(x)) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize("when", ["projection", "step"])
def test_frozen_layers_are_projected_but_not_regularised(mode: str, when: str) -> None:
    """They end up factorised with the rest; nothing else moves them."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = _sgd(model)
    options = TRP(rank=FixedRank(3), every=2, nuclear=0.5, nuclear_mode=mode, nuclear_when=when)
    trp = attach(model, optimizer, options)
    projected = model[0].weight.detach().clone()
    assert _rank(projected) == 3
    _train(model, optimizer, 5, _batches())
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad
    assert torch.allclose(model[0].weight, projected, rtol=0, atol=1e-6)
    compact = factorize(model, trp.finish())
    assert not compact[0][0].weight.requires_grad
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert relative_error(compact(x), model(x)) <= 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_weights_are_named_before_anything_is_changed(value: float) -> None:
    model = mlp()
    optimizer = _sgd(model)
    trp = attach(model, optimizer, TRP(rank=FixedRank(3), every=2))
    _train(model, optimizer, 1, _batches())
    with torch.no_grad():
        model[2].weight[0, 0] = value
    before = model[0].weight.detach().clone()
    for verb in (trp.project, trp.finish):
        with pytest.raises(NumericsError, match=r"layer '2': .* (1 NaN|1 infinite)"):
            verb()
        assert torch.equal(model[0].weight, before)


def test_a_diverged_training_loop_stops_at_the_next_projection() -> None:
    model = mlp()
    optimizer = _sgd(model)
    attach(model, optimizer, TRP(rank=FixedRank(3), every=2))
    _train(model, optimizer, 1, _batches())
    with pytest.raises(NumericsError, match="the training has diverged"):
        _train(model, optimizer, 1, iter([torch.full((8, 16), math.nan)]))


def test_half_precision_weights_are_projected_in_full() -> None:
    model = mlp().to(torch.bfloat16)
    trp = attach(model, _sgd(model), TRP(rank=FixedRank(3), nuclear=0.1))
    assert model[0].weight.dtype is torch.bfloat16
    values = torch.linalg.svdvals(model[0].weight.detach().double())
    assert float(values[3] / values[0]) < 2**-7
    assert trp.finish().factorized


# -- bad options -----------------------------------------------------------------------------------

_PLAN = Plan(layers=(), dense_params=0)
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "give either rank"),
    ({"rank": FixedRank(1), "plan": _PLAN}, "give either rank"),
    ({"plan": _PLAN, "scheme": "channel"}, "the plan has that"),
    ({"plan": _PLAN, "overrides": {"0": None}}, "the plan has that"),
    ({"plan": _PLAN, "multiple_of": 8}, "the plan has that"),
    *(({"rank": FixedRank(1), "every": v}, "every=") for v in (0, -1, 1.5, "2", None, True)),
    *(({"rank": FixedRank(1), "start": v}, "start=") for v in (-1, 0.5, None, True)),
    *(({"rank": FixedRank(1), "end": v}, "end=") for v in (-1, 2.5, "9", True)),
    ({"rank": FixedRank(1), "end": 0}, "end must come after start"),
    ({"rank": FixedRank(1), "start": 5, "end": 5}, "end must come after start"),
    *(({"plan": _PLAN, "descent": v}, "descent=") for v in (-1, 1.5, None)),
    ({"rank": Energy(0.9), "descent": 5}, "descent.*needs a plan or a Budget"),
    *(
        ({"rank": FixedRank(1), "nuclear": v}, "nuclear=")
        for v in (-1e-9, math.nan, math.inf, "1", None)
    ),
    ({"rank": FixedRank(1), "nuclear_mode": "adam"}, "nuclear_mode='adam'"),
    ({"rank": FixedRank(1), "nuclear_when": "always"}, "nuclear_when='always'"),
]


@pytest.mark.parametrize(("options", "complaint"), BAD_OPTIONS, ids=str)
def test_impossible_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TRP(**options)


def test_options_are_checked_against_the_model() -> None:
    model = mlp()
    for options, error in (
        (TRP(rank=FixedRank(1), scheme="svd"), ConfigError),
        (TRP(rank=FixedRank(1), overrides={"nope": None}), ConfigError),
        (TRP(plan=make_plan(small_cnn(), FixedRank(2))), PlanError),
        (TRP(rank=Budget(flops=0.5)), ConfigError),
    ):
        with pytest.raises(error):
            attach(model, _sgd(model), options)


def test_the_optimizer_must_hold_the_model() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="holds none of the model's parameters"):
        attach(model, _sgd(mlp()), TRP(rank=FixedRank(3)))
    with pytest.raises(ConfigError, match="must be a torch optimizer, got str"):
        attach(model, "sgd", TRP(rank=FixedRank(3)))  # type: ignore[arg-type]
    assert _rank(model[0].weight) == 16


def test_layers_of_another_optimizer_are_refused_or_left_dense() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"does not hold layer '2'.*'2': None"):
        attach(model, optimizer, TRP(rank=FixedRank(3)))
    assert attach(model, optimizer, TRP(rank=FixedRank(3), overrides={"2": None})).ranks == {"0": 3}
    frozen = mlp()
    frozen[2].requires_grad_(False)
    optimizer = torch.optim.SGD(frozen[0].parameters(), lr=0.1)
    assert attach(frozen, optimizer, TRP(rank=FixedRank(3))).ranks == {"0": 3, "2": 3}


def test_options_are_frozen_and_keyword_only() -> None:
    options = TRP(rank=FixedRank(3))
    with pytest.raises(AttributeError):
        options.every = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TRP(FixedRank(3))  # type: ignore[misc]
