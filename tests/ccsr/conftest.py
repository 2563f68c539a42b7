"""Fixtures of the training tests, for CCSR's stages."""

from tests.training.conftest import base, photos

__all__ = ["base", "photos"]
