"""Stable Diffusion 2.1-base in numbers: its noise schedule, and the sizes of its networks."""

SD_BETAS = (1000, 0.00085, 0.012)
"""Timesteps T, first and last beta of the "scaled linear" schedule."""

SCALING_FACTOR = 0.18215
"""What latents are multiplied by to be of about unit deviation."""

UNET = {
    "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
"""Where diffusers' UNet2DConditionModel differs from its defaults."""

VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 768,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
"""Where diffusers' AutoencoderKL differs from its defaults."""

TEXT = {
    "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
"""Where transformers' CLIPTextConfig differs from its defaults."""

TOWER = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
"""CLIP ViT-H/14, whose text encoder SD2.1 has: open_clip's `vision_cfg`; its embedding has TEXT's 1024 channels."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Channel means and standard deviations of the training images of every CLIP, RGB in [0, 1]."""

TOKENS = 77
"""Tokens of a prompt."""
