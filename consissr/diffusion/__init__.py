"""Diffusion without networks: schedule, training targets, sampling plans, the sampler, tiles of the latent."""
