"""The number types that networks may run in."""

from __future__ import annotations

import torch

from consissr.config.loading import check_word

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: str | torch.device) -> str:
    """A key of PRECISIONS; 'auto' is bf16 on GPUs that compute it (fp16 on older ones), fp32 on the CPU.

    UserError for another word.
    """
    check_word(precision, ("auto", *PRECISIONS), "precision")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
