"""Diffusion without networks: schedule, p(t), sampling plans, the sampler, tiles of the latent."""
