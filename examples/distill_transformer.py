"""A transformer compressed and healed without labels, two ways, then saved as transformers does.

The model is small and trained here on a made-up language, in place of a pretrained one: replace
`teacher` and `sentences` by your own.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rankprune as rp
from rankprune.integrations.huggingface import prepare
from rankprune.recipes.distill import Distillation, distill, match_logits

SYMBOLS = 64
BUDGET = rp.Budget(params=0.5)


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Each symbol is followed by one of four, which depend on it."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(0, SYMBOLS, (SYMBOLS, 4), generator=torch.Generator().manual_seed(0))
    batches = []
    for _ in range(count):
        text = [torch.randint(0, SYMBOLS, (16,), generator=generator)]
        for _ in range(23):
            choice = torch.randint(0, 4, (16,), generator=generator)
            text.append(follows[text[-1], choice])
        batches.append({"input_ids": torch.stack(text, 1)})
    return batches


def trained() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in sentences(150, seed=1):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module) -> float:
    batches = sentences(10, seed=3)
    found = [match_logits(student(**b), teacher(**b), None) for b in batches]
    return torch.stack(found).mean().item()


def main() -> None:
    teacher = trained()
    batches = sentences(60, seed=2)
    stats = rp.calibrate(teacher, batches[:32])
    sensitive = rp.calibrate(teacher, batches[:16], sensitivity=True)
    plan = rp.make_plan(teacher, BUDGET, stats=sensitive)
    compact = rp.factorize(teacher, plan, stats=stats)
    print(f"parameters {plan.params / plan.dense_params:.2f} of the dense model's")
    print(f"one shot     {divergence(compact, teacher):.4f} nats from the dense model")

    # the factors themselves learn
    distill(compact, teacher, batches, Distillation(lr=1e-3))
    print(f"distilled    {divergence(compact, teacher):.4f}")

    # or dense weights do, which are projected every five steps (Trained Rank Pruning)
    student = copy.deepcopy(teacher)
    options = Distillation(lr=1e-3, trp=rp.TRP(plan=plan, every=5))
    reached = distill(student, teacher, batches, options)
    assert reached is not None
    projected = divergence(student, teacher)
    student = rp.factorize(student, reached)
    print(f"TRP          {projected:.4f} projected, {divergence(student, teacher):.4f} factorised")

    with tempfile.TemporaryDirectory() as folder:
        prepare(compact).save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        print(f"loaded       {divergence(loaded, teacher):.4f}")


if __name__ == "__main__":
    main()
