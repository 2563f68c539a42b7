"""Metrics with learned weights: LPIPS, DISTS, FID, CLIP-IQA, MUSIQ and MANIQA through pyiqa, CLIP-I through open_clip.

Nothing here downloads. Weights are looked for in the folder the user gives, then where pyiqa, torchvision and CLIP
keep theirs; what is missing is reported by name, with its source. pyiqa (since 2026 under the PolyForm
Noncommercial licence) is imported only when one of its metrics is computed.
"""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from consissr.config.sd21 import CLIP_MEAN, CLIP_STD
from consissr.errors import UserError

SOURCES = {
    "pyiqa": "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/",
    "checkpoints": "https://download.pytorch.org/models/",  # torchvision's
    "clip": "https://openaipublic.azureedge.net/clip/models/{digest}/",
}
CLIP_SIDE = 224


@dataclass(frozen=True)
class WeightFile:
    """One file of weights: the folder below torch's hub folder where pyiqa looks for it, and its name."""

    folder: str
    name: str
    digest: str
    """First digits of the SHA-256 of its contents, as its name or address carries them."""

    @property
    def url(self) -> str:
        return SOURCES[self.folder].format(digest=self.digest) + self.name


def _file(folder: str, name: str, digest: str = "") -> WeightFile:
    return WeightFile(folder, name, digest or name.rsplit("-", 1)[1].split(".")[0])


