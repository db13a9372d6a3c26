"""Block by block: later blocks are fitted to what the factorised ones before them return."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rankprune as rp
from rankprune.blocks import find_blocks, walk


class Residual(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return hidden + scale * self.down(torch.relu(self.up(hidden)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 24)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(24, 16)
        self.scales: list[float] = [1.0, 1.0, 1.0]
        self.order = [0, 1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(x)
        for index in self.order:
            hidden = self.blocks[index](hidden, scale=self.scales[index])
        return self.head(hidden)


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(32, 8) for _ in range(4)]


def test_as_if_every_block_had_been_calibrated_anew() -> None:
    model = Network().eval()
    plan = rp.make_plan(model, rp.FixedRank(5), guard=False)
    step_by_step = copy.deepcopy(model)
    for names in (["blocks.0.*"], ["blocks.1.*"], ["blocks.2.*"], ["stem", "head"]):
        part = rp.make_plan(
            step_by_step,
            rp.FixedRank(5),
            guard=False,
            overrides={"*": None} | dict.fromkeys(names, rp.FixedRank(5)),
        )
        stats = rp.calibrate(step_by_step, batches(), layers=names)
        rp.factorize(step_by_step, part, stats=stats, inplace=True)
    compact = rp.factorize_blocks(copy.deepcopy(model), plan, batches())
    for (name, ours), theirs in zip(
        compact.state_dict().items(), step_by_step.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda text, n=name: f"{n}: {text}")


def test_modes_and_hooks_are_put_back() -> None:
    model = Network().train()
    plan = rp.make_plan(model, rp.FixedRank(4), guard=False)
    assert rp.factorize_blocks(model, plan, batches()) is model
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [layer.name for layer in rp.plan_of(model).layers] == [
        layer.name for layer in plan.layers
    ]


def test_blocks_are_found() -> None:
    model = Network()
    assert find_blocks(model) == "blocks"
    assert [block.name for block in walk(model, batches(), None)] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    with pytest.raises(rp.ConfigError, match="no list of alike blocks"):
        find_blocks(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def _reordered(model: Network) -> None:
    model.order = [0, 2, 1]


def _rescaled(model: Network) -> None:
    model.scales = [1.0, 1.0, 0.5]


def _skipped(model: Network) -> None:
    model.order = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_reordered, "not called once each, in their order"),
        (_rescaled, "block 'blocks.2' is called with other arguments than 'blocks.0'"),
        (_skipped, "not called once each"),
    ],
)
def test_other_networks_are_refused_untouched(change: Any, message: str) -> None:
    model = Network()
    plan = rp.make_plan(model, rp.FixedRank(4), guard=False)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(rp.ConfigError, match=message):
        rp.factorize_blocks(model, plan, batches())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_refusals() -> None:
    model = Network()
    plan = rp.make_plan(model, rp.FixedRank(4), guard=False)
    with pytest.raises(rp.ConfigError, match="blocks='layers': no list of modules"):
        rp.factorize_blocks(model, plan, batches(), blocks="layers")
    with pytest.raises(rp.ConfigError, match="no batches"):
        rp.factorize_blocks(model, plan, [])
    with pytest.raises(rp.PlanError):
        rp.factorize_blocks(nn.Sequential(nn.Linear(3, 3)), plan, batches())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_hugging_face(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "num_attention_heads": 4, "num_hidden_layers": 3}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=64, **sizes, **tokens
    )
    model = transformers.AutoModel.from_config(config).eval()
    inputs = [
        {"input_ids": torch.randint(3, 60, (2, 12)), "attention_mask": torch.ones(2, 12)}
        for _ in range(4)
    ]
    plan = rp.make_plan(model, rp.Ratio(0.3))
    with torch.no_grad():
        expected = model(**inputs[0])[0]
        plain = rp.factorize(model, plan)(**inputs[0])[0]
        compact = rp.factorize_blocks(model, plan, inputs)(**inputs[0])[0]
    assert (compact - expected).norm() < (plain - expected).norm()
    assert model.config.use_cache is config.use_cache


class InPlace(Residual):
    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        hidden += scale * self.down(torch.relu(self.up(hidden)))
        return hidden


def test_blocks_that_change_their_input_see_it_once() -> None:
    expected, found = [], []
    for kind, states in ((Residual, expected), (InPlace, found)):
        model = Network().eval()
        blocks = nn.ModuleList(kind() for _ in range(3))
        blocks.load_state_dict(model.blocks.state_dict())
        model.blocks = blocks
        for block in walk(model, batches()):
            stats = block.calibrate()
            states += [moment.second_moment() for moment in stats.moments.values()]
            block.advance()
    assert len(expected) == len(found) == 6
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_planned_layers_that_are_never_called_get_the_plain_svd() -> None:
    model = Network().eval()
    model.head = nn.Sequential(nn.Linear(24, 16))
    model.spare = nn.Linear(24, 24)
    plan = rp.make_plan(model, rp.FixedRank(4), guard=False)
    only_spare = rp.Plan(
        layers=tuple(layer for layer in plan.layers if layer.name == "spare"),
        dense_params=plan.dense_params,
    )
    expected = rp.factorize(model, only_spare).spare.dense_weight()
    compact = rp.factorize_blocks(model, only_spare, batches())
    torch.testing.assert_close(compact.spare.dense_weight(), expected)
