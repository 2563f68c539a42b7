"""The discriminator of CCSR's released decoder tuning: heads on the features of a frozen DINO (StyleGAN-T's design).

Images go through random shifts and cutouts, then a frozen ViT; each of five of its token maps has a small head of
spectrally normalised convolutions, whose logits are weighted by a projection of what another frozen ViT says about the
low-quality image. Module names follow the release, so that its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.errors import UserError, reason_of
from consissr.training.precision import without_autocast
from consissr.weights.files import read_weights
from consissr.weights.hub import fetch, is_hub_id

FEATURE_BLOCKS = (2, 5, 8, 11)
"""Blocks whose outputs are judged, beside the embedded patches."""
SHIFT, CUTOUT = 0.125, 0.2
"""Largest shift and side of the cutout, as fractions of the image's side."""
CROP = 0.5
"""Probability that the ViT is shown a window of its own size instead of the whole image, made smaller."""
MAPS = 64
"""Channels in which a head compares features and condition."""
Window = tuple[int, int] | None
"""Top and left of such a window; None: the whole image."""


class ViT(VisionTransformer):
    """timm's vision transformer as DINO v1 has it and, with layer scales, DINOv2."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, layer_scale: bool = False) -> None:
        scale = 1.0 if layer_scale else None
        super().__init__(side, patch, num_classes=0, embed_dim=width, depth=depth, num_heads=heads, init_values=scale)
        self.side = side

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Embedded tokens, then every block's output, each (B, 1 + N, D); x (B,3,side,side), normalised."""
        tokens = [self._pos_embed(self.patch_embed(x))]
        for block in self.blocks:
            tokens.append(block(tokens[-1]))
        return tokens


class SpectralConv1d(nn.Module):
    """A 1-d convolution divided by its largest singular value, estimated by one power iteration per training pass."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv1d(channels, out, kernel)
        self.weight_orig, self.bias = conv.weight, conv.bias
        self.register_buffer("weight_u", F.normalize(torch.randn(out), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(channels * kernel), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> (B, out, N), circular at the ends."""
        matrix = self.weight_orig.flatten(1)
        with without_autocast(x.device):
            if self.training:
                with torch.no_grad():
                    self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0))
                    self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0))
            sigma = self.weight_u.clone() @ (matrix @ self.weight_v.clone())
        margin = self.weight_orig.shape[2] // 2
        x = F.pad(x, (margin, margin), mode="circular")
        return F.conv1d(x, self.weight_orig / sigma, self.bias)


