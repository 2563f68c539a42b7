"""The fixed validation set: the same crops, degradations and noise every time; PSNR and SSIM on Y, and pictures."""

from collections.abc import Callable
from pathlib import Path

import torch

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.metrics import psnr, ssim
from consissr.images.rgb8 import to_pil
from consissr.training.processes import Processes
from consissr.training.stage import Batch, Stage, held_out

VALIDATION_SEED = 2024
SHOWN = 8
"""Images in the picture."""


class Validation:
    """Runs a stage's `restore` on the fixed set and writes `output_dir/validation/step-N.png` (LQ, result, HQ).

    Its first image is read at once: a folder of no use would otherwise show hours later.
    """

    def __init__(self, config: TrainConfig, make_batch: Callable[[list[dict]], Batch], processes: Processes) -> None:
        self.dataset = held_out(config.data, VALIDATION_SEED)
        try:
            self.dataset[0]
        except UserError as error:
            message = str(error).replace("data.paths", "data.validation").replace("lq_paths", "validation_lq")
            raise UserError(message) from error
        self.count = min(config.data.validation_count, len(self.dataset))
        self.micro_batch = config.micro_batch
        self.make_batch, self.processes = make_batch, processes
        self.folder = Path(config.output_dir) / "validation"

    @torch.no_grad()
    def run(self, stage: Stage, step: int) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM on Y of the results and of the LQ images; {} if the stage makes no image.

        Every process restores its share of the micro-batches, and all of them know the result.
        """
        starts = range(0, self.count, self.micro_batch)
        mine = {first: self.restored(stage, first) for first in starts[self.processes.rank :: self.processes.world]}
        everyone = {first: done for share in self.processes.gathered(mine) for first, done in share.items()}
        done = [everyone[first] for first in starts if everyone[first]]
        if not done:
            return {}
        if self.processes.rank == 0:
            self.write_grid(torch.cat([rows for _, rows in done])[:SHOWN], step)
        values = {name: [v for figures, _ in done for v in figures[name]] for name in done[0][0]}
        return {name: sum(v) / len(v) for name, v in values.items()}

    def restored(self, stage: Stage, first: int) -> tuple[dict[str, list[float]], torch.Tensor] | None:
        """Figures of each image of the micro-batch that begins at image `first`, and those that are shown as rows.

        A row (3, S, columns S) in [-1, 1] holds LQ (where there is one), result and HQ. None: the stage makes no image.
        """
        batch = self.make_batch([self.dataset[n] for n in range(first, min(first + self.micro_batch, self.count))])
        stage.prepare(batch)
        restored = stage.restore(batch)
        if restored is None:
            return None
        images = {"lq": batch.lq, "restored": restored, "hq": batch.hq}
        images = {name: image.float().clamp(-1, 1) for name, image in images.items() if image is not None}
        unit = {name: image / 2 + 0.5 for name, image in images.items()}
        figures = {}
        for name in [name for name in unit if name != "hq"]:
            figures[f"validation/{name}_psnr"] = psnr(unit[name], unit["hq"]).tolist()
            figures[f"validation/{name}_ssim"] = ssim(unit[name], unit["hq"]).tolist()
        return figures, torch.cat(list(images.values()), dim=-1)[: max(0, SHOWN - first)].cpu()

    def write_grid(self, rows: torch.Tensor, step: int) -> None:
        """One image per row: LQ (where there is one), result, HQ."""
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = torch.cat(list(rows), dim=1)  # (3, rows S, columns S)
        to_pil(grid[None]).save(self.picture(step))

    def picture(self, step: int) -> Path:
        """Where the images of a step are."""
        return self.folder / f"step-{step}.png"
