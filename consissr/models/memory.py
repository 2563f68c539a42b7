"""How much memory a device has, how much was used at most, and whether an error says that it ran out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from consissr.errors import UserError
from consissr.images.device import PIXEL_BYTES, works_on_pixels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -1, -3, 2**25
"""glibc's names (malloc.h), and the largest value that it takes."""
HEAP_KEEPS = 2**28
"""Freed bytes that scripts let the heap keep: the system takes a tenth of a small model's time to provide them anew."""
GLIBC_KEEPS = 2**26
"""What glibc keeps by itself once it has freed large blocks: twice LARGEST_MMAP_THRESHOLD."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
"""What plain RuntimeErrors say of it: the CPU's allocator, CUDA's driver, cuBLAS and cuDNN, which allocate by
themselves."""


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; for the CPU what the container may use. The same at every call, so that choices
    made from it, and with them the results, do not depend on what else is running."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in map(Path, CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def pixel_device(device: torch.device, size: tuple[int, int]) -> torch.device:
    """Where a result of `size` (H, W) is resized and coloured: on `device`, if it can and has room, or the CPU."""
    if works_on_pixels(device) and size[0] * size[1] * PIXEL_BYTES <= total_memory(device) / 8:
        return device
    return torch.device("cpu")


def peak_memory_mb() -> int:
    """The most memory used so far: of the GPU where there is one, else of this process; 0 where nobody can say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on an accelerator or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def glibc(name: str) -> Callable[..., int]:
    """A function of glibc's heap; one that does nothing where there is no glibc."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    return function or (lambda *arguments: 0)


def set_heap(keeps: int = HEAP_KEEPS) -> None:
    """Let this process's heap keep up to `keeps` freed bytes: to take them again costs a page fault every 4 KB.

    A setting of the whole process: for scripts, never for libraries.
    """
    glibc("mallopt")(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    glibc("mallopt")(M_TRIM_THRESHOLD, keeps)


def trim_heap() -> None:
    """Hand freed memory back to the system: before a measurement, and where a large image needs it as a whole."""
    glibc("malloc_trim")(0)


@contextmanager
def out_of_memory_in_one_line(message: str) -> Iterator[None]:
    """Makes a UserError of running out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error
