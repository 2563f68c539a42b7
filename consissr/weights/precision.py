"""The number types that networks may run in, and which of them a device computes fast."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn import functional as F

from consissr.config.loading import check_word

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_INSTRUCTIONS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""What torch.cpu is asked: AMX, and AVX-512's BF16. Without them a processor may take hundreds of times as long."""
WORTH_IT = 1.3
"""Where torch cannot be asked, bfloat16 must be measured to be so many times as fast as float32."""


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


@cache
def cpu_computes_bf16() -> bool:
    """Whether this processor computes bfloat16 fast: torch is asked, or, where it has no answer, timed."""
    asked = [getattr(torch.cpu, name, None) for name in BF16_INSTRUCTIONS]
    if all(asked):
        return any(supported() for supported in asked)
    return measured_speed(torch.bfloat16) > WORTH_IT * measured_speed(torch.float32)


def measured_speed(dtype: torch.dtype) -> float:
    """Small convolutions per second on the CPU, the best of several."""
    x, weight = torch.ones(1, 64, 32, 32, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        F.conv2d(x, weight, padding=1)
        seconds.append(time.perf_counter() - begin)
    return 1 / max(min(seconds), 1e-9)
