"""Lets basicsr 1.4.2 import beside current torchvision. Call `prepare_basicsr` before the first basicsr import."""

import sys
import types
from importlib.util import find_spec

from consissr.errors import UserError


def prepare_basicsr() -> None:
    """Provide `torchvision.transforms.functional_tensor`, which torchvision dropped in 0.17 and basicsr still names.

    Raises UserError where basicsr is not installed.
    """
    if find_spec("basicsr") is None:
        raise UserError(
            "the comparison needs basicsr, which builds on Python 3.11 and 3.12: pip install basicsr==1.4.2"
        )
    name = "torchvision.transforms.functional_tensor"
    if name in sys.modules:
        return
    from torchvision.transforms import functional

    module = types.ModuleType(name, "Stand-in for a removed module; holds the one function that basicsr takes from it.")
    module.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules[name] = module
