"""The fixed validation set: the same crops, degradations and noise every time; PSNR and SSIM on Y, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.metrics import psnr, ssim
from consissr.images.rgb8 import to_pil
from consissr.training.stage import Batch, Stage, held_out

VALIDATION_SEED = 2024


class Validation:
    """Runs a stage's `restore` on the fixed set and writes `output_dir/validation/step-N.png` (LQ, result, HQ).

    Its first image is read at once: a folder of no use would otherwise show hours later.
    """

    def __init__(self, config: TrainConfig, make_batch: Callable[[list[dict]], Batch]) -> None:
        self.dataset = held_out(config.data, VALIDATION_SEED)
        try:
            self.dataset[0]
        except UserError as error:
            message = str(error).replace("data.paths", "data.validation").replace("lq_paths", "validation_lq")
            raise UserError(message) from error
        self.count = min(config.data.validation_count, len(self.dataset))
        self.micro_batch = config.micro_batch
        self.make_batch = make_batch
        self.folder = Path(config.output_dir) / "validation"

    @torch.no_grad()
    def run(self, stage: Stage, step: int) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM on Y of the results and of the LQ images; {} if the stage makes no image."""
        rows, values = [], {}
        for first in range(0, self.count, self.micro_batch):
            numbers = range(first, min(first + self.micro_batch, self.count))
            batch = self.make_batch([self.dataset[n] for n in numbers])
            stage.prepare(batch)
            restored = stage.restore(batch)
            if restored is None:
                return {}
            hq = batch.hq.float()
            for name, image in (("lq", batch.lq), ("restored", restored)):
                if image is None:
                    continue
                image = image.float().clamp(-1, 1)
                values.setdefault(f"validation/{name}_psnr", []).extend(psnr(image / 2 + 0.5, hq / 2 + 0.5).tolist())
                values.setdefault(f"validation/{name}_ssim", []).extend(ssim(image / 2 + 0.5, hq / 2 + 0.5).tolist())
            columns = [image for image in (batch.lq, restored, hq) if image is not None]
            rows.append(torch.cat([c.float().clamp(-1, 1) for c in columns], dim=-1))  # (B, 3, S, columns S)
        self.write_grid(torch.cat(rows)[:8], step)
        return {name: sum(v) / len(v) for name, v in values.items()}

    def write_grid(self, rows: torch.Tensor, step: int) -> None:
        """One image per row: LQ (where there is one), result, HQ."""
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = torch.cat(list(rows), dim=1)  # (3, rows S, columns S)
        to_pil(grid[None]).save(self.picture(step))

    def picture(self, step: int) -> Path:
        """Where the images of a step are."""
        return self.folder / f"step-{step}.png"
