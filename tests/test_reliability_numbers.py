"""Hostile numbers: the right answer, or an error that names the layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import rankprune as rp
from conftest import Trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), "linear", (24,)),
    "channel": (lambda: nn.Conv2d(6, 16, 3), "channel", (6, 5, 5)),
    "spatial": (lambda: nn.Conv2d(6, 8, 3), "spatial", (6, 5, 5)),
    "decoupled": (lambda: nn.Conv2d(12, 4, 3), "decoupled", (12, 5, 5)),
    "by inputs": (lambda: nn.Conv2d(4, 12, 3), "depthwise", (4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, groups=2), "channel", (12, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 5, groups=8), "spatial", (8, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), "spatial", (6, 5, 5)),
    "1 × n": (lambda: nn.Linear(24, 1), "linear", (24,)),
    "n × 1": (lambda: nn.Linear(1, 24), "linear", (1,)),
    "1 × 1": (lambda: nn.Linear(1, 1), "linear", (1,)),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _spectrum(shape: tuple[int, ...], values: Callable[[int], Tensor]) -> Tensor:
    """A weight whose plain matrix [out, rest] has these singular values."""
    rows, cols = shape[0], max(1, int(np.prod(shape[1:])))
    u, _, v = torch.linalg.svd(_random((rows, cols)), full_matrices=False)
    return ((u * values(min(rows, cols))) @ v).reshape(shape)


WEIGHTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zeros": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "one number": lambda shape: torch.zeros(shape, dtype=torch.float64).index_put(
        tuple(torch.tensor([0]) for _ in shape), torch.tensor(1.0, dtype=torch.float64)
    ),
    "all alike": lambda shape: torch.full(shape, 0.3, dtype=torch.float64),
    "rank-deficient": lambda shape: _spectrum(shape, lambda n: (torch.arange(n) < 2).double()),
    "condition 1e12": lambda shape: _spectrum(
        shape, lambda n: torch.logspace(0, -12, n, dtype=torch.float64)
    ),
    "equal singular values": lambda shape: _spectrum(shape, lambda n: torch.ones(n).double()),
    "tiny": lambda shape: _random(shape) * 1e-30,
    "huge": lambda shape: _random(shape) * 1e30,
    "largest": lambda shape: _random(shape).sign() * 3e38,
    "denormal in fp32": lambda shape: _random(shape) * 1e-41,
    "denormal in fp64": lambda shape: _random(shape) * 1e-310,
    "beyond the squares of fp64": lambda shape: _random(shape) * 1e200,
    "1e18 beside 1e-18": lambda shape: _random(shape) * 10.0 ** (18 * _random(shape, 1).sign()),
    "NaN": lambda shape: _random(shape).index_fill(0, torch.tensor([0]), float("nan")),
    "Inf": lambda shape: _random(shape).index_fill(0, torch.tensor([0]), float("inf")),
    "-Inf": lambda shape: _random(shape).index_fill(0, torch.tensor([0]), float("-inf")),
}


class Network(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def _network(name: str, kind: str, dtype: torch.dtype) -> Network:
    build, _, _ = LAYERS[name]
    model = Network(build()).to(dtype)
    weight: Any = model.first.weight
    with torch.no_grad():
        weight.copy_(WEIGHTS[kind](tuple(weight.shape)))
    return model


def _optimum(matrix: Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Norms of the matrices and of what the best of that rank misses, by NumPy."""
    values = matrix.double().numpy()
    largest = np.abs(values).max() or 1.0
    sigma = np.linalg.svd(values / largest, compute_uv=False) * largest
    with np.errstate(over="ignore"):
        norm = largest * np.linalg.norm(sigma / largest, axis=-1)
        missed = largest * np.linalg.norm(sigma[..., rank:] / largest, axis=-1)
    return norm, missed


