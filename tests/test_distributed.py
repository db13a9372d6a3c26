"""Work shared by processes: who computes what, and the same answers as from one process."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankprune import (
    TRP,
    Budget,
    Controller,
    Energy,
    FixedRank,
    NumericsError,
    Plan,
    attach,
    engine,
    factorize,
    make_plan,
    targets,
    training,
)
from rankprune.distributed import Team
from rankprune.sharded import full_tensor, is_sharded, local_part
from runs import FORKS, equal, in_two_processes

dist = torch.distributed
pytestmark = FORKS
# one more than is projected last, so that `finish` has something to do
STEPS = 21
WORLD = 2


# -- who computes what -----------------------------------------------------------------------------


class _Sized(Team):
    """A team of a size that needs no processes."""

    @property
    def size(self) -> int:
        return int(self.group)


costs_of_matrices = st.lists(st.floats(0, 1e12), max_size=30)


@settings(max_examples=200)
@given(costs=costs_of_matrices, size=st.integers(1, 8), sharded=st.booleans())
def test_every_matrix_has_one_owner(costs: list[float], size: int, sharded: bool) -> None:
    waves = list(_Sized(size).waves(costs, sharded=sharded))
    pairs = [pair for wave in waves for pair in wave]
    assert sorted(index for index, _ in pairs) == list(range(len(costs)))
    assert all(0 <= owner < size for _, owner in pairs)
    # what a process decides must not depend on which one it is
    assert waves == list(_Sized(size).waves(tuple(costs), sharded=sharded))
    if sharded:
        for wave in waves:
            owners = [owner for _, owner in wave]
            assert wave
            assert len(set(owners)) == len(owners)
    else:
        assert len(waves) == 1


@settings(max_examples=200)
@given(costs=st.lists(st.integers(0, 40), max_size=8), size=st.integers(1, 3))
def test_loads_are_level(costs: list[int], size: int) -> None:
    """At most 4/3 - 1/(3 m) of the best possible, found by trying everything."""
    (wave,) = _Sized(size).waves(costs, sharded=False)
    loads = [0] * size
    for index, owner in wave:
        loads[owner] += costs[index]
    best = min(
        max(sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(size))
        for owners in itertools.product(range(size), repeat=len(costs))
    )
    assert max(loads) <= best * (4 / 3 - 1 / (3 * size)) + 1e-9


def test_one_process_owns_everything() -> None:
    team = Team.of(nn.Linear(3, 3))
    assert (team.group, team.size, team.rank) == (None, 1, 0)
    flags = torch.tensor([True, False])
    assert team.all_true(flags) is flags


# -- two processes ---------------------------------------------------------------------------------


def _spied() -> list[list[tuple[int, int]]]:
    """Rows and columns of what this process computes from now on, one list a call."""
    calls: list[list[tuple[int, int]]] = []
    project = engine.project

    def recorded(jobs: Any) -> Iterator[Any]:
        if jobs:
            calls.append([(job.shape.rows, job.shape.cols) for job in jobs])
        return project(jobs)

    engine.project = recorded
    return calls


def _farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[key] - expected[key]).norm() / expected[key].norm()) for key in expected
    )


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, inputs: Tensor, part: slice
) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = inputs[step % len(inputs)][part]
        y = model(x)
        (y - torch.sin(x.flatten(1)[:, : y.shape[1]])).square().mean().backward()
        optimizer.step()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    state = training.unwrap(model).state_dict()
    return {key: full_tensor(value).detach().clone() for key, value in state.items()}


def _ranks(plan: str) -> dict[str, tuple[str | None, int | None]]:
    return {layer.name: (layer.scheme, layer.rank) for layer in Plan.from_json(plan).layers}


def _part(rank: int | None, size: int) -> slice:
    half = size // WORLD
    return slice(None) if rank is None else slice(rank * half, (rank + 1) * half)


# -- DistributedDataParallel -----------------------------------------------------------------------


def _with_gaps(model: nn.Module) -> nn.Module:
    """Spectra that fall by a quarter from value to value, so that rounding stays rounding."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
                values = 3 * s[0] * 0.75 ** torch.arange(len(s))
                weight.copy_(((u * values) @ vh).view(weight.shape))
    return model


