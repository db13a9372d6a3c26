"""Networks in training, from random weights, on random data that they learn by heart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Batches of the data; a step takes the next one.
POOL = 8


@dataclass(frozen=True)
class Network:
    """How a network is built and trained here.

    Attributes:
        build: the model, in training mode.
        batch: images or sequences a step.
        size: of one input.
        schemes: decompositions to measure.
        optimizer: made for the model's parameters.
    """

    build: Callable[[], nn.Module]
    batch: int
    size: tuple[int, ...]
    schemes: tuple[str, ...]
    optimizer: Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _cifar10(name: str) -> nn.Module:
    from cifar10.networks import NETWORKS as SMALL

    return SMALL[name]()


class LlamaBlock(nn.Module):
    """One decoder layer of Llama 7B: four matrices of 4096×4096, three of 4096×11008."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        self.layer = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        out = self.layer(hidden, position_embeddings=self.rotary(hidden, positions))
        return out[0] if isinstance(out, tuple) else out


NETWORKS = {
    # He's own for CIFAR-10, whose shortcuts have no weights
    "resnet20": Network(
        lambda: _cifar10("resnet20"), 128, (3, 32, 32), ("channel", "spatial"), sgd
    ),
    "resnet18": Network(
        lambda: _torchvision("resnet18"), 32, (3, 224, 224), ("channel", "spatial"), sgd
    ),
    "resnet50": Network(
        lambda: _torchvision("resnet50"), 16, (3, 224, 224), ("channel", "spatial"), sgd
    ),
    "vit_b_16": Network(
        lambda: _timm("vit_base_patch16_224"), 4, (3, 224, 224), ("linear",), adamw
    ),
    "llama_7b_block": Network(LlamaBlock, 1, (64, 4096), ("linear",), adamw),
    # 11008×4096, and 4096×11008, for which `svd` takes twice as long
    "llama_7b_up": Network(
        lambda: nn.Sequential(nn.Linear(4096, 11008)), 64, (4096,), ("linear",), adamw
    ),
    "llama_7b_down": Network(
        lambda: nn.Sequential(nn.Linear(11008, 4096)), 64, (11008,), ("linear",), adamw
    ),
}


class Training:
    """A network's training, a step at a time.

    Args:
        network: what is trained.
        batch: images a step; the network's own where None.
        size: of one input; the network's own where None.
        learning_rate: the optimizer's own where None.
        device: where.
    """

    def __init__(
        self,
        network: Network,
        *,
        batch: int | None = None,
        size: tuple[int, ...] | None = None,
        learning_rate: float | None = None,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.model = network.build().train().to(device)
        self.optimizer = network.optimizer(self.model.parameters())
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        batch, size = batch or network.batch, size or network.size
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(POOL, batch, *size, generator=generator).to(device)
        self.targets = torch.randint(10, (POOL, batch), generator=generator).to(device)
        self._batches = self._cycle()

    def step(self) -> None:
        """One step of the optimizer."""
        inputs, targets = next(self._batches)
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(inputs, targets).backward()
        self.optimizer.step()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        output = self.model(inputs)
        if output.ndim == 3:  # a block of a language model: the mean hidden state classifies
            output = output.mean(1)[:, :10]
        return F.cross_entropy(output, targets)

    def _cycle(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(self.inputs, self.targets, strict=True)
