"""Networks: the base's parts, latents, transformer blocks, image prompt, ControlNet and the denoiser."""