def block(width: int, kernel: int) -> nn.Sequential:
    """Spectral convolution, GroupNorm, LeakyReLU."""
    return nn.Sequential(SpectralConv1d(width, width, kernel), nn.GroupNorm(4, width), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """(fn(x) + x) / sqrt(2)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> the same shape."""
        return (self.fn(x) + x) / 2**0.5


class ConditionMap(nn.Module):
    """A linear layer with weights of unit variance, scaled when used."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.zeros(out))

    def forward(self, c: Tensor) -> Tensor:
        """(B, width) -> (B, out)."""
        return F.linear(c, self.weight / self.weight.shape[1] ** 0.5, self.bias)


class Head(nn.Module):
    """Logits (B, N) for one token map (B, D, N) under a condition (B, c_dim)."""

    def __init__(self, width: int, c_dim: int) -> None:
        super().__init__()
        self.main = nn.Sequential(block(width, 1), Residual(block(width, 9)))
        self.cls = SpectralConv1d(width, MAPS, 1)
        self.cmapper = ConditionMap(c_dim, MAPS)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Projection of the features of x (B, D, N) on the condition c (B, c_dim): (B, N)."""
        features, condition = self.cls(self.main(x)), self.cmapper(c)
        return (features * condition[:, :, None]).sum(1) / condition.shape[1] ** 0.5


@dataclass
class Augmentation:
    """One draw of shifts and cutouts: (B,) integers each; shift_x moves rows, shift_y columns (the release's names)."""

    shift_x: Tensor
    shift_y: Tensor
    centre_x: Tensor
    centre_y: Tensor

    @classmethod
    def draw(cls, generators: Sequence[torch.Generator], height: int, width: int) -> Augmentation:
        """Uniform shifts of up to SHIFT of the side; uniform centres of the cutout. One generator per image."""

        def integers(low: int, high: int) -> Tensor:
            return torch.cat([torch.randint(low, high, (1,), generator=g) for g in generators])

        reach, holes = [int(n * SHIFT + 0.5) for n in (height, width)], [int(n * CUTOUT + 0.5) for n in (height, width)]
        return cls(
            integers(-reach[0], reach[0] + 1),
            integers(-reach[1], reach[1] + 1),
            integers(0, height + 1 - holes[0] % 2),
            integers(0, width + 1 - holes[1] % 2),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B,3,H,W) shifted, zeros moving in, then with a square of zeros."""
        _, _, height, width = x.shape
        row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        rows, columns = row + self.shift_x.to(row)[:, None], column + self.shift_y.to(column)[:, None]
        inside = _between(rows, height)[:, None, :, None] & _between(columns, width)[:, None, None, :]
        place = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
        x = x[torch.arange(len(x), device=x.device)[:, None, None], :, *place].permute(0, 3, 1, 2) * inside
        hole = [
            _between(position - centre.to(position)[:, None] + size // 2, size)
            for position, centre, size in (
                (row, self.centre_x, int(height * CUTOUT + 0.5)),
                (column, self.centre_y, int(width * CUTOUT + 0.5)),
            )
        ]
        return x * ~(hole[0][:, None, :, None] & hole[1][:, None, None, :])


def _between(position: Tensor, length: int) -> Tensor:
    return (position >= 0) & (position < length)


class ProjectedDiscriminator(nn.Module):
    """Images (B,3,H,W) in [-1, 1] and a condition (B, c_dim) -> logits (B, 5 N). The ViT stays frozen."""

    def __init__(self, vit: ViT, c_dim: int) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        width = vit.cls_token.shape[-1]
        self.heads = nn.ModuleList(Head(width, c_dim) for _ in range(len(FEATURE_BLOCKS) + 1))

    def train(self, mode: bool = True) -> ProjectedDiscriminator:
        """The heads follow `mode`."""
        super().train(mode)
        self.vit.eval()
        return self

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        augmentation: Augmentation | None = None,
        windows: Sequence[Window] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, 5 N) of all heads for x (B,3,H,W) in [-1, 1] and c (B, c_dim), and the token maps they judge.

        augmentation, windows: None leaves images as they are.
        """
        features = self.features(x if augmentation is None else augmentation(x), windows)
        return torch.cat([head(f, c) for head, f in zip(self.heads, features, strict=True)], dim=1).float(), features

    def features(self, x: Tensor, windows: Sequence[Window] | None = None) -> list[Tensor]:
        """Token maps (B, D, N) of FEATURE_BLOCKS and of the embedded patches: patch tokens plus the class token."""
        x = self.shown(x / 2 + 0.5, windows)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        tokens = self.vit.tokens((x - mean) / std)
        chosen = [tokens[i + 1] for i in FEATURE_BLOCKS] + [tokens[0]]
        return [(t[:, 1:] + t[:, :1]).transpose(1, 2) for t in chosen]

    def shown(self, x: Tensor, windows: Sequence[Window] | None) -> Tensor:
        """(B,3,H,W) -> (B,3,side,side) for the ViT: each image's window, or the whole image resized by areas."""
        side = self.vit.side
        if windows is None or not any(windows):
            return F.interpolate(x, size=(side, side), mode="area")
        cut = [
            image if window is None else image[:, :, window[0] : window[0] + side, window[1] : window[1] + side]
            for image, window in zip(x.split(1), windows, strict=True)
        ]
        return torch.cat([F.interpolate(image, size=(side, side), mode="area") for image in cut])


def draw_windows(generators: Sequence[torch.Generator], height: int, width: int, side: int) -> list[Window]:
    """For each image, with probability CROP and where it is larger, a random window of `side` pixels.

    The release draws one window for a whole batch; here an image's own generator draws its own.
    """
    windows: list[Window] = []
    for generator in generators:
        crop = torch.rand((), generator=generator) < CROP
        places = [torch.randint(max(n - side, 0) + 1, (), generator=generator) for n in (height, width)]
        windows.append((int(places[0]), int(places[1])) if crop and min(height, width) > side else None)
    return windows


def build_vit(state: dict[str, Tensor], heads: int) -> ViT:
    """A ViT of the sizes that its weights show; the number of heads does not show."""
    _, _, patch, _ = state["patch_embed.proj.weight"].shape
    positions, width = state["pos_embed"].shape[1:]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    scaled = "blocks.0.ls1.gamma" in state
    vit = ViT(round((positions - 1) ** 0.5) * patch, patch, width, depth, heads, scaled)
    vit.load_state_dict({name: tensor.float() for name, tensor in state.items() if name != "mask_token"})
    return vit.eval().requires_grad_(False)


def read_dino(name: str | Path, heads: int = 6) -> ViT:
    """DINO or DINOv2: a .safetensors file, the authors' .pth (which cannot execute anything), or timm's hub id.

    Raises UserError, saying what to fetch, when it is neither here nor to be had.
    """
    path = find_dino(str(name))
    try:
        return build_vit(read_weights(path), heads)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not hold a DINO ViT ({reason_of(error)}): give DINO's weights") from error


def find_dino(name: str) -> Path:
    """The file of weights `name`, fetched where it is a hub id."""
    if Path(name).is_file():
        return Path(name)
    reason = "there is no such file"
    if is_hub_id(name) and not name.endswith(".pth"):
        try:
            return fetch(name, lambda *_: ["model.safetensors"]).folder / "model.safetensors"
        except UserError as error:
            reason = str(error)
    raise UserError(
        f"DINO weights '{name}' cannot be had ({reason}): download dino_deitsmall16_pretrain.pth and "
        "dinov2_vits14_pretrain.pth (or timm's model.safetensors) where there is a network, copy them here, and name "
        "them: deft.dino=FILE deft.dino_v2=FILE"
    )


def condition_of(dino_v2: ViT, lq: Tensor) -> Tensor:
    """The frozen DINOv2's class token (B, D), after its final norm, of low-quality images (B,3,H,W) in [-1, 1], which
    are not normalised, as released."""
    size = (dino_v2.side, dino_v2.side)
    return dino_v2(F.interpolate(lq / 2 + 0.5, size=size, mode="bilinear", align_corners=False))
