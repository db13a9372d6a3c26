"""What a GPU must do as the CPU does it. Needs torch and pytest alone, and a GPU.

On a bare machine: `python3 -m pytest -q -p no:cacheprovider -o addopts="" -o filterwarnings=
tests/test_cuda.py`, with src in PYTHONPATH.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp
from promise import keeps_promise, trained_on
from rankprune import engine, lockstep, replay
from rankprune.engine import Job, Projected, project
from rankprune.linalg import Decomposition
from rankprune.schemes import SCHEMES, MatrixShape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPS = torch.finfo(torch.float32).eps
GPU = torch.device("cuda", 0)


@pytest.fixture
def restored() -> Iterator[None]:
    """Leaves the precision of products as it was."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def _weight(*shape: int, seed: int = 0, decay: float = 0.9) -> Tensor:
    """A matrix [rows, cols] on the GPU whose spectrum falls as those of trained layers do."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    small = min(shape)
    u = torch.linalg.qr(torch.randn(rows, small, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(cols, small, generator=generator)).Q
    index = torch.arange(small) / small
    return ((u * decay ** (40 * index)) @ v.mT).to(GPU)


def _job(matrices: Tensor, rank: Any, **options: Any) -> Job:
    return Job(
        shape=MatrixShape(*matrices.shape),
        load=matrices.clone,
        dtype=matrices.dtype,
        device=matrices.device,
        rank=rank,
        **options,
    )


def _only(job: Job) -> Projected:
    ((_, result),) = project([job])
    return result


# -- the promise -----------------------------------------------------------------------------------

LAYERS = [(16, 3, 3, 3), (16, 16, 3, 3), (64, 32, 3, 3), (128, 64, 1, 1), (256, 256, 3, 3)]


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_promise_cold_and_warm(dtype: torch.dtype, scheme: str, share: float) -> None:
    layers: list[tuple[Tensor, int]] = []
    for number, shape in enumerate(LAYERS):
        spec = rp.LayerSpec.of(nn.Conv2d(shape[1], shape[0], shape[2], bias=False))
        assert spec is not None
        kind = SCHEMES[scheme].matrix_shape(spec)
        matrix = _weight(kind.rows, kind.cols, seed=number)[None].to(dtype)
        layers.append((matrix, max(1, int(share * kind.max_rank))))
    cold = dict(project([_job(m, r) for m, r in layers]))
    for index, (matrix, rank) in enumerate(layers):
        keeps_promise(matrix, rank, cold[index].nearest)
    moved = []
    for index, (_, rank) in enumerate(layers):
        nearest = cold[index].nearest
        assert nearest is not None
        moved.append((trained_on(nearest, 0.01), rank))
    jobs = [_job(m, r, start=cold[i].start, polar=True) for i, (m, r) in enumerate(moved)]
    assert all(job.together for job in jobs if job.start is not None)
    for index, result in project(jobs):
        matrix, rank = moved[index]
        keeps_promise(matrix, rank, result.nearest)
        u, s, vh = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)
        kept = s[..., :rank].square().sum() / s.square().sum()
        assert result.energy == pytest.approx(float(kept), abs=1e-4)
        if s[0, rank - 1] > 5 * s[0, rank] and s[0, rank - 1] > 0.02 * s[0, 0]:
            assert result.polar is not None
            close = 1e-2 if dtype == torch.bfloat16 else 2e-3
            expected = u[..., :rank] @ vh[..., :rank, :]
            assert (result.polar.cpu().double() - expected).abs().max() < close


def test_the_warm_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decomposed while the weights move as in training."""
    shapes = [(16, 27), (16, 144), (64, 576), (512, 2304), (300, 100)]
    weights = [_weight(*shape, seed=i)[None] for i, shape in enumerate(shapes)]
    ranks = [min(shape) // 4 for shape in shapes]
    starts: list[Tensor | None] = [None] * len(shapes)
    for step in range(6):
        if step == 1:

            def refuse(*_: Any, **__: Any) -> None:
                raise AssertionError("decomposed")

            monkeypatch.setattr(engine, "Decomposition", refuse)
        jobs = [_job(w, r, start=s) for w, r, s in zip(weights, ranks, starts, strict=True)]
        for index, result in project(jobs):
            keeps_promise(weights[index], ranks[index], result.nearest)
            assert result.nearest is not None
            weights[index] = trained_on(result.nearest, 0.02, seed=step)
            starts[index] = result.start


def test_large_and_mixed() -> None:
    """Factors of more than 256 directions, beside small ones, and stacks."""
    matrices = [_weight(1200, 1024)[None], _weight(24, 30)[None], _weight(64, 64).repeat(3, 1, 1)]
    for rank, matrix in zip((300, 6, 16), matrices, strict=True):
        first = _only(_job(matrix, rank))
        assert first.nearest is not None
        moved = trained_on(first.nearest, 1e-3)
        second = _only(_job(moved, rank, start=first.start))
        keeps_promise(moved, rank, second.nearest)


def test_tf32_does_not_reach_the_engine(restored: None) -> None:
    matrix = _weight(256, 1024)[None]
    first = _only(_job(matrix, 64))
    assert first.nearest is not None
    moved = trained_on(first.nearest, 0.01)
    expected = _only(_job(moved, 64, start=first.start, polar=True))
    for allow in (
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    ):
        torch.set_float32_matmul_precision("highest")
        allow()
        asked = torch.get_float32_matmul_precision()
        cold = _only(_job(matrix, 64))
        keeps_promise(matrix, 64, cold.nearest)
        warm = _only(_job(moved, 64, start=first.start, polar=True))
        keeps_promise(moved, 64, warm.nearest)
        assert warm.nearest is not None
        assert torch.equal(warm.nearest, expected.nearest)
        assert torch.get_float32_matmul_precision() == asked


@pytest.mark.parametrize("size", [24, 128])
def test_rank_deficient_and_zero(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, size, 3, generator=generator)
    low = (left @ right.T).to(GPU)[None]
    zero = torch.zeros_like(low)
    for matrix in (low, zero):
        start = None
        for _ in range(2):
            result = _only(_job(matrix, 6, start=start, polar=True))
            keeps_promise(matrix, 6, result.nearest)
            assert result.energy == pytest.approx(1.0, abs=1e-6)
            assert result.polar is not None
            expected = Decomposition(matrix.cpu().double()).polar(3) if matrix is low else zero
            assert (result.polar.cpu() - expected.cpu()).abs().max() < 1e-2
            start = result.start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_small_ones_come_back_from_the_cpu(dtype: torch.dtype) -> None:
    matrix = _weight(64, 147)[None].to(dtype)
    result = _only(_job(matrix, 16, polar=True))
    for tensor in (result.nearest, result.polar, result.start):
        assert tensor is not None
        assert tensor.device == GPU
    assert result.nearest is not None
    assert result.nearest.dtype == dtype
    if dtype == torch.float32:
        keeps_promise(matrix, 16, result.nearest)


def test_bad_starts() -> None:
    matrix = _weight(96, 200)[None]
    good = _only(_job(matrix, 12)).start
    assert good is not None
    for start in (torch.zeros_like(good), good * torch.nan, torch.randn_like(good), -good.flip(1)):
        keeps_promise(matrix, 12, _only(_job(matrix, 12, start=start)).nearest)


def test_the_same_bits_twice() -> None:
    matrices = [_weight(64, 576)[None], _weight(200, 128)[None]]
    cold = [_only(_job(m, 16, polar=True)) for m in matrices]
    jobs = [
        _job(trained_on(m, 0.01), 16, start=c.start, polar=True)
        for m, c in zip(matrices, cold, strict=True)
    ]
    one, other = dict(project(jobs)), dict(project(jobs))
    for index in one:
        assert one[index].energy == other[index].energy
        for name in ("nearest", "polar", "start"):
            assert torch.equal(getattr(one[index], name), getattr(other[index], name))


def test_a_replay_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some projections of the same shapes a graph does what the calls did."""
    shapes = [(16, 27), (64, 576), (64, 1152), (200, 128), (512, 2304)]
    matrices = [_weight(*shape, seed=i)[None] for i, shape in enumerate(shapes)]
    matrices.append(_weight(64, 64).repeat(3, 1, 1))
    cold = [_only(_job(m, 16, polar=True)) for m in matrices]

    def moved(step: int) -> dict[int, Projected]:
        jobs = [
            _job(trained_on(m, 0.01, seed=step), 16, start=c.start, polar=i % 2 == 0)
            for i, (m, c) in enumerate(zip(matrices, cold, strict=True))
        ]
        return dict(project(jobs))

    with monkeypatch.context() as without:
        without.setattr(lockstep, "replayed", lambda *_, **__: None)
        expected = [moved(step) for step in range(replay.BEFORE + 2)]
    monkeypatch.setattr(replay, "_own", replay._Own())
    found = [moved(step) for step in range(replay.BEFORE + 2)]
    recorded = [k for k, one in replay._own.seen.items() if isinstance(one, replay._Recording)]
    assert {key[0][0] for key in recorded} == {"first", "further"}
    for one, other in zip(expected, found, strict=True):
        for index in one:
            assert one[index].energy == other[index].energy
            for name in ("nearest", "polar", "start"):
                first, second = getattr(one[index], name), getattr(other[index], name)
                assert (first is None and second is None) or torch.equal(first, second)


def test_only_the_latest_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_own", replay._Own())
    matrix = torch.ones(4, device=GPU)
    for size in range(2, 5 + replay.KEPT):
        for _ in range(replay.BEFORE + 1):
            found = replay.replayed(lambda x: x[0] * 2, [matrix[:1].expand(size)], key=size)
        assert found is not None
        assert found.tolist() == [2.0] * size
    assert len(replay._own.seen) == replay.KEPT


def test_a_full_rank_polar_factor() -> None:
    matrix = _weight(48, 100, decay=0.99)[None]
    result = _only(_job(matrix, 48, polar=True))
    assert result.polar is not None
    expected = Decomposition(matrix.cpu()).polar()
    assert (result.polar.cpu() - expected).abs().max() < 1e-3


# -- training --------------------------------------------------------------------------------------


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.third = nn.Conv2d(64, 128, 3, padding=1, stride=2)
        self.head = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Small()


RULES: list[Any] = [rp.Ratio(0.25), rp.Energy(0.9)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_the_controller_does_as_on_the_cpu(rule: Any, scheme: str) -> None:
    """The same plan and nearly the same weights, over a few projections."""
    found = {}
    for device in ("cpu", "cuda"):
        model = _model().to(device)
        options = rp.TRP(scheme=scheme, rank=rule, nuclear=1e-3, guard=False)
        controller = rp.Controller(model, options)
        for step in range(3):
            with torch.no_grad():
                for weight in model.parameters():
                    generator = torch.Generator().manual_seed(step)
                    noise = torch.randn(weight.shape, generator=generator).to(device)
                    weight.add_(noise, alpha=1e-4)
                    weight.grad = torch.zeros_like(weight)
            controller.project()
            controller.regularise()
            gradients = [w.grad.cpu() for w in model.parameters() if w.grad is not None]
            controller.after_step()
        plan = controller.finish()
        weights = [weight.detach().cpu() for weight in model.parameters()]
        found[device] = plan, weights, gradients, controller.energies
    (plan, weights, gradients, energies), (other, *rest) = found["cpu"], found["cuda"]
    assert [(x.name, x.scheme, x.rank) for x in plan.layers] == [
        (x.name, x.scheme, x.rank) for x in other.layers
    ]
    # flat random spectra turn by what rounding moves, so a looser look at single weights
    for one, two in zip(weights, rest[0], strict=True):
        assert (one - two).norm() <= 2e-3 * one.norm()
    for one, two in zip(gradients, rest[1], strict=True):
        assert (one - two).norm() <= 2e-2 * one.norm() + 1e-7
    assert rest[2] == pytest.approx(energies, abs=1e-4)


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, fused=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
]


def _trained(
    make: Callable[[Any], torch.optim.Optimizer], half: bool, steps: int = 8, state: Any = None
) -> tuple[nn.Module, rp.Controller, int]:
    model = _model().to(GPU)
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cuda", enabled=half, init_scale=2.0**14)
    trp = rp.attach(
        model, optimizer, rp.TRP(scheme="channel", rank=rp.Ratio(0.25), every=2, nuclear=1e-4)
    )
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(16, 3, 16, 16, generator=generator).to(GPU)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16, enabled=half):
            loss = model(inputs).float().square().mean()
        if half and step == 3:
            loss = loss * torch.inf  # a step that the scaler skips
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, trp, steps - int(half)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["fused SGD", "fused AdamW", "foreach AdamW"])
def test_attached_training(make: Callable[[Any], torch.optim.Optimizer], half: bool) -> None:
    model, trp, steps = _trained(make, half)
    assert trp.step == steps
    plan = trp.finish()
    assert plan.factorized
    compact = rp.factorize(model, plan)
    inputs = torch.randn(4, 3, 16, 16, device=GPU)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        dense, small = model(inputs), compact(inputs)
    assert all(parameter.is_cuda for parameter in compact.parameters())
    assert (dense - small).abs().max() <= 1e-4 * dense.abs().max()


def test_training_twice_is_the_same() -> None:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        one, other = (_trained(OPTIMIZERS[0], False)[0] for _ in range(2))
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_state_resumes_from_the_cpu() -> None:
    """Saved starts and polar factors go to where the weights are."""
    model, trp, _ = _trained(OPTIMIZERS[0], False, steps=5)
    twin = copy.deepcopy(model)
    state = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cpu(), trp.state_dict())
    resumed = rp.attach(twin, OPTIMIZERS[0](twin.parameters()), replace(trp.options), state=state)
    trp.detach()
    trp.project()
    resumed.project()
    for first, second in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(first, second)


# -- several processes, of which there is one ------------------------------------------------------


@pytest.fixture
def nccl() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.cuda.set_device(GPU)
    torch.distributed.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=GPU
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_wrapped_models(nccl: None, kind: str) -> None:
    def train(model: nn.Module) -> tuple[rp.Plan, list[Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        options = rp.TRP(scheme="channel", rank=rp.Ratio(0.25), every=2, nuclear=1e-4)
        trp = rp.attach(model, optimizer, options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            inputs = torch.randn(16, 3, 16, 16, generator=generator).to(GPU)
            model(inputs).square().mean().backward()
            optimizer.step()
        plan = trp.finish()
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        return plan, [weight.detach().clone() for weight in whole]

    expected_plan, expected = train(_model().to(GPU))
    model = _model().to(GPU)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, device_ids=[0])
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    plan, weights = train(model)
    assert [(x.name, x.rank) for x in plan.layers] == [
        (x.name, x.rank) for x in expected_plan.layers
    ]
    for one, two in zip(weights, expected, strict=True):
        assert (one - two).norm() <= 1e-3 * two.norm()


def test_what_waits_for_the_device_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_own", replay._Own())
    matrix = torch.ones(4, device=GPU)
    found = [replay.replayed(lambda x: x[0].sum().item(), [matrix], key=0) for _ in range(6)]
    assert found == [None] * 6
    assert (matrix + 1).tolist() == [2.0] * 4
    torch.cuda.empty_cache()  # which fails where the allocator takes the capture as going on
