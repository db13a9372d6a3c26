"""Rank rules, from spectra whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from rankprune import (
    EVBMF,
    Budget,
    Energy,
    FixedRank,
    MatrixShape,
    RankRule,
    Ratio,
    Spectrum,
    StableRank,
    Threshold,
    make_plan,
)
from rankprune.errors import ConfigError

INF, NAN = math.inf, math.nan


def _spectrum(*values: list[float]) -> Spectrum:
    width = len(values[0])
    return Spectrum(
        torch.tensor(values, dtype=torch.float64), MatrixShape(len(values), width, 2 * width)
    )


THREE = _spectrum([3.0, 2.0, 1.0])  # energies 9/14, 13/14, 1
FLAT = _spectrum([1.0] * 10)
ZERO = _spectrum([0.0] * 5)
GROUPS = _spectrum([4.0, 0.0, 0.0], [1.0, 1.0, 1.0])  # pooled squares 17, 1, 1

ANSWERS: list[tuple[RankRule, Spectrum, int]] = [
    (Energy(9 / 14), THREE, 1),
    (Energy(9 / 14 + 1e-9), THREE, 2),
    (Energy(13 / 14), THREE, 2),
    (Energy(1.0), THREE, 3),
    (Energy(1e-9), THREE, 1),
    (Energy(0.5), FLAT, 5),
    (Energy(0.51), FLAT, 6),
    (Energy(1.0), ZERO, 1),
    (Energy(17 / 19), GROUPS, 1),
    (Energy(0.9), GROUPS, 2),
    (Threshold(0.0), THREE, 3),
    (Threshold(1.0), THREE, 2),
    (Threshold(2.999), THREE, 1),
    (Threshold(99), THREE, 1),
    (Threshold(0.4, relative=True), THREE, 2),
    (Threshold(0.2, relative=True), THREE, 3),
    (Threshold(0.0), ZERO, 1),
    (Threshold(0.5), GROUPS, 3),
    (Threshold(2.0), GROUPS, 1),
    (Threshold(0.5, relative=True), GROUPS, 3),
    (Ratio(1), FLAT, 10),
    (Ratio(0.5), FLAT, 5),
    (Ratio(0.44), FLAT, 4),
    (Ratio(0.46), FLAT, 5),
    (Ratio(0.001), FLAT, 1),
    (FixedRank(2), THREE, 2),
    (FixedRank(99), THREE, 3),
    (StableRank(), FLAT, 10),
    (StableRank(0.5), FLAT, 5),
    (StableRank(), THREE, 2),  # 14/9, rounded up
    (StableRank(99), THREE, 3),
    (StableRank(), ZERO, 1),
    (StableRank(), GROUPS, 3),
    (EVBMF(), ZERO, 1),
]


@pytest.mark.parametrize(("rule", "spectrum", "rank"), ANSWERS, ids=lambda v: str(v)[:40])
def test_known_answers(rule: RankRule, spectrum: Spectrum, rank: int) -> None:
    assert rule.select(spectrum) == rank


RULES: list[RankRule] = [
    Energy(0.9),
    Energy(1.0),
    Threshold(0.5),
    Threshold(0.1, relative=True),
    Ratio(0.3),
    FixedRank(4),
    StableRank(),
    StableRank(3.0),
    EVBMF(),
    EVBMF(weaken=0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=50)
@given(
    batch=st.integers(1, 3),
    small=st.integers(1, 12),
    large=st.integers(0, 12),
    scale=st.sampled_from((0.0, 1e-12, 1.0, 1e12)),
    seed=st.integers(0, 999),
)
def test_ranks_are_always_possible(
    rule: RankRule, batch: int, small: int, large: int, scale: float, seed: int
) -> None:
    """Between 1 and the largest rank, whatever the spectrum."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.rand(batch, small, generator=generator).double()
    spectrum = Spectrum(
        values.sort(1, descending=True).values, MatrixShape(batch, small, small + large)
    )
    rank = rule.select(spectrum)
    assert isinstance(rank, int)
    assert 1 <= rank <= small


