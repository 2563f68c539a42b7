"""Where random numbers come from: ours against a stub written here, and what every stream must be like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from consissr.data.degradation import degrade, draw_kernels, enlarge, preset, quantise, run_stages
from consissr.data.draws import SeededDraws
from consissr.data.poisson import poisson_counts

CPU = torch.device("cpu")


class Plain:
    """A seed's draws as their definition has them: PCG64 for numbers, a torch generator of its own for fields."""

    always_coloured = False

    def __init__(self, seed: int) -> None:
        numbers, fields = np.random.SeedSequence(seed).spawn(2)
        self.numbers = np.random.Generator(np.random.PCG64(numbers))
        self.fields = torch.Generator().manual_seed(int(fields.generate_state(1, np.uint64)[0]) >> 1)

    def uniform(self, low: float = 0, high: float = 1) -> float:
        return low + (high - low) * self.numbers.random()

    def pick(self, values, weights=None):
        weights = [1] * len(values) if weights is None else weights
        u, edge = self.numbers.random() * sum(weights), 0.0
        for value, weight in zip(values, weights, strict=True):
            edge += weight
            if u < edge:
                return value
        return values[-1]

    def strengths(self, low, high, count):
        return torch.tensor([self.uniform(low, high) for _ in range(count)])

    def normal(self, shape, device):
        return torch.randn(tuple(shape), generator=self.fields)

    def poisson(self, levels, n):
        return torch.stack([poisson_counts(*pair, self.fields) for pair in zip(levels, n.tolist(), strict=True)])


@pytest.mark.parametrize("name", ["ccsr", "consissr"])
def test_each_image_is_degraded_by_its_own_seeds_draws_in_the_releases_order(name: str) -> None:
    """First stage's kernel, second's, the last filter's; then what the stages draw (which basicsr checks)."""
    config, generator = preset(name), torch.Generator().manual_seed(0)
    hq = torch.rand(6, 3, 128, 128, generator=generator) * 2 - 1
    seeds = [3, 14, 15, 92, 65, 35]
    lq, large = degrade(hq, config, seeds)
    for i, seed in enumerate(seeds):
        draws = Plain(seed)
        kernels = draw_kernels(config, draws)
        image = quantise(run_stages((hq[i : i + 1] + 1) / 2, config, kernels, draws))
        assert torch.equal(lq[i : i + 1], image * 2 - 1)
        assert torch.equal(large[i : i + 1], quantise(enlarge(image, (128, 128), config, draws)) * 2 - 1)


def test_the_noise_is_normal_and_each_seeds_own() -> None:
    fields = [SeededDraws(seed).normal((1, 3, 64, 64), CPU) for seed in range(3)]
    for field in fields:  # 12,288 numbers: their mean is within 0.03 of 0, their deviation of 1, beyond 3 sigma
        assert abs(field.mean()) < 0.03 and abs(field.std() - 1) < 0.03 and field.abs().max() > 3
    assert not torch.equal(fields[0], fields[1]) and not torch.equal(fields[1], fields[2])


def test_choices_reach_every_value_and_strengths_the_whole_range() -> None:
    assert {SeededDraws(seed).pick("abc") for seed in range(60)} == set("abc")
    weighted = [SeededDraws(seed).pick("abc", [0.2, 0.7, 0.1]) for seed in range(2000)]
    assert [round(weighted.count(letter) / 2000, 1) for letter in "abc"] == [0.2, 0.7, 0.1]
    strengths = torch.cat([SeededDraws(seed).strengths(2, 5, 1) for seed in range(3000)])
    assert abs(strengths.mean() - 3.5) < 0.05 and strengths.min() < 2.05 and strengths.max() > 4.95