def _norm(matrix: Tensor) -> np.ndarray:
    values = matrix.double().numpy()
    largest = np.abs(values).max() or 1.0
    return largest * np.linalg.norm(values / largest, axis=(-2, -1))


def _multiplied(model: nn.Module, plan: rp.Plan) -> Tensor:
    """The weight that the factors stand for, in fp64."""
    (layer,) = plan.factorized
    assert layer.spec is not None
    scheme = rp.SCHEMES[str(layer.scheme)]
    dense = rp.defactorize(model.double())
    return scheme.to_matrix(layer.spec, dense.first.weight.detach())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind: str, trials: Trials) -> None:
    """Weights of every kind in every layer and precision: nearest low rank, or an error."""
    for name, (_, scheme, _) in LAYERS.items():
        for dtype in DTYPES:
            model = _network(name, kind, dtype)
            weight: Tensor = model.first.weight  # type: ignore[assignment]
            if _is_rank_one(model, scheme, trials):
                continue
            for rule in (rp.FixedRank(1), rp.Ratio(0.4), rp.Energy(0.9), rp.StableRank()):
                with trials.one():
                    if not torch.isfinite(weight).all():
                        with pytest.raises(rp.NumericsError, match="layer 'first'"):
                            rp.make_plan(model, rule, scheme=scheme, guard=False)
                        continue
                    plan = rp.make_plan(model, rule, scheme=scheme, guard=False)
                    _check(model, plan, weight.detach(), rule)


def _is_rank_one(model: nn.Module, scheme: str, trials: Trials) -> bool:
    """Whether the layer's matrix has one row or column: it stays dense, whatever it holds."""
    spec = rp.LayerSpec.of(model.first)  # type: ignore[arg-type]
    assert spec is not None
    if rp.SCHEMES[scheme].refuses(spec) is None:
        return False
    with trials.one():
        (layer,) = rp.make_plan(model, rp.FixedRank(1), scheme=scheme, guard=False).layers
        assert layer.dense
        assert "rank 1 already" in layer.reason
    return True


def _check(model: nn.Module, plan: rp.Plan, weight: Tensor, rule: rp.RankRule) -> None:
    (layer,) = plan.factorized
    assert layer.spec is not None
    assert layer.rank is not None
    matrix = rp.SCHEMES[str(layer.scheme)].to_matrix(layer.spec, weight)
    norm, optimum = _optimum(matrix, layer.rank)
    if isinstance(rule, rp.Energy) and norm.max():
        lost = np.linalg.norm(optimum / norm.max()) / np.linalg.norm(norm / norm.max())
        assert lost**2 <= 0.1 * (1 + 1e-6), "too low a rank for that energy"
    if norm.max() > torch.finfo(weight.dtype).max:
        with pytest.raises(rp.NumericsError, match="layer 'first': its factors are out of"):
            rp.factorize(model, plan)
        return
    compact = rp.factorize(model, plan)
    assert all(torch.isfinite(p).all() for p in compact.parameters())
    missed = _norm(matrix.double() - _multiplied(compact, plan))
    info = torch.finfo(weight.dtype)
    # a product of two rounded factors; numbers that the type has no digits for
    rounding = 32 * info.eps * norm + np.sqrt(matrix[0].numel()) * info.tiny
    assert (missed <= 1.0001 * optimum + rounding).all(), (layer.rank, missed, optimum, norm)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_training(kind: str, trials: Trials) -> None:
    """TRP with nuclear regularisation on such weights: low rank at the end, or an error."""
    for name, (_, scheme, shape) in LAYERS.items():
        for dtype in (torch.float64, torch.float32):
            model = _network(name, kind, dtype)
            if _is_rank_one(model, scheme, trials):
                continue
            before = [p.detach().clone() for p in model.parameters()]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            options = rp.TRP(rank=rp.Ratio(0.4), scheme=scheme, every=2, nuclear=0.1, guard=False)
            with trials.one():
                if not all(torch.isfinite(p).all() for p in before):
                    with pytest.raises(rp.NumericsError, match="layer 'first'"):
                        rp.attach(model, optimizer, options)
                    assert all(
                        torch.equal(p, old) or torch.isnan(old).any()
                        for p, old in zip(model.parameters(), before, strict=True)
                    )
                    continue
                if kind == "largest" and dtype == torch.float32:
                    # no weight holds the numbers of the nearest matrices
                    with pytest.raises(rp.NumericsError, match="layer 'first'"):
                        _train(model, optimizer, options, torch.zeros(2, *shape, dtype=dtype))
                    continue
                plan = _train(model, optimizer, options, torch.zeros(2, *shape, dtype=dtype))
                projected: Any = model.first.weight
                assert torch.isfinite(projected).all()
                (layer,) = plan.factorized
                assert layer.spec is not None
                matrix = rp.SCHEMES[str(layer.scheme)].to_matrix(layer.spec, projected.detach())
                norm, above = _optimum(matrix, layer.rank or 0)
                info = torch.finfo(dtype)
                assert (above <= 8 * info.eps * norm + 8 * info.tiny).all(), (name, dtype)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: rp.TRP, x: Tensor
) -> rp.Plan:
    trp = rp.attach(model, optimizer, options)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        gradient: Any = model.first.weight.grad  # type: ignore[union-attr]
        assert torch.isfinite(gradient).all()
    return trp.finish()


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "one direction": lambda x: x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1)).expand_as(x),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "denormal": lambda x: x * 1e-41,
    "1e12 beside 1": lambda x: x * torch.where(torch.rand_like(x[:1]) < 0.5, 1e12, 1.0),
    "NaN": lambda x: x.index_fill(0, torch.tensor([0]), float("nan")),
    "Inf": lambda x: x.index_fill(0, torch.tensor([0]), float("inf")),
    "one vector": lambda x: x[:1],
}