def _falling(batch: int, small: int, decay: float, seed: int) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(batch, small, generator=generator).double()
    values = values.sort(1, descending=True).values * decay ** torch.arange(small)
    return Spectrum(values, MatrixShape(batch, small, 2 * small))


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    small=st.integers(1, 16),
    decay=st.floats(0.2, 1.0),
    seed=st.integers(0, 999),
)
def test_rules_read_no_more_than_they_say(
    rule: RankRule, batch: int, small: int, decay: float, seed: int
) -> None:
    """The leading values and the total give the same rank, or one that says they are too few."""
    spectrum = _falling(batch, small, decay, seed)
    expected = rule.select(spectrum)
    if rule.reads == "shape":
        for values in (torch.empty(batch, 0), torch.full((batch, 2), NAN)):
            assert rule.select(Spectrum(values, spectrum.shape)) == expected
    elif rule.reads == "leading":
        total = spectrum.values.square().sum(1)
        for count in range(1, small + 1):
            leading = Spectrum(spectrum.values[:, :count], spectrum.shape, total)
            found = rule.select(leading)
            assert found == expected if expected < count else found >= count
            assert isinstance(found, int)
            assert 1 <= found <= small
    else:
        assert rule.reads == "all"


@pytest.mark.parametrize("size", [1e200, 1e-200])
@pytest.mark.parametrize(
    "rule", [Energy(0.9), EVBMF(), StableRank(), Threshold(0.5, relative=True)]
)
def test_values_whose_squares_fp64_does_not_hold(rule: RankRule, size: float) -> None:
    for values in ([3.0, 2.0, 1.0], [9.0, 8.0, 7.0, 1e-3, 1e-3, 1e-3]):
        sized = _spectrum([size * value for value in values])
        assert rule.select(sized) == rule.select(_spectrum(values))