def _mlp() -> nn.Module:
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()]
    layers += [nn.Linear(128, 200), nn.ReLU(), nn.Linear(200, 10)]
    return _with_gaps(nn.Sequential(*layers))


def _replicated_options(model: nn.Module) -> dict[str, TRP]:
    plan = make_plan(model, FixedRank(20))
    shared: dict[str, Any] = {"every": 2, "nuclear": 0.01}
    return {
        "energy, gradient": TRP(rank=Energy(0.98), **shared),
        "fixed, decoupled": TRP(rank=FixedRank(24), nuclear_mode="decoupled", **shared),
        "budget, descent": TRP(rank=Budget(params=0.4), descent=16, **shared),
        "plan, descent": TRP(plan=plan, descent=12, nuclear_mode="decoupled", **shared),
        "each step, gradient": TRP(rank=FixedRank(24), nuclear_when="step", **shared),
        "each step, decoupled": TRP(
            rank=FixedRank(24), nuclear_when="step", nuclear_mode="decoupled", **shared
        ),
    }


def _trained_replicas(rank: int | None, only: str = "") -> dict[str, Any]:
    """Every set of options, in one of two processes, or in one alone."""
    inputs = torch.randn(STEPS, 16, 128, generator=torch.Generator().manual_seed(7))
    calls = _spied() if rank is not None else []
    results = {}
    for name, options in _replicated_options(_mlp()).items():
        if not name.startswith(only):
            continue
        model: nn.Module = _mlp()
        if rank is not None:
            model = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        calls.clear()
        controller = attach(model, optimizer, options)
        _steps(model, optimizer, range(STEPS), inputs, _part(rank, 16))
        results[name] = {
            "weights": _weights(model),
            "state": controller.state_dict(),
            "plan": controller.finish().to_json(),
            "finished": _weights(model),
            "calls": [list(call) for call in calls],
        }
    return results


@pytest.mark.slow
def test_replicas_stay_the_same_and_are_those_of_one_process(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, _trained_replicas)
    alone = _trained_replicas(None)
    assert first.keys() == alone.keys()
    for name in first:
        for key in ("weights", "state", "plan", "finished"):
            assert equal(first[name][key], second[name][key]), (name, key)
        for key in ("weights", "finished"):
            # gradients differ by rounding, and that may decide whether a projection takes one step
            # more, within what the residual's promise leaves open
            assert _farthest(first[name][key], alone[name][key]) <= 1e-3, (name, key)
        assert _ranks(first[name]["plan"]) == _ranks(alone[name]["plan"])
        starts = [item["start"] for item in first[name]["state"]["layers"].values()]
        assert any(start is not None for start in starts), name  # the warm path has been taken


@pytest.mark.slow
def test_each_matrix_is_computed_in_one_process(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path, _trained_replicas, "fixed")
    (one,), (other,) = first.values(), second.values()
    everything = {(256, 128), (128, 256), (200, 128), (10, 200)}
    assert len(one["calls"]) == len(other["calls"]) == STEPS // 2 + 2
    for mine, yours in zip(one["calls"], other["calls"], strict=True):
        assert sorted([*mine, *yours]) == sorted(everything)


# -- FSDP2 -----------------------------------------------------------------------------------------


