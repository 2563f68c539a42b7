"""On a GPU that is there: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py. Skipped elsewhere."""

from dataclasses import replace

import pytest
import torch

from consissr.data.degradation import degrade, preset
from consissr.images import codec
from consissr.models.fast import set_kernels
from consissr.restorer import Restorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and CUDA_VISIBLE_DEVICES=0")
LEVEL = 1 / 127.5


@pytest.fixture(autouse=True, scope="module")
def float32_is_float32():
    set_kernels(one_size=False)


@pytest.mark.parametrize("model", ["nano-ccsr", "nano-consissr"])
def test_restoring_agrees_with_the_cpu(model):
    lq = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = Restorer.load(model, "cpu", "fp32")(lq)
    found = Restorer.load(model, "cuda", "fp32")(lq)
    assert found.device.type == "cpu" and (found - expected).abs().max() <= LEVEL


@pytest.mark.parametrize(
    "form", [codec.Form(), codec.Form(bits=16), codec.Form(grey=True, bits=16), codec.Form(alpha=True)]
)
def test_files_agree_with_the_cpu(tmp_path, form):
    """Through the whole numbers that travel, both ways."""
    pixels = torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec.write(tmp_path / "a.png", codec.Photo(pixels, pixels[:1] / 2 + 0.5 if form.alpha else None, form))
    found = []
    for device in ("cpu", "cuda"):
        photo = codec.read(tmp_path / "a.png", device)
        y = Restorer.load("nano-ccsr", device, "fp32")(photo.pixels[None])
        assert y.device.type == device
        codec.write(tmp_path / f"{device}.png", photo.restored(y[0]))
        found.append(codec.read(tmp_path / f"{device}.png").pixels)
    assert (found[0] - found[1]).abs().max() <= LEVEL


def test_compiled_networks_restore_the_same_at_every_size():
    restorer, sizes = Restorer.load("nano-ccsr", "cuda", "fp32"), [(32, 32), (24, 40), (32, 32), (40, 24)]
    images = [torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1 for size in sizes]
    plain = [restorer(image) for image in images]
    restorer.compile()
    for image, expected in zip(images, plain, strict=True):
        assert (restorer(image) - expected).abs().max() <= LEVEL


def test_degrading_without_noise_agrees_with_the_cpu():
    """The scalars that are drawn are the same everywhere, the noise fields are the device's own."""
    hq = torch.rand(2, 3, 192, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = preset("ccsr")
    quiet = [replace(stage, gaussian=(0.0, 0.0), gaussian_prob=1.0) for stage in (config.first, config.second)]
    config = replace(config, first=quiet[0], second=quiet[1])
    for here, there in zip(degrade(hq, config, [3, 4]), degrade(hq.cuda(), config, [3, 4]), strict=True):
        off = (here - there.cpu()).abs()
        assert off.mean() <= LEVEL / 10 and off.max() <= 0.1  # where JPEG rounds the other way