def test_leading_values_have_their_share_of_the_total() -> None:
    leading = Spectrum(GROUPS.values[:, :2], GROUPS.shape, GROUPS.values.square().sum(1))
    assert torch.equal(leading.squares()[1], torch.tensor([16.0, 3.0], dtype=torch.float64))
    assert torch.equal(leading.energy(), GROUPS.energy()[:2])
    shares = [
        squares / totals.unsqueeze(1)
        for squares, totals in map(Spectrum.squares, (leading, GROUPS))
    ]
    assert torch.allclose(shares[0], shares[1][:, :2], rtol=1e-15)
    assert leading.energy().tolist() == pytest.approx([17 / 19, 18 / 19])
    nothing = Spectrum(ZERO.values[:, :2], ZERO.shape, torch.zeros(1, dtype=torch.float64))
    assert nothing.energy().tolist() == [1.0, 1.0]
    # a total that rounding has made too small is no share above one
    short = Spectrum(THREE.values[:, :2], THREE.shape, torch.tensor([12.9], dtype=torch.float64))
    assert short.energy().tolist() == [pytest.approx(9 / 12.9), 1.0]


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_energy_is_the_smallest_rank_that_keeps_it(values: list[float], keep: float) -> None:
    ordered = sorted(values, reverse=True)
    rank = Energy(keep).select(_spectrum(ordered))
    squares = np.square(ordered)
    assert squares[:rank].sum() >= keep * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() < keep * squares.sum()


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40), (30, 300)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_evbmf_recovers_a_planted_rank(shape: tuple[int, int], rank: int) -> None:
    """Low rank plus white noise, of which the rule is told nothing."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(rank)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, cols, generator=generator
    )
    noise = torch.randn(rows, cols, generator=generator)
    for level in (0.1, 0.5, 1.0):
        values = torch.linalg.svdvals((signal + level * noise).double()).unsqueeze(0)
        assert EVBMF().select(Spectrum(values, MatrixShape(1, rows, cols))) == rank


def _evbmf_oracle(values: NDArray[np.float64], rows: int, cols: int) -> int:
    """Theorem 2 and corollary 1 of Nakajima et al. 2015, by loops over a fine grid of variances."""
    small, large = min(rows, cols), max(rows, cols)
    alpha = small / large
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    most = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    upper = (values**2).sum() / (small * large)
    lower = max(values[most] ** 2 / (large * x_bar), (values[most:] ** 2).mean() / large)
    best, answer = math.inf, 0
    for variance in np.geomspace(lower, upper, 3000):
        energy, rank = 0.0, 0
        for x in values**2 / (large * variance):
            energy += x - math.log(x)
            if x > x_bar:
                b = x - (1 + alpha)
                tau = (b + math.sqrt(b * b - 4 * alpha)) / 2
                energy += math.log(tau + 1) + alpha * math.log(tau / alpha + 1) - tau
                rank += 1
        if energy < best:
            best, answer = energy, rank
    return answer


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
def test_evbmf_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    """Also where the signal is about as weak as the noise."""
    rows, cols = shape
    found = set()
    for level in np.linspace(0.5, 3.0, 12):
        signal = torch.randn(rows, 6) @ torch.diag(torch.linspace(1, 0.1, 6)) @ torch.randn(6, cols)
        values = torch.linalg.svdvals((signal + level * torch.randn(rows, cols)).double())
        expected = _evbmf_oracle(values.numpy(), rows, cols)
        spectrum = Spectrum(values.unsqueeze(0), MatrixShape(1, rows, cols))
        assert EVBMF().select(spectrum) == max(1, expected)
        found.add(expected)
    assert len(found) >= 3


def test_evbmf_finds_nothing_in_noise() -> None:
    values = torch.linalg.svdvals(torch.randn(80, 120).double()).unsqueeze(0)
    spectrum = Spectrum(values, MatrixShape(1, 80, 120))
    assert EVBMF().select(spectrum) == 1
    # a share of what is called noise is kept nonetheless
    assert EVBMF(weaken=0.25).select(spectrum) == 20


def test_evbmf_takes_the_largest_of_the_groups() -> None:
    def values(rank: int) -> torch.Tensor:
        matrix = 3 * torch.randn(50, rank) @ torch.randn(rank, 70) + 0.3 * torch.randn(50, 70)
        return torch.linalg.svdvals(matrix.double())

    spectrum = Spectrum(torch.stack([values(2), values(7), values(4)]), MatrixShape(3, 50, 70))
    assert EVBMF().select(spectrum) == 7


def test_evbmf_does_not_depend_on_the_scale() -> None:
    matrix = torch.randn(40, 5) @ torch.randn(5, 60) + 0.5 * torch.randn(40, 60)
    values = torch.linalg.svdvals(matrix.double()).unsqueeze(0)
    for scale in (1e-12, 1.0, 1e12):
        assert EVBMF().select(Spectrum(scale * values, MatrixShape(1, 40, 60))) == 5


REFUSED: list[tuple[type[RankRule], Any]] = [
    *((Energy, value) for value in (0, -0.1, 1.01, NAN, INF, "0.9", None, True)),
    *((Threshold, value) for value in (-1e-9, NAN, INF, "1", None, True)),
    *((Ratio, value) for value in (0, -0.5, 1.5, NAN, "half", None, True)),
    *((FixedRank, value) for value in (0, -1, 1.5, NAN, "4", None, True)),
    *((StableRank, value) for value in (0, -1.0, NAN, INF, "1", None, True)),
    *((EVBMF, value) for value in (-0.1, 1.0, NAN, "0", None, True)),
]


@pytest.mark.parametrize(("rule", "value"), REFUSED, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_impossible_values_are_named(rule: Any, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        rule(value)
    assert rule.__name__ in str(caught.value)
    assert repr(value) in str(caught.value)


def test_relative_threshold_is_below_one() -> None:
    with pytest.raises(ConfigError, match="relative needs value < 1"):
        Threshold(1.0, relative=True)
    assert Threshold(1.0).select(THREE) == 2


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_values(rule: RankRule) -> None:
    assert eval(repr(rule)) == rule
    assert hash(rule) == hash(eval(repr(rule)))
    with pytest.raises(AttributeError):
        rule.rank = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("multiple_of", "ranks"), [(1, (5, 7)), (4, (8, 8)), (8, (8, 8)), (16, (16, 10))]
)
def test_ranks_are_rounded_up_to_multiples(multiple_of: int, ranks: tuple[int, int]) -> None:
    """At most to the largest rank."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    overrides = {"0": FixedRank(5), "1": FixedRank(7)}
    plan = make_plan(model, Ratio(1), overrides=overrides, guard=False, multiple_of=multiple_of)
    assert tuple(layer.rank for layer in plan.layers) == ranks


@pytest.mark.parametrize("scheme", ["decoupled", "depthwise"])
def test_a_rank_of_as_many_channels_as_the_layer_is_not_rounded(scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    for rank in (Ratio(0.3), Budget(params=0.5)):
        plan = make_plan(model, rank, scheme=scheme, guard=False, multiple_of=16)
        assert plan["0"].rank == 3


def test_groups_share_one_rank_by_pooled_energy() -> None:
    """One group of rank 1 with nearly all the energy, one of rank 4 with little."""
    layer = nn.Conv2d(16, 16, 3, groups=2, bias=False)
    with torch.no_grad():
        weight = layer.weight.view(2, 8, 72)
        weight[0] = 100 * torch.ones(8, 1) @ torch.ones(1, 72)
        weight[1] = torch.randn(8, 4) @ torch.randn(4, 72)
    model = nn.Sequential(layer)
    options: dict[str, Any] = {"scheme": "channel", "guard": False}
    assert make_plan(model, Energy(0.99), **options)["0"].rank == 1
    assert make_plan(model, Threshold(1e-3), **options)["0"].rank == 4
