"""He et al.'s CIFAR ResNets (arXiv 1512.03385, section 4.2), and a VGG.

The shortcuts have no parameters.

Imports nothing of rankprune: peers build the same networks in environments of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


class Shortcut(nn.Module):
    """Every second pixel, with channels of zeros on both sides."""

    def __init__(self, stride: int, channels: int) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.channels, self.channels))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Shortcut(stride, (outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def vgg(classes: int = 10) -> nn.Module:
    """VGG-16's convolutions at a quarter of their width, BatchNorm, one linear layer."""
    stages: list[nn.Module] = []
    inputs = 3
    for width, count in ((16, 2), (32, 2), (64, 3), (128, 3), (128, 3)):
        layers: list[nn.Module] = []
        for _ in range(count):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU())
            inputs = width
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(inputs, classes))


NETWORKS = {
    "resnet20": lambda: ResNet(3),
    "resnet56": lambda: ResNet(9),
    "vgg": vgg,
}


def build(name: str, weights: Path | None, seed: int) -> nn.Module:
    """A network, from weights or from a seed."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
