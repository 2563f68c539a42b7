"""The degradation as the releases run it: structural draws shared by a batch, and a pool of training pairs."""

import torch
import torch.nn.functional as F

from consissr.data.degradation import LARGEST, check_size, draw_kernels, enlarge, quantise, run_stages
from consissr.data.draws import ReleasedDraws
from consissr.data.settings import DegradationConfig


@torch.no_grad()
def degrade_as_released(
    hq: torch.Tensor, config: DegradationConfig, draws: ReleasedDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Degrade `hq` [B,3,H,W] in [-1,1]: kernels and strengths per image, everything else drawn once for the batch.

    With B = 1 this is CCSR's release (which degrades in the dataset), with more ConsisSR's. Returns what
    `degradation.degrade` returns; the enlarged images come from the LQ ones before those are rounded.
    """
    check_size(hq.shape[-2:], config)
    drawn = [draw_kernels(config, draws) for _ in hq]
    kernels = [torch.stack([_widen(kernel) for kernel in column]) for column in zip(*drawn, strict=True)]
    lq = run_stages((hq.float() + 1) / 2, config, kernels, draws)
    enlarged = enlarge(lq, hq.shape[-2:], config, draws)
    return quantise(lq) * 2 - 1, quantise(enlarged) * 2 - 1


def _widen(kernel: torch.Tensor) -> torch.Tensor:
    """A kernel zero-padded to the largest size, [21,21]."""
    return F.pad(kernel, ((LARGEST - kernel.shape[-1]) // 2,) * 4)


class PairPool:
    """Real-ESRGAN's pool: hides that one batch shares its draws by handing out pairs of earlier batches.

    Until `size` pairs are stored, batches pass through and are remembered. From then on each call shuffles the pool,
    takes its first pairs out and puts the new ones in their place.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor, str]] = []

    def exchange(
        self, hq: torch.Tensor, lq: torch.Tensor, names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Give a batch of pairs with the names of their files, get one of the same length (at most `size`)."""
        new = [(a.clone(), b.clone(), name) for a, b, name in zip(hq, lq, names, strict=True)]
        if len(self._pairs) + len(new) <= self.size:
            self._pairs += new
            return hq, lq, names
        order = torch.randperm(len(self._pairs), generator=self._generator).tolist()
        self._pairs = [self._pairs[i] for i in order]
        old, self._pairs[: len(new)] = self._pairs[: len(new)], new
        hqs, lqs, names = zip(*old, strict=True)
        return torch.stack(hqs), torch.stack(lqs), list(names)
