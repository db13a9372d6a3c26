"""Moments against plain sums, centring and shrinkage against numpy's and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import oas

from rankprune.moments import RIDGE, Metric, Moment, Rows


def of(values: torch.Tensor, *, centred: bool, roots: torch.Tensor | None = None) -> Moment:
    """Moments of [g, n, D], added in parts of five."""
    moment = Moment(values.shape[0], values.shape[2], weighted=roots is not None)
    roots = torch.ones(values.shape[:2]) if roots is None else roots
    for part, own in zip(values.split(5, 1), roots.split(5, 1), strict=True):
        moment.update(Rows(part * own.unsqueeze(-1), own))
    moment.centred = centred
    return moment


@pytest.mark.parametrize("samples", [6, 12, 13, 400])
def test_centred_metric_is_the_covariance(samples: int) -> None:
    x = torch.randn(2, samples, 12, dtype=torch.float64) + 3
    matrix = of(x, centred=True).metric(shrinkage=RIDGE).matrix()
    for group in range(2):
        expected = torch.from_numpy(np.cov(x[group].numpy().T, ddof=0))
        torch.testing.assert_close(matrix[group], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of(x, centred=False).mean(), x.mean(1))


@pytest.mark.parametrize("samples", [6, 12, 400])
def test_weights_count_as_repetitions(samples: int) -> None:
    x = torch.randn(1, samples, 8, dtype=torch.float64) + 1
    times = torch.randint(1, 4, (1, samples))
    repeated = x.repeat_interleave(times[0], dim=1)
    weighted = of(x, centred=True, roots=times.double().sqrt())
    torch.testing.assert_close(weighted.mean(), repeated.mean(1))
    matrix = weighted.metric(shrinkage=RIDGE).matrix()[0] * samples / repeated.shape[1]
    expected = torch.from_numpy(np.cov(repeated[0].numpy().T, ddof=0))
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [3, 7, 30, 500])
def test_shrinkage_is_scikit_learns(samples: int) -> None:
    """OAS of a sample covariance, kept as vectors or as a matrix."""
    x = torch.randn(1, samples, 10, dtype=torch.float64) * torch.logspace(0, -1, 10).double()
    metric = of(x, centred=False).metric()
    expected, share = oas(x[0].numpy(), assume_centered=True)
    assert share > RIDGE
    torch.testing.assert_close(metric.matrix()[0], torch.from_numpy(expected))
    weighed = metric.weigh(torch.eye(10).double().unsqueeze(0))
    torch.testing.assert_close(weighed @ weighed.mT, metric.matrix())


@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_inputs_that_never_change(constant: float) -> None:
    for samples in (1, 4, 40):
        metric = of(torch.full((1, samples, 8), constant), centred=True).metric()
        assert torch.isfinite(metric.matrix()).all()
        assert torch.isfinite(metric.weigh(torch.ones(1, 3, 8).double())).all()


def test_one_sample_is_not_centred_away() -> None:
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    trace = of(x, centred=True).metric().matrix()[0].trace()
    torch.testing.assert_close(trace, x.square().sum(), rtol=1e-4, atol=0)


def test_indefinite_moments() -> None:
    """Rounding may leave a sum of squares with negative eigenvalues, where Cholesky fails."""
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-3]).double()).unsqueeze(0)
    weighed = Metric.of_gram(gram).weigh(torch.eye(3).double().unsqueeze(0))
    expected = torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()).unsqueeze(0)
    torch.testing.assert_close(weighed @ weighed.mT, expected, rtol=0, atol=1e-4)


def test_bounded_memory() -> None:
    moment = Moment(1, 16)
    for _ in range(100):
        moment.update(torch.randn(1, 5, 16))
        held = sum(rows.values.numel() for rows in moment._kept)
        held += 0 if moment._gram is None else moment._gram.numel()
        assert held <= 16 * 16
    assert moment.count == 500


def test_precisions_mix() -> None:
    """Inputs that fp32 cannot square come in fp64, before or after others, few or many."""
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    x[:, :10] *= 1e-25
    expected = x.mT @ x / 40
    for sizes in ([10, 30], [3, 7, 30], [10, 3, 27], [10, 2, 2, 26]):
        for parts in (x.split(sizes, 1), x.flip(1).split(sizes[::-1], 1)):
            moment = Moment(1, 8)
            for part in parts:
                small = part.abs().max() < 1e-12
                moment.update(part if small else part.float())
            torch.testing.assert_close(moment.second_moment(), expected, rtol=1e-5, atol=1e-7)
