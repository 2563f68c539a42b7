"""Stage 'rclip': CLIP's image tower made robust to degradation (Sec. 3.3, ConsisSR).

A student, trained, sees the low-quality image; its teacher, the frozen tower that it starts from, sees the photograph.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from consissr.config.training import TrainConfig
from consissr.models.image_prompt import tower_features
from consissr.training.stage import EXPORT, Batch, Phase, Stage
from consissr.weights.find import find_model
from consissr.weights.image_encoder import find_tower, has_tower, load_tower, save_tower

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


class Rclip(Stage):
    """Squared error between the two towers' pooled features (Eq. 3, ConsisSR), and between their patches' (ours).

    Features are not L2-normalised, as in the release; the paper is silent.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: VisionTransformer | None = None,
        student: VisionTransformer | None = None,
    ) -> None:
        """Without towers: the teacher is `model.image_encoder`'s, the student `init`'s or a copy of the teacher."""
        self.config = config
        self.teacher = teacher or find_tower(config.model)
        if student is None:
            init = config.init if not config.init or has_tower(config.init) else find_model(config.init)
            student = load_tower(Path(init))[0] if init else deepcopy(self.teacher)
        self.student = student
        self.networks = nn.ModuleDict({"teacher": self.teacher, "student": self.student})
        # the towers' blocks: `tower_features` does not call the towers themselves
        self.compile_modules = [*self.teacher.transformer.resblocks, *self.student.transformer.resblocks]
        self.phases = [Phase("tower", dict(self.student.named_parameters()), self.loss, config.optimizer)]

    def prepare(self, batch: Batch) -> None:
        """The teacher's features of the photographs, (B, E) and (B, P, E)."""
        batch.cache["pooled"], batch.cache["patches"] = tower_features(self.teacher, batch.hq)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Mean over elements; `patches` (ours) is there, and counts, where the model attends to patch tokens."""
        pooled, patches = tower_features(self.student, batch.lq)
        # |RCLIP(x_LQ) - CLIP(x_HQ)|^2  (Eq. 3, ConsisSR), a mean over elements as in the release
        losses = {"pooled": F.mse_loss(pooled.float(), batch.cache["pooled"].float())}
        total = losses["pooled"]
        if self.config.model.image_tokens == "patches":
            losses["patches"] = F.mse_loss(patches.float(), batch.cache["patches"].float())
            total = total + self.config.rclip.patch_weight * losses["patches"]
        return {"loss": total, **losses}

    def export(self, folder: Path) -> None:
        """image_encoder/ without an adapter: what the stages 'tala' and 'nuts' start an image branch from."""
        save_tower(folder, self.student, EXPORT[self.config.export_precision])
