"""The dense network, trained on: what every other row is compared with."""

from __future__ import annotations

from case import Case, Method, Result
from loop import train


def labels(case: Case) -> Result:
    model = case.dense()
    if case.training.epochs:
        train(model, case.data, case.training)
    return Result(model)


def distilled(case: Case) -> Result:
    """Taught by its former self: how much of a distilled row's accuracy is the loss alone."""
    model = case.dense()
    train(model, case.data, case.training, loss=case.taught())
    return Result(model)


METHODS: dict[str, Method] = {"dense": labels, "dense-distilled": distilled}