@pytest.mark.parametrize("kind", INPUTS)
def test_calibration(kind: str, trials: Trials) -> None:
    """Inputs of every kind to calibrate with: no more error than plain SVD's, or an error."""
    for name, (_, scheme, shape) in LAYERS.items():
        if name == "transposed":
            continue  # is not calibrated
        for dtype in (torch.float64, torch.float32):
            model = _network(name, "condition 1e12", dtype)
            nn.init.zeros_(model.first.bias)  # type: ignore[arg-type]
            torch.manual_seed(0)
            x = INPUTS[kind](torch.randn(64, *shape)).to(dtype)
            with trials.one():
                if not torch.isfinite(x).all():
                    with pytest.raises(rp.NumericsError, match="layer 'first'"):
                        rp.calibrate(model, [x])
                    continue
                stats = rp.calibrate(model, [x])
                plan = rp.make_plan(model, rp.Ratio(0.3), scheme=scheme, stats=stats, guard=False)
                aware = rp.factorize(model, plan, stats=stats)
                plain = rp.factorize(model, plan)
                errors = [_error(model, compact, x) for compact in (aware, plain)]
                # other schemes' factors are not the very best where inputs correlate
                slack = 1.01 if name in ("linear", "channel", "grouped", "n × 1") else 1.05
                assert errors[0] <= slack * errors[1] + 1e-4, (name, dtype, errors)


@torch.no_grad()
def _error(model: nn.Module, compact: nn.Module, x: Tensor) -> float:
    """Share of the output that is wrong."""
    outputs = [rp.defactorize(network).double()(x.double()) for network in (model, compact)]
    scale = outputs[0].norm()
    return float((outputs[1] - outputs[0]).norm() / scale) if scale else 0.0


def _nothing() -> list[Tensor]:
    return []


