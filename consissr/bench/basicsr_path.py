"""basicsr's own Real-ESRGAN data path on the CPU, with our settings: what tests and the benchmark compare with."""

import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from consissr.data.kernels import FAMILIES
from consissr.data.settings import DegradationConfig
from consissr.errors import UserError


def prepare_basicsr() -> None:
    """Let basicsr 1.4.2 import, which names a module that torchvision dropped in 0.17; call it before the first import.

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


def dataset(folder: str | Path, meta_info: str | Path, config: DegradationConfig) -> Any:
    """basicsr's RealESRGANDataset over the files that `meta_info` lists: 400x400 crops, and kernels, per image."""
    prepare_basicsr()
    from basicsr.data.realesrgan_dataset import RealESRGANDataset

    one, two = config.first, config.second
    return RealESRGANDataset(
        {
            "io_backend": {"type": "disk"},
            "dataroot_gt": str(folder),
            "meta_info": str(meta_info),
            "use_hflip": True,
            "use_rot": False,
            "blur_kernel_size": 21,
            "kernel_list": list(FAMILIES),
            "kernel_prob": one.family_weights,
            "sinc_prob": one.sinc_prob,
            "blur_sigma": one.sigma,
            "betag_range": one.betag,
            "betap_range": one.betap,
            "blur_kernel_size2": 21,
            "kernel_list2": list(FAMILIES),
            "kernel_prob2": two.family_weights,
            "sinc_prob2": two.sinc_prob,
            "blur_sigma2": two.sigma,
            "betag_range2": two.betag,
            "betap_range2": two.betap,
            "final_sinc_prob": config.final_sinc_prob,
        }
    )


def feed_data(hq: torch.Tensor, kernels: list[torch.Tensor], config: DegradationConfig) -> torch.Tensor:
    """LQ [B,3,H/scale,W/scale] in [0,1] that basicsr's RealESRGANModel makes of square hq [B,3,H,W] in [0,1].

    kernels: first, second, last, [B,21,21] each. Left out: sharpening, which neither release does, and the pair pool.
    Draws come from the global random streams.
    """
    prepare_basicsr()
    from basicsr.models.realesrgan_model import RealESRGANModel
    from basicsr.utils import DiffJPEG

    one, two = config.first, config.second
    jpeger = DiffJPEG(differentiable=False)
    model = types.SimpleNamespace(
        is_train=True,
        device="cpu",
        jpeger=lambda x, quality: jpeger(x, quality=quality).contiguous(),  # basicsr's filter takes no other layout
        usm_sharpener=lambda x: x,
        _dequeue_and_enqueue=lambda: None,
        opt={
            "scale": config.scale,
            "gt_size": hq.shape[-1],
            "resize_prob": one.resize_weights,
            "resize_range": one.resize,
            "gaussian_noise_prob": one.gaussian_prob,
            "noise_range": one.gaussian,
            "poisson_scale_range": one.poisson,
            "gray_noise_prob": one.gray_prob,
            "jpeg_range": one.jpeg,
            "second_blur_prob": config.second_blur_prob,
            "resize_prob2": two.resize_weights,
            "resize_range2": two.resize,
            "gaussian_noise_prob2": two.gaussian_prob,
            "noise_range2": two.gaussian,
            "poisson_scale_range2": two.poisson,
            "gray_noise_prob2": two.gray_prob,
            "jpeg_range2": two.jpeg,
        },
    )
    data = {"gt": hq, "kernel1": kernels[0], "kernel2": kernels[1], "sinc_kernel": kernels[2]}
    RealESRGANModel.feed_data(model, data)
    return model.lq
