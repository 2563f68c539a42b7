"""A training stage on a GPU: images per second, share of the ceiling, waiting for data, what fits into which memory."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from consissr.bench.data import write_photos
from consissr.bench.models import drawn
from consissr.bench.process import peak, start_peak
from consissr.models.fast import set_kernels
from consissr.models.memory import is_out_of_memory
from consissr.nano.config import run_config
from consissr.training import dry_run
from consissr.training.feed import Feed
from consissr.training.loop import Loop
from consissr.training.stage import Stage

CARDS = (24, 40, 80)
"""GB of common cards; a tenth is left to the driver and to fragments."""
STEPS, LINE = 9, 3
"""Steps of a timing, and of each of its lines; the first line warms up."""
TINY = [
    "model.base=nano",
    "model.image_encoder=base",
    "data.crop=96",
    "sampler.short_side=0",
    "deft.discriminator_width=8",
]
"""Changes for a rehearsal."""


class Timed(Loop):
    """The loop without files: what its log lines tell of time is kept."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.log, self.lines = None, []
        self.frozen.originals.clear()  # nothing is exported; in a run they are on the CPU

    def save(self, wait: bool) -> None:
        """A rehearsal keeps no checkpoint."""

    def tell(self) -> None:
        """Seconds per step, those of them that waited for data, the share of what matrix products reach."""
        self.window.share(self.processes)
        told = self.window.close(self.step)
        self.lines.append((1 / told["steps_per_second"], told["data_seconds"], told["peak_share"]))

    def timed(self, images: int) -> dict[str, float]:
        """STEPS steps of so many images each."""
        self.config.micro_batch = self.config.batch = images
        self.feed = Feed(self.config, self.device, 0, 1, self.stage.needs_lq)
        self.micro_batches, self.step, self.lines = 1, 0, []
        self.window.work, self.window.images = 0.0, images
        self.train()
        seconds, waited, share = (sum(column) / len(column) for column in zip(*self.lines[1:], strict=True))
        return {"images/s": images / seconds, "waiting for data": waited / seconds, "share of the ceiling": share}

    def step_bytes(self, images: int) -> int:
        """Most bytes in use during a step of so many images."""
        batch = self.feed.make_batch([self.feed.dataset[n] for n in range(images)])
        start_peak(self.device.type)
        totals: dict[str, Any] = {}
        self.accumulate(batch, totals)
        self.update(totals)
        return peak(self.device.type)


def stage(config: str, builder: Any, words: list[str], device: str) -> dict[str, Any]:
    """A stage as its config has it (one process, nothing accumulated), with random weights and made-up photographs."""
    set_kernels(one_size=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_photos(Path(scratch))
        run = [f"data.paths=[{scratch}]", f"output_dir={scratch}/run", "init=", "tracker=none", "validate_every=0"]
        run.append("skip_not_finite=true")  # what random weights do with gradients is not what is measured
        run += [f"steps={STEPS}", f"log_every={LINE}", f"checkpoint_every={STEPS}", *words]
        run.append("batch=${micro_batch}")
        loop = Timed(run_config(config, run), random_weights(builder, torch.device(device)))
        try:
            return measured(loop)
        finally:
            loop.processes.close()


def measured(loop: Timed) -> dict[str, Any]:
    """Timing, work, memory."""
    own = loop.config.micro_batch
    figures = {f"{name}, {own} images": value for name, value in loop.timed(own).items()}
    figures["G multiply-accumulates per image"] = loop.window.work / 2 / 1e9
    figures |= memory(loop, "")
    networks = [m for m in loop.stage.networks.modules() if hasattr(m, "enable_gradient_checkpointing")]
    denoisers = [m for m in networks if not hasattr(m, "encoder")]  # the autoencoder runs without gradients
    if any(p.requires_grad for m in denoisers for p in m.parameters()):
        for network in denoisers:
            network.enable_gradient_checkpointing()
        figures |= memory(loop, ", checkpointing")
        more = {f"{name}, {2 * own} images, checkpointing": v for name, v in loop.timed(2 * own).items()}
        figures |= more
    return figures


def memory(loop: Timed, what: str) -> dict[str, Any]:
    """The largest micro-batch for each of CARDS, by the line through two sizes' peaks (memory is linear in it)."""
    sizes, peaks = (1, 3), []
    for size in sizes:
        try:
            peaks.append(loop.step_bytes(size))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {f"memory{what}": f"{size} images do not fit"}
    return {f"peak of {n}, MB{what}": p / 2**20 for n, p in zip(sizes, peaks, strict=True)} | {
        f"micro-batch in {card} GB{what}": largest(sizes, peaks, 0.9 * card * 1e9) for card in CARDS
    }


def largest(sizes: tuple[int, int], peaks: list[int], room: float) -> int:
    """How many images fit into so many bytes."""
    each = max((peaks[1] - peaks[0]) / (sizes[1] - sizes[0]), 1.0)
    return max(0, int((room - peaks[0]) // each) + sizes[0])


def random_weights(builder: Any, device: torch.device) -> Any:
    """What `Loop` takes for a stage class: the stage with its networks at their full size, drawn on the device."""

    def build(config: Any) -> Stage:
        made = dry_run.build(config, builder)
        dry_run.exchange(made, lambda networks: drawn(networks, device, torch.float32, 0))
        for holder in (made, getattr(made, "first", None)):
            if hasattr(holder, "text"):
                holder.text = torch.randn(holder.text.shape, device=device)
        return made

    build.needs_lq = builder.needs_lq
    return build
