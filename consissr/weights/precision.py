"""The number types that networks may run in, and which of them a device computes fast."""

import torch

from consissr.config.loading import check_word

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_INSTRUCTIONS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""What torch.cpu is asked: AMX, and AVX-512's BF16. Without them a processor may take hundreds of times as long."""


def choose_precision(precision: str, device: str | torch.device) -> str:
    """A key of PRECISIONS; 'auto' is bf16 where that is computed fast; else fp16 on GPUs, and fp32 on the CPU.

    UserError for another word.
    """
    check_word(precision, ("auto", *PRECISIONS), "precision")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cpu":
        return "bf16" if cpu_computes_bf16() else "fp32"
    if torch.device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def cpu_computes_bf16() -> bool:
    """Whether this processor has instructions for bfloat16, as far as torch tells."""
    return any(getattr(torch.cpu, name, bool)() for name in BF16_INSTRUCTIONS)
