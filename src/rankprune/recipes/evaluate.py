"""Accuracy of a classifier, always in fp32."""

from __future__ import annotations

import torch
from torch import nn

from rankprune.profile import evaluating
from rankprune.recipes.batches import Normalise, eval_batches
from rankprune.recipes.data import ImageData, Images

_BATCH = 250


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    data: ImageData,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> dict[str, float]:
    """Accuracy and loss over a part of a data set.

    Args:
        model: on the device; its mode is put back afterwards.
        images: the part.
        data: gives the normalisation.
        device: where to compute.
        rank: this process.
        world: number of processes; the result is that of all of them, every image counted once.
        workers: processes that prepare batches.

    Returns:
        "accuracy" and "top5" as fractions, the mean cross-entropy "loss", the number of "images".
    """
    normalise = Normalise(data, device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        batches = eval_batches(images, _BATCH, rank=rank, world=world, workers=workers)
        for pixels, labels in batches:
            logits, target = model(normalise(pixels)).float(), labels.to(device)
            best = logits.topk(min(5, logits.shape[1])).indices == target.unsqueeze(1)
            loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            batch = torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels))])
            sums += batch.to(sums)
    if world > 1:
        torch.distributed.all_reduce(sums)
    top1, top5, loss, count = sums.tolist()
    return {
        "accuracy": top1 / count,
        "top5": top5 / count,
        "loss": loss / count,
        "images": int(count),
    }