def _network() -> nn.Module:
    """A convolution and linear layers of which few divide by two; root, and two blocks."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(13 * 64, 101), nn.ReLU(), nn.Linear(101, 128))
    tail = nn.Sequential(nn.ReLU(), nn.Linear(128, 256), nn.ReLU())
    stem = nn.Sequential(nn.Conv2d(3, 13, 3, padding=1), nn.ReLU(), nn.Flatten())
    return _with_gaps(nn.Sequential(*stem, body, tail, nn.Linear(256, 99)))


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.children():
        if isinstance(module, nn.Sequential):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _sharded_options() -> dict[str, TRP]:
    shared: dict[str, Any] = {"every": 2, "nuclear": 0.01, "rank": FixedRank(8)}
    return {
        "fixed, gradient": TRP(**shared),
        "fixed, decoupled": TRP(nuclear_mode="decoupled", **shared),
        "energy": TRP(**{**shared, "rank": Energy(0.98)}),
        "each step": TRP(nuclear_when="step", **shared),
        "does not pay": TRP(overrides={"3.2": FixedRank(70), "5": FixedRank(80)}, **shared),
        "params, descent": TRP(**{**shared, "rank": Budget(params=0.2)}, descent=8),
        "flops": TRP(**{**shared, "rank": Budget(flops=0.3)}),
        "flops, descent": TRP(**{**shared, "rank": Budget(flops=0.3)}, descent=8),
        "plan": TRP(
            plan=make_plan(_network(), FixedRank(8)), every=2, descent=10, nuclear_mode="decoupled"
        ),
    }


def _images() -> Tensor:
    return torch.randn(STEPS, 16, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def _trained_shards(rank: int | None) -> dict[str, Any]:
    images = _images()
    results = {}
    for name, options in _sharded_options().items():
        model = _network()
        if rank is not None:
            model = _sharded(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        x = images[0][:2] if name.startswith(("flops", "does")) else None
        controller = attach(model, optimizer, options, example_inputs=x)
        _steps(model, optimizer, range(STEPS), images, _part(rank, 16))
        results[name] = {"weights": _weights(model), "state": controller.state_dict()}
        with torch.no_grad():  # after which FSDP2 keeps the root's weights whole
            model(images[0][:4])
        results[name]["plan"] = controller.finish().to_json()
        results[name]["finished"] = _weights(model)
        assert rank is None or all(is_sharded(weight) for weight in model.parameters())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("smallest", [10**6, engine.SMALLEST_SIDE], ids=["one_engine", "several"])
def test_shards_make_up_the_weights_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int
) -> None:
    monkeypatch.setattr(engine, "SMALLEST_SIDE", smallest)
    first, second = in_two_processes(tmp_path, _trained_shards)
    alone = _trained_shards(None)
    assert first.keys() == alone.keys()
    for name in first:
        assert equal(first[name], second[name]), name
        # rounding, which differs between processors, may decide which engine takes a matrix, and on
        # one rank on the way down: the other engines for all matrices make up to 4e-5
        close = 1e-5 if smallest == 10**6 and "descent" not in name else 2e-4
        for key in ("weights", "finished"):
            assert _farthest(first[name][key], alone[name][key]) <= close, (name, key)
        ranks = _ranks(first[name]["plan"])
        assert ranks == _ranks(alone[name]["plan"])
        compact = factorize(_loaded(first[name]["finished"]), Plan.from_json(first[name]["plan"]))
        dense = _loaded(first[name]["finished"])
        x = _images()[0]
        with torch.no_grad():
            assert torch.allclose(compact(x), dense(x), rtol=0, atol=1e-5 * float(dense(x).norm()))
        # the root's own layers are among them
        assert (ranks["5"][1] is None) == (name == "does not pay"), name
    weights, finished = (first["does not pay"][key] for key in ("weights", "finished"))
    assert _ranks(first["does not pay"]["plan"])["3.2"][1] is None
    for key in ("3.2.weight", "5.weight"):
        assert torch.equal(weights[key], finished[key])
    assert not torch.equal(weights["3.0.weight"], finished["3.0.weight"])


def _loaded(weights: dict[str, Tensor]) -> nn.Module:
    model = _network()
    model.load_state_dict(weights)
    return model


def _resumed(_: int, at: int) -> dict[str, Any]:
    images = _images()
    options = _sharded_options()["fixed, gradient"]
    half = _part(dist.get_rank(), 16)

    def build(state: Any) -> tuple[nn.Module, torch.optim.Optimizer, Controller]:
        model = _sharded(_network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        trp = state and state["trp"]
        return model, optimizer, attach(model, optimizer, options, state=trp)

    model, optimizer, controller = build(None)
    _steps(model, optimizer, range(at), images, half)
    state = copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "trp": controller.state_dict(),
        }
    )
    results = {}
    for name in ("straight", "resumed"):
        if name == "resumed":
            model, optimizer, controller = build(state)
        _steps(model, optimizer, range(at, STEPS), images, half)
        results[name] = {
            "weights": _weights(model),
            "state": controller.state_dict(),
            "plan": controller.finish().to_json(),
            "finished": _weights(model),
        }
    return results


@pytest.mark.slow
@pytest.mark.parametrize("at", [8, 9])
def test_sharded_training_resumes_bit_for_bit(tmp_path: Path, at: int) -> None:
    """With and without a polar factor that waits for its step."""
    for results in in_two_processes(tmp_path, _resumed, at):
        assert equal(results["straight"], results["resumed"])


def _most_at_once(_: int, when: str) -> list[int]:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    model = _sharded(nn.Sequential(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    options = TRP(rank=FixedRank(4), every=1, nuclear=0.1, nuclear_when=when)
    held: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    matrices = targets.Target.matrices

    def counted(target: Any) -> Tensor:
        counts.append(sum(ref() is not None for ref in held))
        found = matrices(target)
        held.append(weakref.ref(found))
        return found

    targets.Target.matrices = counted  # type: ignore[method-assign]
    attach(model, optimizer, options)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("when", ["projection", "step"])
def test_few_weights_are_whole_at_once(tmp_path: Path, when: str) -> None:
    """A process's own matrix and the one that is being gathered."""
    for counts in in_two_processes(tmp_path, _most_at_once, when):
        assert len(counts) == (16 if when == "projection" else 24)
        assert max(counts) <= 2


