"""The flat-block ratio: how rough results are where the photographs are smooth, which grain and hallucination raise.

Of all 16x16 blocks of a set, the tenth in which HR's Y has the least standard deviation; mean deviation of the results
over HR's. 1 for the photographs themselves.
"""

from collections.abc import Iterable

import numpy as np
import torch

from consissr.errors import UserError
from consissr.evaluation.metrics import luma

BLOCK = 16  # pixels per side
FLATTEST = 0.1  # share of all blocks


def block_std(image: torch.Tensor) -> np.ndarray:
    """Standard deviation (population) of Y in each 16x16 block: (N, 3, H, W) in [0, 1] -> (N x blocks,), levels."""
    gray = luma(image.double())[:, 0] * 255
    height, width = (side // BLOCK * BLOCK for side in gray.shape[-2:])
    blocks = gray[:, :height, :width].unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)
    return blocks.flatten(3).std(dim=-1, correction=0).flatten().numpy()


def flat_block_ratio(sr: Iterable[torch.Tensor], hr: Iterable[torch.Tensor]) -> float:
    """The ratio (see above) of two sets of images (N, 3, H, W) in [0, 1], which come in the same order.

    NaN where the photographs' smoothest blocks are constant.
    """
    result = np.concatenate([block_std(image) for image in sr])
    photograph = np.concatenate([block_std(image) for image in hr])
    if result.shape != photograph.shape:
        raise UserError(f"{result.size} blocks of results do not match {photograph.size} blocks of HR images")
    flat = np.argsort(photograph, kind="stable")[: max(1, round(FLATTEST * photograph.size))]
    smooth = photograph[flat].mean()
    return float(result[flat].mean() / smooth) if smooth else float("nan")
