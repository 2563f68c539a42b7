"""Stage 'rclip'."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class RclipConfig:
    """Stage 'rclip' (Eq. 3, ConsisSR): the image tower made robust to degradation."""

    patch_weight: float = 1.0
    """Weight of the patch tokens' error (ours) beside the pooled one's; read where
    `model.image_tokens` is 'patches'."""
