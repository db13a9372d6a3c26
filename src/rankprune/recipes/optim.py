"""A run's optimizer and learning rates."""

from __future__ import annotations

import torch
from torch import nn

from rankprune.recipes.config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay
    )


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if config.schedule == "multistep":
        milestones = [total // 2, total * 3 // 4]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    if config.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=total + 1, cycle_momentum=False
    )
