"""What a log line says of speed: the work of a step, counted without touching it, and time that was not a step's."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from consissr.training.processes import Processes
from consissr.training.window import LogWindow, counted, fastest_rate


def test_counting_changes_no_bit() -> None:
    """Multiply-accumulates count as two: forward, and backward to weights and to the second layer's input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    step()
    plain = [p.grad.clone() for p in net.parameters()]
    layer = 2 * 2 * 16 * 16 * 3 * 8 * 9
    assert counted(step) == (2 + 3) * layer
    assert all(torch.equal(p.grad, before) for p, before in zip(net.parameters(), plain, strict=True))
    with FlopCounterMode(display=False) as theirs:
        step()
    assert theirs.get_total_flops() == 5 * layer


def test_speed_leaves_out_what_was_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    window = LogWindow()
    window.work, window.peak = 100, 200.0
    now = 4.0
    with window.paused():
        now = 104.0
    window.add({"loss": 3.0})
    window.add({"loss": torch.tensor(5.0)})
    window.waited = 1.0
    values = window.close(2)
    speed = {"steps_per_second": 0.5, "data_seconds": 0.5, "peak_share": 0.25}
    assert values == speed | {"loss": 4.0}, "2 s a step: 50 of 200 operations per second"


@pytest.mark.parametrize("faster", ["product", "convolution"])
def test_the_peak_is_what_the_faster_operation_reaches(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    """By a clock on which the slower one takes a second and the other half of the time that its work would."""
    product, convolution = 2 * 512**3, 2 * (2 * 64 * 64) * 96 * 96 * 9
    seconds = {"product": 1.0, "convolution": convolution / product}
    seconds[faster] /= 2
    now, multiply, convolve = [0.0], torch.Tensor.__matmul__, F.conv2d

    def timed(run, name: str):
        def call(*args, **kwargs):
            now[0] += seconds[name]
            return run(*args, **kwargs)

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "__matmul__", timed(multiply, "product"))
    monkeypatch.setattr(F, "conv2d", timed(convolve, "convolution"))
    assert fastest_rate(torch.device("cpu"), low=False) == pytest.approx(2 * product)


def test_means_leave_out_what_was_not_finite() -> None:
    """Of three steps one was left out: the mean is of the other two; what was never finite has none."""
    window = LogWindow()
    for loss, never in ((1.0, torch.nan), (torch.inf, torch.inf), (4.0, torch.nan)):
        figures = {"loss": torch.tensor(loss), "never": torch.tensor(never), "lr": 0.5}
        window.add(figures, finite_only=True)
    again = LogWindow()
    again.load({key: value.copy() if key == "window" else value for key, value in window.state().items()})
    for one in (window, again):
        one.share(Processes(0, 1, torch.device("cpu"), timeout=1))
        values = one.close(3)
        assert values["loss"] == 2.5 and values["lr"] == 0.5 and "never" not in values and one.sums == {}
        assert not any(name.startswith("#") for name in values)
