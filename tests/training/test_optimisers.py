"""Learning rates, what optimisers are made of and how they step, and averaged weights swapped in and out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from consissr.config.optimizer import OptimizerConfig
from consissr.training.engine import Average, Player
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


def phase(**settings: float | str | list[float]) -> Phase:
    """A phase of one weight."""
    return Phase("one", {"weight": nn.Parameter(torch.ones(2))}, lambda batch, step: {}, OptimizerConfig(**settings))


def test_an_optimiser_has_its_phases_settings() -> None:
    one = phase(lr=0.25, betas=[0.5, 0.75], weight_decay=0.125)
    optimizer = build_optimizer(one)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (0.25, (0.5, 0.75), 0.125, True)
    assert [id(p) for p in group["params"]] == [id(one.parameters["weight"])]


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


def test_moments_in_8_bits_are_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    package = SimpleNamespace(AdamW8bit=lambda parameters, **settings: made.append((parameters, settings)))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    one = phase(kind="adamw8bit", lr=0.25, betas=[0.5, 0.75], weight_decay=0.125)
    build_optimizer(one)
    ((parameters, settings),) = made
    assert parameters == [one.parameters["weight"]]
    assert settings == {"lr": 0.25, "betas": (0.5, 0.75), "weight_decay": 0.125}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Module(nn.Module):
    """A phase's loss as DistributedDataParallel holds it, noting what is asked of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.apart = inner, 0

    def forward(self, *given: object) -> dict[str, torch.Tensor]:
        return self.inner(*given)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.apart += 1
        yield


def player(one: Phase, sharded: bool, world: int, first: bool = True) -> Player:
    """A phase in training in one of `world` processes."""

    def prepare_model(module: nn.Module, device_placement: bool) -> Module:
        assert device_placement is False, "the loop has put it in its place"
        return Module(module)

    accelerator = SimpleNamespace(num_processes=world, is_main_process=first, prepare_model=prepare_model)
    return Player(one, accelerator, sharded)


def test_moments_are_shared_out_where_it_is_asked_for_and_there_are_several_processes(alone: None) -> None:
    for sharded, world, wanted in ((True, 2, True), (True, 1, False), (False, 2, False)):
        made = player(phase(), sharded, world)
        assert (type(made.optimizer) is ZeroRedundancyOptimizer) == wanted
        assert type(getattr(made.optimizer, "optim", made.optimizer)) is torch.optim.AdamW


def test_a_shared_out_step_is_adamws(alone: None) -> None:
    """Same weights, same checkpoint; a resumed run's settings reach the optimiser within, too."""
    settings = {"lr": 0.1, "betas": [0.5, 0.75], "weight_decay": 0.5}
    plain, shared = player(phase(**settings), False, 2), player(phase(**settings), True, 2)
    for rate in (0.25, 0.125):
        for one in (plain, shared):
            one.parameters[0].grad = torch.tensor([1.0, -2.0])
            one.step(rate)
    assert torch.equal(plain.parameters[0], shared.parameters[0])
    inner = shared.optimizer.optim.param_groups[0]
    assert (inner["lr"], inner["betas"], inner["fused"]) == (0.125, (0.5, 0.75), True)
    asked = []
    usual = shared.optimizer.consolidate_state_dict
    shared.optimizer.consolidate_state_dict = lambda to: asked.append(to) or usual(to)
    states = [one.optimizer_state()["state"][0] for one in (plain, shared)]
    assert asked == [0] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert player(phase(), False, 2, first=False).optimizer_state() == {}
    load_optimizer(shared.optimizer, shared.optimizer_state(), phase(betas=[0.25, 0.5], weight_decay=0.25))
    for group in (shared.optimizer.param_groups[0], shared.optimizer.optim.param_groups[0]):
        assert (group["betas"], group["weight_decay"]) == ((0.25, 0.5), 0.25)


def test_gradients_are_averaged_in_the_last_micro_batch_alone() -> None:
    several, single = player(phase(), False, 2), player(phase(), False, 1)
    for one, last, apart in ((several, True, 0), (several, False, 1), (single, False, 0)):
        with one.averaging(last):
            pass
        assert one.module.apart == apart


def test_a_gradient_that_is_not_finite_is_no_step(alone: None) -> None:
    """AdamW asks a flag on the device, for which nothing waits; 8-bit moments know no such flag."""
    for kind, sharded in (("adamw", False), ("adamw", True), ("adamw8bit", False)):
        one = player(phase(lr=0.5), sharded, 2)
        one.phase.optimizer.kind = kind
        for bad in (True, False):
            one.parameters[0].grad = torch.tensor([1.0, float("inf") if bad else 2.0])
            assert one.step(0.5).isfinite() != bad
            assert (one.parameters[0].tolist() == [1, 1]) == bad, kind
            assert not one.parameters[0].grad.any()
            inner = getattr(one.optimizer, "optim", one.optimizer)
            assert kind != "adamw" or inner.found_inf.item() == bad


def test_a_short_runs_average_does_not_hold_its_starting_weights() -> None:
    """At most (1 + n) / (10 + n) of the average stays after n steps, as in LDM's and diffusers' EMA."""
    weight = nn.Parameter(torch.zeros(1))
    average = Average({"a": weight}, 0.5)
    with torch.no_grad():
        weight += 1
    average.update(0)
    assert average.values["a"].item() == pytest.approx(0.9)
    average.update(2)
    assert average.values["a"].item() == pytest.approx(1 - 0.1 * 3 / 12)
    average.update(100)
    assert average.values["a"].item() == pytest.approx(1 - 0.1 * 3 / 12 / 2), "the decay of the config"


def test_a_shared_out_step_sees_its_phases_parameters_as_trained(alone: None) -> None:
    """A GAN's other player was the last to be trained; torch would tell of changed parameters in every process."""
    one = player(phase(), True, 2)
    seen, usual = [], one.optimizer.step
    one.optimizer.step = lambda: seen.append([p.requires_grad for p in one.parameters]) or usual()
    one.parameters[0].grad = torch.ones(2)
    one.requires_grad(False)
    one.step(0.5)
    assert seen == [[True]]


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
    assert Average(weights, 0).values == {}
    with Average(weights, 0).swapped():
        assert weights["a"].tolist() == [1, 2], "no averages: nothing changes"