# -- failures --------------------------------------------------------------------------------------


def _build(kind: str) -> nn.Module:
    if kind == "sharded":
        return _sharded(_network())
    return nn.parallel.DistributedDataParallel(_mlp())


def _failed(rank: int, kind: str) -> list[str]:
    model = _build(kind)
    controller = Controller(model, TRP(rank=FixedRank(8)))
    project = engine.project

    def failing(jobs: Any) -> Iterator[Any]:
        for number, done in enumerate(project(jobs)):
            if number == (0 if kind == "sharded" else 1):
                raise NumericsError("did not converge")
            yield done

    if rank == 1:
        engine.project = failing
    messages = []
    for verb in (controller.project, controller.finish):
        with pytest.raises(NumericsError) as caught:
            verb()
        messages.append(str(caught.value))
    engine.project = project
    controller.project()  # the processes still understand each other
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_the_owners_failure_is_everyones(tmp_path: Path, kind: str) -> None:
    first, second = in_two_processes(tmp_path, _failed, kind)
    for message in first:
        assert "failed in process 1" in message
    assert second == ["did not converge"] * 2


def _damaged(rank: int, kind: str, value: float) -> list[str]:
    model = _build(kind)
    layer = training.unwrap(model)[3 if kind == "sharded" else 2]
    weight = layer[2].weight if kind == "sharded" else layer.weight
    budget = TRP(rank=Budget(params=0.2), descent=8, every=1)
    controllers = [Controller(model, TRP(rank=FixedRank(8), every=1)), Controller(model, budget)]
    before = _weights(model)
    with torch.no_grad():
        if rank == 1:
            local_part(weight)[-1, -1] = value
    messages = []

    def refused(verb: Callable[[], Any]) -> None:
        with pytest.raises(NumericsError) as caught:
            verb()
        messages.append(str(caught.value))

    for controller in controllers:
        controller.step = 4
        refused(controller.before_step)
        refused(controller.finish)
    refused(controllers[0].project)
    refused(lambda: Controller(model, budget))
    refused(lambda: Controller(model, TRP(rank=Energy(0.9))))
    after = _weights(model)
    assert sum(not torch.equal(after[key], before[key]) for key in after) <= 1
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_damage_in_one_process_is_named_in_all(tmp_path: Path, kind: str, value: float) -> None:
    name = "3.2" if kind == "sharded" else "2"
    for messages in in_two_processes(tmp_path, _damaged, kind, value):
        assert len(messages) == 7
        for message in messages:
            assert f"layer {name!r}: the weight holds" in message
