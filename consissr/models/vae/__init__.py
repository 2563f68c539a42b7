"""The autoencoder: latents, tiles, and its fast paths on the CPU."""
