"""Real-world super-resolution with diffusion: the stack that ConsisSR and CCSR share, and ConsisSR's own."""

__version__ = "0.1.0"
__all__ = ["Restorer", "UserError", "__version__"]


def __getattr__(name: str) -> object:
    """Import the public names when they are first used, so that `import consissr` itself costs nothing."""
    if name == "Restorer":
        from consissr.restorer import Restorer

        return Restorer
    if name == "UserError":
        from consissr.errors import UserError

        return UserError
    raise AttributeError(f"module 'consissr' has no attribute {name!r}")
