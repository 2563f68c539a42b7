"""The training loop against one written by hand, step by step: two players whose losses depend on each other.

Clipping, accumulation, learning rates, weight decay, averaging and the order of phases all show in the weights that
every step's checkpoint holds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consissr.config.training import TrainConfig
from consissr.nano.config import run_config
from consissr.training.checkpoints import load_checkpoint
from consissr.training.loop import Loop
from consissr.training.stage import Batch, Phase, seed_of
from consissr.weights.precision import BF16_INSTRUCTIONS

STEPS, ACCUMULATED = 6, 3
WORDS = ["batch=6", "micro_batch=2", f"steps={STEPS}", "log_every=1", "checkpoint_every=1", "checkpoint_limit=9"]
WORDS += ["tracker=none", "data.crop=16", "precision=fp32", "ema=0.25"]
WORDS += ["optimizer.lr=0.05", "optimizer.warmup=2", "optimizer.decay=cosine", "optimizer.final=0.1"]
WORDS += ["optimizer.betas=[0.8,0.9]", "optimizer.weight_decay=0.3", "optimizer.clip=1.8"]
WORDS += ["deft.optimizer.lr=0.02", "deft.optimizer.clip=0", "deft.optimizer.weight_decay=0"]


def maker_loss(maker: nn.Module, judge: nn.Module, x: Tensor, step: int) -> Tensor:
    """Errors of colours (B, 3), and the judge's opinion of them; later steps count for more."""
    return (1 + step) * (maker(x) - x).square().mean() - judge(maker(x)).mean()


def judge_loss(maker: nn.Module, judge: nn.Module, x: Tensor) -> Tensor:
    """Photographs' colours are to be told from the maker's."""
    return (judge(maker(x).detach()) - judge(x)).exp().mean()


class Toy:
    """Two linear players on the images' mean colours, and one layer that nobody trains."""

    needs_lq = False

    def __init__(self, config: TrainConfig) -> None:
        self.maker, self.judge, self.frozen = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 3)
        self.networks = nn.ModuleDict({"maker": self.maker, "judge": self.judge, "frozen": self.frozen})
        self.compile_modules: list[nn.Module] = []
        self.buffers: dict[str, Tensor] = {}
        phases = (("maker", self.maker, self.first, config.optimizer),)
        phases += (("judge", self.judge, self.second, config.deft.optimizer),)
        self.phases = [Phase(name, dict(net.named_parameters()), loss, c) for name, net, loss, c in phases]
        self.seen: list[Tensor] = []
        self.shown: list[Tensor] = []
        self.before = {name: value.clone() for name, value in self.networks.state_dict().items()}

    def prepare(self, batch: Batch) -> None:
        """Colours (B, 3), kept for the loop by hand."""
        assert not torch.is_grad_enabled()
        batch.cache["colours"] = batch.hq.mean((2, 3))
        self.seen.append(batch.cache["colours"])

    def first(self, batch: Batch, step: int) -> dict[str, Tensor]:
        batch.cache["made"] = self.maker(batch.cache["colours"]).detach()  # for the second phase, as in DeFT
        loss = maker_loss(self.maker, self.judge, batch.cache["colours"], step)
        return {"loss": loss, "double": 2 * loss}

    def second(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": (self.judge(batch.cache["made"]) - self.judge(batch.cache["colours"])).exp().mean()}

    def restore(self, batch: Batch) -> Tensor:
        self.shown.append(self.maker.weight.clone())
        return batch.hq * self.maker.weight.sum()

    def export(self, folder: Path) -> None:
        torch.save(self.networks.state_dict(), folder / "result.pt")


class AdamW:
    """Loshchilov and Hutter (2019), Algorithm 2, in float64; weight decay is decoupled."""

    def __init__(self, parameters: list[Tensor], betas: tuple[float, float], decay: float) -> None:
        self.parameters, self.betas, self.decay, self.step = parameters, betas, decay, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def update(self, gradients: list[Tensor], lr: float) -> None:
        (b1, b2), self.step = self.betas, self.step + 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g**2)
            m_hat, v_hat = m / (1 - b1**self.step), v / (1 - b2**self.step)
            p.data -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + self.decay * p.data)


