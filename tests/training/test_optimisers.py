"""Learning rates step by step, what optimisers are made of, and averaged weights swapped in and out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from consissr.config.optimizer import OptimizerConfig
from consissr.training.engine import Average
from consissr.training.optimisers import build_optimizer, learning_rate, load_optimizer
from consissr.training.stage import Phase


def test_learning_rates() -> None:
    """Warm-up in a line from `final` to 1, then constant or half a cosine down to `final`, times `lr`."""
    cosine = OptimizerConfig(lr=2.0, warmup=10, decay="cosine", final=0.1)
    told = {0: 0.1, 1: 0.19, 5: 0.55, 9: 0.91, 10: 1.0, 35: 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 60: 0.55}
    told |= {110: 0.1, 200: 0.1}
    for step, share in told.items():
        assert learning_rate(cosine, step, 110) == pytest.approx(2 * share), step
    constant = OptimizerConfig(lr=2.0, warmup=4, final=0.5)
    assert [learning_rate(constant, step, 9) for step in (0, 2, 3, 4, 8)] == [1.0, 1.5, 1.75, 2.0, 2.0]
    assert learning_rate(OptimizerConfig(lr=3.0, decay="cosine"), 0, 100) == 3.0, "no warm-up"
    short = OptimizerConfig(lr=1.0, warmup=5, decay="cosine", final=0.2)
    assert learning_rate(short, 5, 5) == pytest.approx(1.0), "a run that is all warm-up"
    assert learning_rate(short, 6, 7) == pytest.approx(0.6), "halfway through two steps"


def phase(**settings: float | list[float]) -> Phase:
    """A phase of one weight."""
    return Phase("one", {"weight": nn.Parameter(torch.ones(2))}, lambda batch, step: {}, OptimizerConfig(**settings))


def test_an_optimiser_has_its_phases_settings() -> None:
    one = phase(lr=0.25, betas=[0.5, 0.75], weight_decay=0.125)
    optimizer = build_optimizer(one)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.25, (0.5, 0.75), 0.125, True)
    assert [id(p) for p in group["params"]] == [id(one.parameters["weight"])]
    one.parameters["bias"] = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="^trained parameters must be float32: bias is not$"):
        build_optimizer(one)


def test_a_resumed_optimiser_goes_on_with_its_moments_under_the_runs_settings() -> None:
    before, now = phase(lr=0.1), phase(lr=0.1, betas=[0.5, 0.75], weight_decay=0.5)
    first, second = build_optimizer(before), build_optimizer(now)
    before.parameters["weight"].sum().backward()
    first.step()
    load_optimizer(second, first.state_dict(), now)
    (group,) = second.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.75), 0.5)
    (state,) = second.state.values()
    assert state["step"] == 1 and torch.allclose(state["exp_avg"], torch.full((2,), 0.1))


def test_averages_are_there_within_and_the_trained_weights_after_whatever_happens() -> None:
    weights = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([3.0]))}
    average = Average(weights, 0.5)
    average.values["a"] *= 10
    average.values["b"] *= 10
    with pytest.raises(RuntimeError, match="stop"), average.swapped():
        assert weights["a"].tolist() == [10, 20] and weights["b"].tolist() == [30]
        raise RuntimeError("stop")
    assert weights["a"].tolist() == [1, 2] and weights["b"].tolist() == [3]
    assert average.values["a"].tolist() == [10, 20] and average.values["b"].tolist() == [30]
    assert weights["a"].requires_grad
    with Average(weights, 0).swapped():
        assert weights["a"].tolist() == [1, 2], "no averages: nothing changes"
