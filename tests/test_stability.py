"""Files of earlier versions, which every later one reads. Fixtures are never written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankprune as rp

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("schema*"))


class Fixture(nn.Module):
    """One layer of every kind that a plan can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(6, 8, 3, padding=1, stride=(1, 2))
        self.channel = nn.Conv2d(8, 8, 3, padding="same", groups=2, padding_mode="reflect")
        self.decoupled = nn.Conv2d(8, 6, 3, dilation=2, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2, output_padding=1, dilation=2)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 12)
        self.tied = nn.Linear(12, 12)
        self.same = nn.Linear(12, 12)
        self.same.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoupled(self.channel(self.spatial(x)).relu())
        x = self.pool(self.norm(self.up(self.depthwise(x)))).flatten(1)
        return self.same(self.tied(self.head(x)).tanh())


def build() -> nn.Module:
    torch.manual_seed(1)
    return Fixture()


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_saved_models_are_read(folder: Path) -> None:
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    model = rp.load(build(), folder).eval()
    with torch.no_grad():
        found = model(torch.linspace(-1, 1, 2 * 6 * 12 * 12).reshape(2, 6, 12, 12))
    assert torch.allclose(found, torch.tensor(answers["outputs"]), rtol=1e-4, atol=1e-6)
    plan = rp.read_plan(folder)
    layers = {
        layer.name: [layer.scheme, layer.rank, layer.params, layer.flops] for layer in plan.layers
    }
    assert layers == answers["layers"]
    assert plan.metadata["classes"] == ["a", "b"]


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_their_plans_are_written_as_they_were(folder: Path) -> None:
    """Keys that come later have defaults; none goes, and none changes its meaning."""
    before = json.loads((folder / "plan.json").read_text())
    now = json.loads(rp.read_plan(folder).to_json())
    for old, new in zip(before["layers"], now["layers"], strict=True):
        assert old.items() <= new.items()
    for key in before.keys() - {"layers", "weights", "sha256"}:
        assert before[key] == now[key]


def test_there_is_a_fixture_of_every_schema() -> None:
    from rankprune.plan import SCHEMA_VERSION

    assert {path.name for path in FIXTURES} == {f"schema{n + 1}" for n in range(SCHEMA_VERSION)}
