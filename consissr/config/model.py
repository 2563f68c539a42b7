"""What the weights of a model need."""

from dataclasses import dataclass, field

from consissr.config.loading import check_word
from consissr.errors import UserError


@dataclass(kw_only=True)
class ModelConfig:
    """What the weights of a model need: fixed when it is trained or converted, stored in its folder."""

    base: str = "sd21-base"
    """Base model: 'sd21-base' (known mirrors), a bundled name ('nano'), a diffusers folder, a file or a hub id;
    in a model folder's config.yaml "./..." is a folder inside it."""
    hint: str = "conv"
    """How z_lq enters the ControlNet: 'conv' (CCSR v2, one 3x3 convolution) or 'stack' (ConsisSR, eight)."""
    position_embedding: int = 0
    """Side of the latent that learned self-attention positions are made for (ConsisSR: 64); 0 turns them off."""
    unet_trained: list[str] = field(default_factory=list)
    """Parts of the base's UNet (prefixes of names) that are trained and stored with the ControlNet ("we first finetune
    the pre-trained SD", Sec. IV-A, CCSR); empty: the UNet stays as it is (CCSR v1 and v2)."""
    unet_lora: int = 0
    """Rank of low-rank adapters (LoRA) of the UNet's attention that are trained and stored with the ControlNet, in
    diffusers' format (needs peft to train): fits 24 GB where `unet_trained` does not; 0: none (both papers)."""
    transposed_attention: bool = False
    """Channel-wise self-attention after the spatial one (Sec. 3.3, ConsisSR)."""
    image_prompt: str = "none"
    """Image branch of the cross-attention: 'none', 'hpa', 'hpa_separate' or 'ip_adapter' (Table 3, ConsisSR)."""
    image_kv: str = "shared"
    """Keys and values of the HPA image branch: 'shared' with the text's (paper) or 'separate', copies of them
    that are not trained (as released). hpa_separate shares them, IP-Adapter has its own."""
    image_tokens: str = "pooled"
    """Image tokens: 'pooled' (one, as released: attention to it has weight 1 whatever the query) or 'patches' (ours:
    one per CLIP patch). The paper says "image embedding" (Sec. 3.3)."""
    image_encoder: str = "base"
    """Where a new image branch takes CLIP's image tower from: 'base' (image_encoder/ of the base's folder), a folder
    with image_encoder/ (a run of stage 'rclip') or a bundled model (its tower alone: 'nano-consissr'), or
    'open_clip:NAME/TAG' or '/FILE' (open_clip's weights by tag or as a file; SD2.1's tower is
    open_clip:ViT-H-14/laion2b_s32b_b79k)."""
    adapter: str = "mlp"
    """Between image encoder and keys and values: 'none' (the paper: Sec. 3.3 feeds RCLIP's embedding to them as it is,
    for which it must be as wide as the text's) or 'mlp' (the release's trained three layers, which the paper does not
    mention)."""
    adapter_init: str = "default"
    """How a new adapter starts: 'default' (PyTorch's) or 'as_released' (last layer zero, no gradient passes)."""

    def __post_init__(self) -> None:
        check_word(self.hint, ("conv", "stack"), "model.hint")
        if self.unet_lora < 0:
            raise UserError(f"model.unet_lora is {self.unet_lora}: use a rank, such as 16, or 0 for none")
        if self.unet_lora and self.unet_trained:
            raise UserError("model.unet_lora and model.unet_trained both change the UNet: use one of them")
        if self.position_embedding < 0:
            raise UserError(f"model.position_embedding is {self.position_embedding}: use a side, or 0 to turn it off")
        check_word(self.image_prompt, ("none", "hpa", "hpa_separate", "ip_adapter"), "model.image_prompt")
        check_word(self.image_kv, ("shared", "separate"), "model.image_kv")
        check_word(self.image_tokens, ("pooled", "patches"), "model.image_tokens")
        check_word(self.adapter, ("mlp", "none"), "model.adapter")
        check_word(self.adapter_init, ("default", "as_released"), "model.adapter_init")