VGG16 = _file("checkpoints", "vgg16-397923af.pth")
VIT_B32 = _file("clip", "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
WEIGHTS: dict[str, tuple[WeightFile, ...]] = {
    "lpips": (_file("pyiqa", "LPIPS_v0.1_alex-df73285e.pth"), _file("checkpoints", "alexnet-owt-7be5be79.pth")),
    "dists": (_file("pyiqa", "DISTS_weights-f5e65c96.pth"), VGG16),
    "fid": (_file("pyiqa", "pt_inception-2015-12-05-6726825d.pth"),),
    "clipiqa": (_file("clip", "RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),),
    "musiq": (_file("pyiqa", "musiq_koniq_ckpt-e95806b9.pth"),),
    "maniqa": (_file("pyiqa", "MANIQA_PIPAL-ae6d356b.pth"),),
    "clip-i": (VIT_B32,),
    "delta-clip-i": (VIT_B32,),
    "clip-i-lr": (VIT_B32,),
}
LPIPS_VGG = (_file("pyiqa", "LPIPS_v0.1_vgg-a78928a0.pth"), VGG16)
"""Weights of the LPIPS that networks are trained with; the metric in tables is the one on AlexNet."""


def find(file: WeightFile, folder: Path | None) -> Path | None:
    """Where `file` lies: below the user's `folder`, in torch's hub folder, or in CLIP's cache; None if nowhere."""
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--weights {folder} is not a folder")
        if named := sorted(folder.rglob(file.name)):
            return named[0]
    caches = [hub() / file.folder] + ([Path.home() / ".cache" / "clip"] if file.folder == "clip" else [])
    return next((cache / file.name for cache in caches if (cache / file.name).is_file()), None)


def missing_text(metric: str, folder: Path | None) -> str:
    """ "" when `metric` can be computed, else why not: which files are missing."""
    names = ", ".join(file.name for file in WEIGHTS[metric] if find(file, folder) is None)
    return f"weights missing: {names}; scripts/eval.py --list-weights says where they come from" if names else ""


@lru_cache
def fingerprint(metric: str, folder: Path | None) -> str:
    """Hash of the weights behind `metric` (16 hexadecimal digits), for records and caches.

    Raises UserError for a file that is not what its name says.
    """
    digests = [checked(file, find(file, folder)) for file in WEIGHTS[metric]]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def checked(file: WeightFile, path: Path) -> str:
    """SHA-256 of the file at `path`. Raises UserError if `file` is another one."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(file.digest):
        raise UserError(
            f"{path} is not {file.name}: its SHA-256 starts with {digest[:8]} instead of {file.digest[:8]}; "
            f"download {file.url} again"
        )
    return digest


def load(metric: str, folder: Path | None, device: str) -> Callable[..., float]:
    """A callable on images (1, 3, H, W) in [0, 1]; raises UserError when weights are missing or do not fit."""
    if reason := missing_text(metric, folder):
        raise UserError(f"{metric}: {reason}")
    if metric.startswith("clip-i"):
        checked(VIT_B32, find(VIT_B32, folder))
        return ClipImageSimilarity(find(VIT_B32, folder), device)
    model = _pyiqa_metric("maniqa-pipal" if metric == "maniqa" else metric, WEIGHTS[metric], folder, device)
    return lambda *images: model(*images).item()


def frechet_distance(sr: list[Path], hr: list[Path], folder: Path | None, device: str) -> float:
    """FID between two sets of image files (pyiqa's default, resized as clean-fid does)."""
    model = _pyiqa_metric("fid", WEIGHTS["fid"], folder, device)
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for label, files in (("sr", sr), ("hr", hr)):  # pyiqa wants a folder that holds nothing else
            folders.append(Path(scratch) / label)
            folders[-1].mkdir()
            for index, file in enumerate(files):
                (folders[-1] / f"{index:06d}{file.suffix}").symlink_to(file.resolve())
        return float(model(*map(str, folders), verbose=False, num_workers=0))


class ClipImageSimilarity:
    """CLIP-I: cosine of two images' ViT-B/32 embeddings, each image resized and cropped to 224 as CLIP does."""

    def __init__(self, weights: Path, device: str) -> None:
        import open_clip

        check_device(device)
        with _readable(weights):
            self.model = open_clip.openai.load_openai_model(str(weights), precision="fp32", device=device)
        self.device = device

    def __call__(self, image, reference) -> float:
        return (self.embed(image) * self.embed(reference)).sum().item()

    def embed(self, image):
        """(1, 3, H, W) in [0, 1] -> (1, 512), of length 1."""
        import torch

        with torch.inference_mode():
            return self.model.encode_image(self._prepare(image), normalize=True)

    def _prepare(self, image):
        """(1, 3, H, W) in [0, 1] -> (1, 3, 224, 224), short side to 224 (bicubic), centre, CLIP's mean and std."""
        import torch
        import torch.nn.functional as F

        height, width = image.shape[-2:]
        scale = CLIP_SIDE / min(height, width)
        size = (max(CLIP_SIDE, round(height * scale)), max(CLIP_SIDE, round(width * scale)))
        image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - CLIP_SIDE) // 2 for side in size)
        image = image[..., top : top + CLIP_SIDE, left : left + CLIP_SIDE].to(self.device)
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (image - mean) / std


def prompt_similarities(image, prompts: list[str], folder: Path | None, device: str) -> list[float]:
    """Softmax over 100 times the cosine similarity of an image (1, 3, H, W) with each prompt, as CLIP's logits are."""
    import open_clip
    import torch

    if reason := missing_text("clip-i", folder):
        raise UserError(f"CLIP similarity: {reason}")
    clip = ClipImageSimilarity(find(VIT_B32, folder), device)
    with torch.inference_mode():
        text = clip.model.encode_text(open_clip.tokenize(prompts).to(device), normalize=True)
        similarity = clip.embed(image) @ text.T
    return (100.0 * similarity).softmax(dim=-1)[0].tolist()


def lpips_network(folder: Path | None):
    """LPIPS on VGG features, a module of two batches in [-1, 1] (pass normalize=False) -> (B, 1), float32 on the CPU.

    Raises UserError where pyiqa or one of the two weight files is missing, saying where they come from.
    """
    if find_spec("pyiqa") is None:
        raise UserError("LPIPS needs pyiqa, which is not installed: pip install 'pyiqa>=0.1.13,<0.2'")
    lacking = [f"{file.name} from {file.url}" for file in LPIPS_VGG if find(file, folder) is None]
    if lacking:
        raise UserError(
            f"LPIPS: weights missing: {', '.join(lacking)}; put them into one folder and name it: deft.weights=FOLDER "
            "(or do without a perceptual loss: deft.perceptual=none)"
        )
    return _pyiqa_metric("lpips-vgg", LPIPS_VGG, folder, "cpu").net


def _pyiqa_metric(pyiqa_name: str, wanted: tuple[WeightFile, ...], folder: Path | None, device: str):
    """pyiqa's metric, made from the files that `find` found and from no other place."""
    import torch

    check_device(device)
    files = {file: find(file, folder) for file in wanted}
    for file, path in files.items():
        checked(file, path)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        for file, path in files.items():
            place = Path(scratch) / file.folder
            place.mkdir(exist_ok=True)
            (place / file.name).symlink_to(path.resolve())
        import pyiqa
        import timm
        from pyiqa.utils import download_util

        options = {"backbone": str(files[WEIGHTS["clipiqa"][0]])} if pyiqa_name == "clipiqa" else {}
        offline = lambda name, **_: timm_create(name, pretrained=False)  # noqa: E731
        timm_create = timm.create_model  # MANIQA asks timm for weights that its own file then replaces
        with (
            mock.patch.object(download_util, "DEFAULT_CACHE_DIR", str(Path(scratch) / "pyiqa")),
            mock.patch.object(torch.hub, "get_dir", lambda: scratch),
            mock.patch.object(timm, "create_model", offline),
            _readable(*files.values()),
        ):
            return pyiqa.create_metric(pyiqa_name, device=torch.device(device), **options)


def check_device(device: str) -> None:
    """Raises UserError where torch cannot use `device` on this machine."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {device} cannot be used here: {reason}; use another, such as cpu") from error


@contextlib.contextmanager
def _readable(*files: Path):
    """Weights that cannot be read or do not fit the network are the user's to mend."""
    try:
        yield
    except (RuntimeError, KeyError, EOFError, OSError, ValueError) as error:
        names = ", ".join(str(file) for file in files)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{names} cannot be used: {reason}; download the file again") from error


def hub() -> Path:
    import torch

    return Path(torch.hub.get_dir())
