"""Fixtures that several test files share."""

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, before torch counts them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compare bits and dtypes with what a processor computes in float32, whatever machine they run on. Before torch
# looks, and for children, too; CUDA_VISIBLE_DEVICES=0 shows the GPU again.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for jobs in background, whose trainings ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported stays: looking for garbage among a million such objects took more than half of the collection's time.
gc.disable()

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: none is left to one process at the end while the other waits."""
    long = ("tests/training/", "tests/conformance/", "tests/weights/", "tests/test_cuda.py")
    items.sort(key=lambda item: not item.nodeid.startswith(long))


def pytest_collection_finish() -> None:
    """From here on garbage is collected, among what the tests make."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that does not belong to the repository; it stands beside it where there is any."""
    folder = ROOT.parent / "shared"
    if not (folder / "conformance").is_dir():  # any folder of that name may stand there
        pytest.skip("reference data (../shared) is not on this machine")
    return folder


@pytest.fixture(autouse=True, scope="session")
def float32_on_the_cpu() -> None:
    """Automatic precision is float32 here, also on processors that compute bfloat16 fast."""
    import torch

    from consissr.weights import precision

    for name in precision.BF16_INSTRUCTIONS:
        setattr(torch.cpu, name, lambda: False)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder by its name and the function that fills it, once for all worker processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        from filelock import FileLock

        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                (base / name).mkdir()
                fill(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """Imports a script by its name, such as "infer", for tests that call its `main`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, and its base beside it: everything the real ones have, in small."""
    return make_tiny_model(tmp_path_factory.mktemp("models"))


def make_tiny_model(folder: Path) -> Path:
    """Writes it below `folder`."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from ccsr import nuts_plan
    from consissr.config.folder import FolderConfig
    from consissr.config.model import ModelConfig
    from consissr.config.sampler import SamplerConfig
    from consissr.models.controlnet import build_controlnet
    from consissr.weights.folder import save_model
    from consissr.weights.model import Model

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        sample_size=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
    )
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for name, part in (("unet", unet), ("vae", vae), ("scheduler", scheduler)):
        part.save_pretrained(folder / "base" / name)

    model = ModelConfig(base=str(folder / "base"), hint="conv")
    controlnet = build_controlnet(unet, model)
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.1)  # they start at zero, where the condition would have no effect
    timesteps = [[step.t, step.t_next, step.kind] for step in nuts_plan(6, 2 / 3, 0.5)]
    config = FolderConfig(model=model, sampler=SamplerConfig(timesteps=timesteps))
    own = {"prompts": {"": torch.randn(1, 3, 8)}, "own_prompts": True}  # the base has no text encoder
    save_model(folder / "tiny", Model(config=config, controlnet=controlnet, unet=None, latents=None, **own))
    return folder / "tiny"