def by_hand(seen: list[Tensor], before: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Weights, averages, losses, norms and learning rates after each step."""
    maker, judge = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    for name, net in (("maker", maker), ("judge", judge)):
        net.load_state_dict({n: before[f"{name}.{n}"].double() for n, _ in net.named_parameters()})
    mine, theirs = list(maker.parameters()), list(judge.parameters())
    averages = [p.detach().clone() for p in mine + theirs]
    optimisers = AdamW(mine, (0.8, 0.9), 0.3), AdamW(theirs, (0.9, 0.999), 0.0)
    told = []
    for step in range(STEPS):
        sums = [[torch.zeros_like(p) for p in mine], [torch.zeros_like(p) for p in theirs]]
        losses = [0.0, 0.0]
        for x in seen[step * ACCUMULATED : (step + 1) * ACCUMULATED]:
            both = (maker_loss(maker, judge, x.double(), step), mine), (judge_loss(maker, judge, x.double()), theirs)
            for i, (loss, parameters) in enumerate(both):
                losses[i] += loss.item() / ACCUMULATED
                for total, gradient in zip(sums[i], torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient / ACCUMULATED  # a mean over the global batch
        norms = [math.sqrt(sum(float((g**2).sum()) for g in gradients)) for gradients in sums]
        sums[0] = [g * min(1.0, 1.8 / (norms[0] + 1e-6)) for g in sums[0]]  # the judge's clip is off
        progress = (step - 2) / (STEPS - 2)
        share = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * progress))
        rates = 0.05 * (0.1 + 0.9 * share), 0.02
        for optimiser, gradients, rate in zip(optimisers, sums, rates, strict=True):
            optimiser.update(gradients, rate)
        decay = min(0.25, (1 + step) / (10 + step))  # grows at first: 0.1, 0.18, 0.25
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, mine + theirs, strict=True)]
        weights = [p.detach().clone() for p in mine + theirs]
        told.append({"weights": weights, "ema": averages, "loss": losses, "grad_norm": norms, "lr": rates})
    return told


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Toy, list[dict[str, Any]]]:
    """The run's folder, its stage, and what the loop by hand says of the same batches."""
    folder = tmp_path_factory.mktemp("toy")
    words = [f"data.paths=[{photos}]", f"data.validation={photos}", "data.validation_count=2", *WORDS]
    run = Loop(run_config(None, [f"output_dir={folder}", *words]), Toy)
    stage = run.stage
    run.run()
    return folder, stage, by_hand(stage.seen, stage.before)


NAMES = ["maker/weight", "maker/bias", "judge/weight", "judge/bias"]


def test_weights_and_averages_after_every_step(trained: tuple) -> None:
    folder, stage, told = trained
    assert len(stage.seen) >= STEPS * ACCUMULATED
    for step, wanted in enumerate(told, 1):
        state = load_checkpoint(folder / f"checkpoint-{step}")
        assert list(state["weights"]) == list(state["ema"]) == NAMES
        for part in ("weights", "ema"):
            for name, value in zip(NAMES, wanted[part], strict=True):
                torch.testing.assert_close(
                    state[part][name].double(), value, rtol=1e-4, atol=1e-6, msg=f"{step} {name}"
                )


def test_the_log_tells_losses_norms_and_rates(trained: tuple) -> None:
    folder, _, told = trained
    norms = [wanted["grad_norm"][0] for wanted in told]
    assert min(norms) < 1.8 < max(norms), "clipping acts in some steps and not in others"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "maker/loss" in line]
    for line, wanted in zip(lines, told, strict=True):
        for i, phase in enumerate(("maker", "judge")):
            for name in ("loss", "grad_norm", "lr"):
                assert line[f"{phase}/{name}"] == pytest.approx(wanted[name][i], rel=1e-4), (line["step"], phase, name)
        assert line["maker/double"] == pytest.approx(2 * line["maker/loss"], rel=1e-6)


def test_averages_are_validated_and_exported_and_nothing_else_changes(trained: tuple) -> None:
    folder, stage, told = trained
    result = torch.load(folder / "result.pt")
    for name, value in zip(NAMES, told[-1]["ema"], strict=True):
        torch.testing.assert_close(result[name.replace("/", ".")].double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stage.shown[-1].double(), told[-1]["ema"][0], rtol=1e-4, atol=1e-6)
    for name, value in zip(NAMES, told[-1]["weights"], strict=True):
        now = stage.networks.get_parameter(name.replace("/", "."))
        torch.testing.assert_close(now.detach().double(), value, rtol=1e-4, atol=1e-6, msg="the trained ones are back")
    for name in ("frozen.weight", "frozen.bias"):
        assert torch.equal(result[name], stage.before[name])


def test_a_step_sees_the_next_images_of_the_sequence(trained: tuple) -> None:
    """All six of a step differ, and so do the steps."""
    _, stage, _ = trained
    colours = torch.cat(stage.seen[: STEPS * ACCUMULATED])
    assert colours.shape == (36, 3) and len(torch.unique(colours, dim=0)) == 36


def test_initial_weights_depend_on_the_seed_alone(photos: Path, tmp_path: Path) -> None:
    def before(name: str, *words: str) -> Tensor:
        torch.manual_seed(len(name))  # whatever was drawn before
        config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={tmp_path / name}", *WORDS, *words])
        return Loop(config, Toy).stage.before["maker.weight"]

    first = before("a", "seed=3")
    assert torch.equal(first, before("bb", "seed=3", "optimizer.lr=0.1")) and not torch.equal(
        first, before("c", "seed=4")
    )
    torch.manual_seed(seed_of(3, "init"))
    assert torch.equal(first, nn.Linear(3, 3).weight), "earlier runs can be repeated"


def test_bfloat16_is_the_loops_choice_where_the_processor_computes_it(photos, tmp_path, monkeypatch):
    for fast, precision, expected in ((True, "auto", True), (False, "auto", False), (True, "fp32", False)):
        monkeypatch.setattr(torch.cpu, BF16_INSTRUCTIONS[1], lambda fast=fast: fast, raising=False)
        words = [f"data.paths=[{photos}]", f"output_dir={tmp_path}", *WORDS, f"precision={precision}"]
        assert Loop(run_config(None, words), Toy).autocast is expected
