"""The releases' form: CCSR's recorded examples, and the pool of training pairs."""

import numpy as np
import pytest
import torch

from consissr.data.as_released import PairPool, degrade_as_released
from consissr.data.degradation import draw_kernels, preset
from consissr.data.draws import ReleasedDraws


@pytest.mark.parametrize("seed", range(6))
def test_recorded_examples(shared, seed):
    """The official code, its three random streams seeded with `seed`; an LQ byte may differ by rounding."""
    recorded = np.load(shared / "conformance/ccsr_A/degradation_seeded.npz")
    config = preset("ccsr")
    for kernel, name in zip(draw_kernels(config, ReleasedDraws(seed)), ("kernel1", "kernel2", "sinc"), strict=True):
        pad = (21 - len(kernel)) // 2
        np.testing.assert_allclose(np.pad(kernel.numpy(), pad), recorded[f"s{seed}_{name}"], atol=1e-6)

    draws = ReleasedDraws(seed)
    hq = torch.from_numpy(recorded["gt_uint8"]).permute(2, 0, 1)[None] / 127.5 - 1
    flipped = draws.flip()
    assert flipped == bool(recorded[f"s{seed}_gt_flipped"])
    _, enlarged = degrade_as_released(hq.flip(-1) if flipped else hq, config, draws)
    ours = ((enlarged[0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
    difference = np.abs(ours - recorded[f"s{seed}_lq_uint8"].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_batch_shares_structure_but_not_strengths():
    x = torch.rand(1, 3, 96, 96).repeat(3, 1, 1, 1) * 2 - 1
    lq, enlarged = degrade_as_released(x, preset("consissr"), ReleasedDraws(0))
    assert lq.shape == (3, 3, 24, 24) and enlarged.shape == x.shape
    assert not torch.equal(lq[0], lq[1])


def batches(count: int, size: int = 2):
    for i in range(count):
        hq = torch.arange(i * size, (i + 1) * size).float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        yield hq, hq[..., :1, :1] + 0.5


def test_pool_gives_every_pair_at_most_once_and_keeps_partners():
    pool = PairPool(size=6, seed=0)
    given = []
    for i, (hq, lq) in enumerate(batches(30)):
        out_hq, out_lq, names = pool.exchange(hq, lq, [str(value) for value in hq[:, 0, 0, 0].tolist()])
        assert names == [str(value) for value in out_hq[:, 0, 0, 0].tolist()]
        assert out_hq.shape == hq.shape and torch.equal(out_hq[:, :, 0, 0] + 0.5, out_lq[:, :, 0, 0])
        if i < 3:
            assert torch.equal(out_hq, hq)  # the pool fills first
        else:
            given += out_hq[:, 0, 0, 0].tolist()
    assert len(set(given)) == len(given) and given != sorted(given)
