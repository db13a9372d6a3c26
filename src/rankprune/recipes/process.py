"""What this process computes on: its device, its fellows, its precision."""

from __future__ import annotations

import torch

from rankprune.errors import ConfigError, MissingExtraError

try:
    from accelerate import PartialState
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise  # it is installed, but lacks something itself
    raise MissingExtraError("training", "accelerate", "accelerate") from None


def process_state() -> PartialState:
    """This process among those of a torchrun job; the only one without it."""
    return PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    # Accelerate joins a job on CPUs only where it is told that they are CPUs
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Apple's has no fp64, which sums, spectra and plans are computed in
    return accelerator is None or accelerator.type == "mps"


def effective_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision to compute in, and a note where it is not the one that was asked for.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if device.type != "cpu" or asked == "fp32":
        return asked, ""
    if asked == "fp16":
        raise ConfigError("precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return asked, ""
    return "fp32", (
        "this CPU has no bf16 arithmetic that torch can use (AVX-512 or AMX) and would emulate it "
        "many times slower: computing in fp32"
    )
