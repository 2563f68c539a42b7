"""Captions composed from what can be measured of an image: colours, light, contrast, texture, direction.

They stand in for written captions where a small text/image encoder pair is trained on photographs alone. A caption is
a pure function of the pixels: "bright muted photo, gray and brown, low contrast, fine texture, horizontal".
"""

import torch
from torch import Tensor
from torch.nn import functional as F

COLORS = ("black", "white", "gray", "brown", "red", "orange", "yellow", "green", "blue", "purple")
HUES = (20.0, 45.0, 70.0, 170.0, 255.0, 335.0)
"""Upper ends in degrees of red, orange, yellow, green, blue and purple; red goes on after the last."""
BLACK_BELOW, WHITE_ABOVE = 0.16, 0.8
"""Value (largest of R, G, B) below which any pixel is black, and above which an unsaturated one is white."""
GRAY_BELOW = 0.13
"""Saturation below which a pixel has no hue."""
BROWN_BELOW = 0.55
"""Value below which red, orange and yellow pixels are brown."""
SECOND_SHARE = 0.2
"""Share of the image that a second colour needs to be named."""
DARK_BELOW, BRIGHT_ABOVE = 0.33, 0.5
"""Mean luma that ends 'dark' and begins 'bright', with 'dim' between."""
COLORFUL_ABOVE = 0.15
"""Mean chroma (largest less smallest of R, G, B) above which an image is 'colorful', else 'muted'."""
CONTRAST = 0.13, 0.2
"""Standard deviation of luma that ends 'low contrast' and begins 'high contrast', with 'soft contrast' between."""
SMOOTH_BELOW = 0.028
"""Mean luma difference over two pixels, below which an image is 'smooth'."""
EDGES_ABOVE = 0.075
"""The same above which it has 'strong edges'."""
FINE_ABOVE = 0.65
"""Ratio of that difference to the one on the image at a quarter of the side, above which texture is 'fine'."""
COHERENT_ABOVE = 0.22
"""Coherence of the structure tensor (0 all directions alike, 1 one only) above which an image has a direction."""
GRID = 16
"""Side of the grid of means on which colours are counted."""

WORDS = (
    *("dark", "dim", "bright", "muted", "colorful", "photo", ",", *COLORS, "and", "low", "soft", "high", "contrast"),
    *("smooth", "fine", "coarse", "texture", "strong", "edges"),
    *("horizontal", "vertical", "diagonal", "no", "direction"),
)
"""Every word of a caption."""


def dominant_colors(x: Tensor) -> list[str]:
    """One or two most frequent colours of an image (3, H, W) in [0, 1], the first the most frequent."""
    rgb = F.adaptive_avg_pool2d(x, GRID).flatten(1)  # (3, N)
    value, top = rgb.max(0)
    chroma = value - rgb.min(0).values
    r, g, b = rgb
    turns = torch.stack([(g - b), (b - r), (r - g)]).gather(0, top[None])[0] / chroma.clamp_min(1e-6) + 2 * top
    hue = (60 * turns) % 360
    named = torch.bucketize(hue, hue.new_tensor(HUES)) % len(HUES) + COLORS.index("red")  # (N,) in COLORS
    named = torch.where((named <= COLORS.index("yellow")) & (value < BROWN_BELOW), COLORS.index("brown"), named)
    plain = torch.where(value > WHITE_ABOVE, COLORS.index("white"), COLORS.index("gray"))
    named = torch.where(chroma < GRAY_BELOW * value, plain, named)
    named = torch.where(value < BLACK_BELOW, COLORS.index("black"), named)
    share = torch.bincount(named, minlength=len(COLORS)) / named.numel()
    shares, order = share.sort(descending=True, stable=True)
    count = 2 if shares[1] >= SECOND_SHARE else 1
    return [COLORS[i] for i in order[:count].tolist()]


def gradients(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Differences over two pixels to the right and downwards, (H - 2, W - 2) each, of luma (H, W)."""
    return luma[1:-1, 2:] - luma[1:-1, :-2], luma[2:, 1:-1] - luma[:-2, 1:-1]


def energy(dx: Tensor, dy: Tensor) -> float:
    """Mean absolute difference over both directions."""
    return float(dx.abs().mean() + dy.abs().mean()) / 2


def texture(luma: Tensor) -> tuple[str, str]:
    """Words for texture and direction of luma (H, W) in [0, 1]."""
    dx, dy = gradients(luma)
    fine = energy(dx, dy)
    coarse = energy(*gradients(F.avg_pool2d(luma[None], 4)[0]))
    if fine < SMOOTH_BELOW:
        kind = "smooth"
    elif fine > EDGES_ABOVE:
        kind = "strong edges"
    else:
        kind = "fine texture" if fine > FINE_ABOVE * coarse else "coarse texture"
    xx, yy, xy = (float(p.mean()) for p in (dx * dx, dy * dy, dx * dy))
    if ((xx - yy) ** 2 + 4 * xy**2) ** 0.5 <= COHERENT_ABOVE * (xx + yy):
        return kind, "no direction"
    if 2 * abs(xy) > abs(xx - yy):  # the gradient's angle is nearer to 45 degrees than to an axis
        return kind, "diagonal"
    return kind, "vertical" if xx > yy else "horizontal"  # lines run across the gradient


@torch.no_grad()
def caption(image: Tensor) -> str:
    """The caption of an image (3, H, W) in [-1, 1], at least 16 pixels a side."""
    x = image.float().cpu() / 2 + 0.5
    luma = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    mean, spread = float(luma.mean()), float(luma.std())
    light = "dark" if mean < DARK_BELOW else "bright" if mean > BRIGHT_ABOVE else "dim"
    chroma = float((x.amax(0) - x.amin(0)).mean())
    color = "colorful" if chroma > COLORFUL_ABOVE else "muted"
    contrast = "low" if spread < CONTRAST[0] else "high" if spread > CONTRAST[1] else "soft"
    kind, direction = texture(luma)
    return f"{light} {color} photo, {' and '.join(dominant_colors(x))}, {contrast} contrast, {kind}, {direction}"
