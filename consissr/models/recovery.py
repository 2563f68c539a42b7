"""When a restoration runs out of memory or ends in NaN: smaller batches, then smaller tiles; float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from consissr.errors import UserError
from consissr.models.memory import is_out_of_memory
from consissr.models.tiles import Tiles

log = logging.getLogger(__name__)

Attempt = Callable[[slice, Tiles], Tensor]
"""(rows of a batch, tiles) -> results (rows,3,H,W); may run out of memory or hold NaN."""


def within_memory(
    attempt: Attempt, names: Sequence, tiles: Tiles, latent_size: tuple[int, int], together: int
) -> Tensor:
    """Results (B,3,H,W) of a batch with `names`; where memory runs out, of its halves, then in half the tiles.

    latent_size: (h, w). together: at most so many images at once. UserError if the smallest tiles are too large.
    """

    def run(rows: slice, tiles: Tiles) -> Tensor:
        try:
            return attempt(rows, tiles)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        count = rows.stop - rows.start
        if count > 1:
            log.warning("out of memory with %d images at once: halving the batch", count)
            middle = rows.start + count // 2
            return torch.cat([run(slice(rows.start, middle), tiles), run(slice(middle, rows.stop), tiles)])
        smaller = tiles.smaller(*latent_size)
        if smaller is None:
            name = names[rows.start]
            raise UserError(f"{name}: out of memory even in the smallest tiles; use another device or precision")
        log.warning("out of memory: trying %s", smaller)
        return run(rows, smaller)

    parts = [slice(first, min(first + together, len(names))) for first in range(0, len(names), together)]
    return torch.cat([run(rows, tiles) for rows in parts]) if len(parts) > 1 else run(parts[0], tiles)


def finite(
    restore: Callable[[], Tensor], names: Sequence, float32: Callable[[], AbstractContextManager] | None
) -> Tensor:
    """Results (B,3,H,W) of `restore()`; rows with NaN or infinity come from another run inside `float32()`.

    float32: None where the weights are that already. UserError for rows that stay so.
    """
    y = restore()
    bad = rows_not_finite(y)
    if bad.any() and float32 is not None:
        log.warning("%s: not a number in 16 bits, running again in float32", named(names, bad))
        with float32():
            y = y.float()
            y[bad] = restore()[bad]
        bad = rows_not_finite(y)
    if bad.any():
        raise UserError(f"{named(names, bad)}: the result is not a number even in float32; check the input and model")
    return y


def rows_not_finite(y: Tensor) -> Tensor:
    """Which rows (B,) of y (B,...) hold NaN or infinity."""
    # The extremes say it without a copy, which of a large image would take as much memory as all else.
    return ~torch.stack([torch.stack(row.aminmax()).isfinite().all() for row in y]).cpu()


def named(names: Sequence, which: Tensor) -> str:
    """The names of the rows that `which` (B,) marks."""
    return ", ".join(str(name) for name, marked in zip(names, which.tolist(), strict=True) if marked)
