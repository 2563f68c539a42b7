"""What CCSR adds to the stack of `consissr`: non-uniform timestep sampling, its training stages, decoder tuning."""

__all__ = ["nuts_plan", "sampler_plan"]


def __getattr__(name: str) -> object:
    """Import the public names when they are first used."""
    if name in __all__:
        from ccsr import timesteps

        return getattr(timesteps, name)
    raise AttributeError(f"module 'ccsr' has no attribute {name!r}")
