"""What a projection promises, and how a training moves weights. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rankprune.linalg import RESIDUAL_PROMISE

EPS = torch.finfo(torch.float32).eps


def keeps_promise(matrices: Tensor, rank: int, nearest: Tensor | None) -> None:
    """Against the SVD in float64 on the CPU."""
    assert nearest is not None
    assert nearest.device == matrices.device
    assert nearest.dtype is matrices.dtype
    reference = matrices.cpu().double()
    singular = torch.linalg.svdvals(reference)
    optimum = singular[..., rank:].square().sum(-1).sqrt()
    residual = torch.linalg.matrix_norm(reference - nearest.cpu().double())
    norm = torch.linalg.matrix_norm(reference)
    rounding = (4 * EPS + torch.finfo(matrices.dtype).eps) * norm
    assert (residual <= RESIDUAL_PROMISE * optimum + rounding).all()


def trained_on(matrices: Tensor, share: float, seed: int = 7) -> Tensor:
    """The same and noise, of this share of the norm."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrices.shape, generator=generator).to(matrices.device)
    scale = share * torch.linalg.vector_norm(matrices.float()) / torch.linalg.vector_norm(noise)
    return (matrices.float() + scale * noise).to(matrices.dtype)
