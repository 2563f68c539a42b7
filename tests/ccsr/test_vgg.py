"""VGG16 as DeFT's perceptual loss: the same network as torchvision's, LPIPS's comparison, weights from a Keras file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ccsr.vgg import BGR_MEAN, BLOCKS, VggDistance, convert_keras
from consissr.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights as torchvision's vgg16 has them, the classifier's left out."""
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    torch.manual_seed(0)
    vgg16 = pytest.importorskip("torchvision.models").vgg16(weights=None)
    save_file({f"features.{n}": w for n, w in vgg16.features.state_dict().items()}, file)
    return file


def test_the_features_are_those_of_torchvision(weights: Path) -> None:
    """relu1_2, 2_2, 3_3, 4_3 and 5_3 of torchvision's network, whose input is normalised by ImageNet's moments."""
    from torchvision.models import vgg16
    from torchvision.transforms.functional import normalize

    features = vgg16(weights=None).features
    ours = VggDistance(weights)
    features.load_state_dict({n.removeprefix("features."): w for n, w in ours.state_dict().items()})
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    x, wanted = normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), []
    with torch.no_grad():
        for i, layer in enumerate(features):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):
                wanted.append(x.clone())
        found = ours.maps(image)
    assert [m.shape for m in found] == [m.shape for m in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_distance_is_that_of_unit_vectors(weights: Path) -> None:
    """Sum over layers of the mean over pixels of |u - v|^2, features of unit length; no gradient to `wanted`."""
    distance = VggDistance(weights)
    image, wanted = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (1, 2))
    by_hand = 0
    for m, g in zip(distance.maps(image), distance.maps(wanted), strict=True):
        by_hand = by_hand + (F.normalize(m, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))
    image.requires_grad_(True)
    wanted.requires_grad_(True)
    found = distance(image, wanted)
    torch.testing.assert_close(found[:, 0], by_hand, rtol=1e-4, atol=1e-5)
    assert found.min() > 0.01
    found.sum().backward()
    assert image.grad.abs().sum() > 0
    assert wanted.grad is None
    assert distance(wanted, wanted).abs().max() < 1e-5


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="lacks features.0.bias and 24 more"):
        VggDistance(tmp_path / "half.safetensors")


def test_a_keras_file_gives_the_same_features(tmp_path: Path) -> None:
    """Kernels (3, 3, in, out) for BGR in [0, 255] less a mean: the first convolution sees what Keras' would."""
    h5py = pytest.importorskip("h5py")
    generator = torch.Generator().manual_seed(0)
    before, first = 3, {}
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for block, widths in enumerate(BLOCKS, 1):
            for i, width in enumerate(widths):
                group = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                kernel, bias = torch.randn(3, 3, before, width, generator=generator), torch.full((width,), float(block))
                file[f"{group}/0"], file[f"{group}/1"] = kernel.numpy(), bias.numpy()
                first, before = first or {"kernel": kernel, "bias": bias}, width
    state = convert_keras(tmp_path / "hed.weights.h5")
    assert state.keys() == VggDistance(None).state_dict().keys()
    assert state["features.28.bias"].eq(5).all()
    assert state["features.2.weight"].shape == (64, 64, 3, 3)
    image = torch.rand(1, 3, 8, 8, generator=generator)  # RGB in [0, 1]
    bgr = image.flip(1) * 255 - torch.tensor(BGR_MEAN).view(1, 3, 1, 1)
    wanted = F.conv2d(bgr, first["kernel"].permute(3, 2, 0, 1), first["bias"])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = F.conv2d((image - mean) / std, state["features.0.weight"], state["features.0.bias"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)
