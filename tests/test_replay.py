"""What is recorded, and for how long; test_cuda.py has what a recording does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankprune as rp
from rankprune import replay


class _Graph:
    def __init__(self, compute: Any, places: list[Tensor], result: Tensor) -> None:
        self.compute, self.places, self.result = compute, places, result

    def replay(self) -> None:
        self.result.copy_(self.compute(self.places))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors with which something was recorded; no GPU is asked."""
    sizes: list[int] = []

    def record(compute: Any, tensors: list[Tensor]) -> Any:
        places = [torch.empty_like(tensor) for tensor in tensors]
        sizes.append(len(tensors[0]))
        if len(tensors[0]) == 13:
            return None
        result = torch.empty_like(tensors[0])
        return replay._Recording(_Graph(compute, places, result), places, result)  # type: ignore[arg-type]

    monkeypatch.setattr(replay, "_own", replay._Own())
    monkeypatch.setattr(replay, "_record", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "main")
    return sizes


def _call(size: int, value: float = 1.0) -> Any:
    return replay.replayed(lambda x: 2 * x[0], [torch.full((size,), value)], key="twice")


def test_what_comes_often_is_recorded_once(recorded: list[int]) -> None:
    assert [_call(3) for _ in range(replay.BEFORE)] == [None] * replay.BEFORE
    for value in (1.0, 5.0):
        assert _call(3, value).tolist() == [2 * value] * 3
    assert recorded == [3]


def test_what_cannot_be_recorded_is_not_tried_again(recorded: list[int]) -> None:
    assert [_call(13) for _ in range(replay.BEFORE + 3)] == [None] * (replay.BEFORE + 3)
    assert recorded == [13]


def test_shapes_that_change_all_the_time_are_not_recorded(recorded: list[int]) -> None:
    for _ in range(3):
        for size in range(1, 2 * replay.KEPT):
            assert _call(size) is None
    assert recorded == []


def test_only_the_latest_are_kept(recorded: list[int]) -> None:
    for size in range(1, 2 + replay.KEPT):
        for _ in range(replay.BEFORE + 1):
            _call(size)
    assert len(replay._own.seen) == replay.KEPT
    assert recorded == list(range(1, 2 + replay.KEPT))


def test_a_training_that_ends_leaves_nothing(recorded: list[int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trp = rp.attach(model, optimizer, rp.TRP(rank=rp.FixedRank(2), guard=False))
    for _ in range(replay.BEFORE + 1):
        _call(3)
    trp.finish()
    assert not replay._own.seen
    assert _call(3) is None