def test_nothing_to_work_with(trials: Trials) -> None:
    """Empty layers, no batches, no inputs: left dense with a reason, or an error."""
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 8), nn.Linear(8, 0), nn.Linear(8, 8))
    with trials.one():
        plan = rp.make_plan(model, rp.FixedRank(2))
        assert {layer.name: layer.reason for layer in plan.layers if layer.dense} == {
            "0": "the weight is empty",
            "1": "the weight is empty",
        }
        assert torch.equal(
            rp.factorize(model, plan)[0](torch.zeros(1, 0)), model[0](torch.zeros(1, 0))
        )
    network = nn.Sequential(nn.Linear(8, 8))
    for call in (
        lambda: rp.calibrate(network, _nothing()),
        lambda: rp.calibrate(network, iter(())),
        lambda: rp.calibrate(network, [[]]),
        lambda: rp.recalibrate_bn(nn.Sequential(nn.BatchNorm1d(8)), _nothing()),
        lambda: rp.make_plan(nn.Sequential(), rp.FixedRank(1)),
        lambda: rp.make_plan(nn.Sequential(nn.ReLU()), rp.FixedRank(1)),
        lambda: rp.profile(network, torch.zeros(0)),
        lambda: rp.make_plan(network, rp.Budget(flops=0.5), example_inputs=torch.zeros(3)),
    ):
        with trials.one(), pytest.raises(rp.RankPruneError):
            call()
    for batch in (torch.zeros(0, 8), torch.zeros(1, 8)):
        with trials.one():
            stats = rp.calibrate(network, [batch])
            compact = rp.factorize(network, rp.make_plan(network, rp.FixedRank(2)), stats=stats)
            assert all(torch.isfinite(p).all() for p in compact.parameters())


def test_one_class(tmp_path: Path, trials: Trials) -> None:
    """A data set of one class trains to an accuracy of 1."""
    from rankprune.recipes.config import TrainConfig
    from rankprune.recipes.run import run

    for part in ("train", "val"):
        folder = tmp_path / "data" / part / "only"
        folder.mkdir(parents=True)
        for index in range(16):
            Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
    config = TrainConfig(
        data=f"imagefolder:{tmp_path / 'data'}",
        model="digits_cnn",
        image_size=16,
        flops=0.6,
        epochs=1,
        batch_size=4,
    )
    with trials.one():
        report = run(config, tmp_path / "run")
        assert report.compact.accuracy == 1


FAILING = ["svd", "svdvals", "eigh", "eigvalsh"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_failures(dtype: torch.dtype, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decomposition that does not converge, at its first to tenth use: the layer is named."""
    x = torch.randn(64, 48).to(dtype)

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48)).to(dtype)

    def plan() -> None:
        rp.make_plan(model(), rp.Energy(0.9))

    def aware() -> None:
        network = model()
        stats = rp.calibrate(network, [x])
        compact_plan = rp.make_plan(network, rp.Budget(params=0.5), stats=stats)
        rp.factorize(network, compact_plan, stats=stats)

    def decompose() -> None:
        network = model()
        rp.factorize(network, rp.make_plan(network, rp.Ratio(0.3)))

    def train() -> None:
        network = model()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        options = rp.TRP(rank=rp.FixedRank(8), every=1, nuclear=0.01)
        trp = rp.attach(network, optimizer, options)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        trp.finish()

    for verb in (plan, aware, decompose, train):
        with monkeypatch.context() as patch:
            uses = _fail(patch, -1)
            verb()
        assert uses
        for nth in range(min(len(uses), 10)):
            with monkeypatch.context() as patch, trials.one():
                _fail(patch, nth)
                with pytest.raises(rp.NumericsError, match=r"layer '[02]'.*did not converge"):
                    verb()


def _fail(patch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Let the nth decomposition fail; returns those that were asked for."""
    uses: list[str] = []

    def replace(name: str) -> None:
        original = getattr(torch.linalg, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            uses.append(name)
            if len(uses) == nth + 1:
                raise torch.linalg.LinAlgError("did not converge")
            return original(*args, **kwargs)

        patch.setattr(torch.linalg, name, call)

    for name in FAILING:
        replace(name)
    return uses
