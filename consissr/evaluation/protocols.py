"""What each metric is, and the named conventions under which papers compute them."""

from dataclasses import dataclass

from consissr.config.loading import nearest
from consissr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric: how to print and to read it."""

    name: str
    label: str
    higher: bool
    """Whether larger values are better."""
    span: str = ""
    """Typical range on 4x photographs."""
    needs: tuple[str, ...] = ("sr", "hr")
    """The images that it takes, in order: 'sr', 'hr', 'lr'."""
    of_set: bool = False
    """Whether it compares two sets of images."""
    source: str
    """'own', 'stlpips', 'pyiqa' or 'clip'."""
    smallest: tuple[int, int] = (0, 0)
    """Least short and long side of images, in pixels."""
    gigabytes: float = 0.0
    """Memory that a process takes for it at 512x512 pixels: a share of 5.3, measured of all but FID (an estimate)."""
    digits: int = 4
    about: str = ""

    @property
    def arrow(self) -> str:
        return "↑" if self.higher else "↓"

    @property
    def cropped(self) -> bool:
        """Whether a protocol's crop concerns it: pixels are compared with pixels."""
        return self.needs == ("sr", "hr") and self.source != "clip" and not self.of_set


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(name="psnr", label="PSNR", higher=True, span="20 to 30 dB", source="own", digits=2),
        Measure(name="ssim", label="SSIM", higher=True, span="0.5 to 0.85 of 1", source="own", smallest=(11, 11)),
        Measure(name="lpips", label="LPIPS", higher=False, span="0.2 to 0.5", source="pyiqa", gigabytes=0.3),
        Measure(name="st-lpips", label="ST-LPIPS", higher=False, span="0.05 to 0.5", source="stlpips", gigabytes=0.4,
                smallest=(16, 16), about="shift-tolerant LPIPS (Ghildyal and Liu 2022, on its AlexNet); not the LPIPS "
                "of published tables"),
        Measure(name="dists", label="DISTS", higher=False, span="0.15 to 0.35", source="pyiqa", gigabytes=0.6),
        Measure(name="fid", label="FID", higher=False, span="25 to 180, strongly biased by the number of images",
                of_set=True, source="pyiqa", digits=2, gigabytes=0.9,
                about="of whole images, resized to 299 pixels in clean-fid's way (pyiqa's mode 'clean')"),
        Measure(name="flat", label="flat-block ratio", higher=False, span="1 to 3", of_set=True, source="own", digits=2,
                smallest=(16, 16), about="roughness where photographs are smooth, over their own; 1 is theirs"),
        Measure(name="niqe", label="NIQE", higher=False, span="3 to 10", needs=("sr",), source="own",
                smallest=(96, 192)),
        Measure(name="clipiqa", label="CLIPIQA", higher=True, span="0.3 to 0.8 of 1", needs=("sr",), source="pyiqa",
                gigabytes=0.7),
        Measure(name="musiq", label="MUSIQ", higher=True, span="40 to 75 of 100", needs=("sr",), source="pyiqa",
                digits=2, gigabytes=0.7),
        Measure(name="maniqa", label="MANIQA", higher=True, span="0.4 to 0.7 of 1", needs=("sr",), source="pyiqa",
                gigabytes=1.4, about="pyiqa's maniqa-pipal; 20 random crops up to pyiqa 0.1.11, "
                "a grid of crops since 0.1.12"),
        Measure(name="clip-i", label="CLIP-I", higher=True, span="0.8 to 1", source="clip", gigabytes=0.6,
                about="cosine of the ViT-B/32 CLIP image embeddings of SR and HR"),
        Measure(name="delta-clip-i", label="ΔCLIP-I", higher=True, span="0 to 0.02", needs=("sr", "hr", "lr"),
                source="clip", gigabytes=0.6, about="CLIP-I(SR, HR) / CLIP-I(LR, HR) - 1 (Eq. 5, ConsisSR); over a "
                "set the ratio of the means (ours)"),
    )
}  # fmt: skip
LR_CLIP = Measure(name="clip-i-lr", label="CLIP-I of LR", higher=True, needs=("lr", "hr"), source="clip")
"""The denominator of delta-CLIP-I."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one paper or project computes the metrics that leave a choice."""

    name: str
    psnr_space: str = "y"
    """Colours of the PSNR: 'y' of YCbCr or 'rgb'. SSIM is on Y everywhere."""
    crop: int = 0
    """Pixels cut from each side before full-reference metrics."""
    local_std_crop: int = 0
    """Pixels cut from each side before L-STD."""
    about: str

    def as_text(self) -> str:
        space = "Y of YCbCr" if self.psnr_space == "y" else "RGB"
        return f"{self.name}: PSNR on {space}, SSIM on Y, {self.crop} pixels cropped. {self.about}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="ccsr",
            about="CCSR's paper (Sec. IV-B); its published values follow this. FID of whole images, as for osediff.",
        ),
        Protocol(
            name="osediff",
            about="OSEDiff's released metric logs: PSNR and SSIM of this code equal "
            "them to 1e-4 dB and 1e-5, NIQE to 0.002 at the median and 0.19 at most. FID of whole 512x512 images in "
            "pyiqa's mode 'clean' is what the logs hold (123.49 and 135.30).",
        ),
        Protocol(name="ccsr-v1", crop=4, local_std_crop=4, about="The metric scripts of CCSR's first release."),
        Protocol(name="seesr", crop=4, local_std_crop=4, about="SeeSR, by its author's words."),
        Protocol(name="consissr-text", psnr_space="rgb", about="ConsisSR as its Sec. 4.1 states it."),
        Protocol(
            name="consissr-table",
            about="ConsisSR as its Table 1 must have been made: rows it shares with CCSR lie within 0.15 dB of "
            "CCSR's Y values (StableSR and PASD on RealSR within 0.01), where RGB lies about 1.5 dB lower.",
        ),
    )
}


FID_LEAST = 50
"""Images below which FID says more of their number than of their quality."""


def gigabytes(measures: list[Measure], megapixels: float) -> float:
    """Memory of a process that scores images of this size: measured without learned metrics, which grow with the size.

    ST-LPIPS took 0.4 at 512x512 pixels and nine times that at nine times the pixels.
    """
    return 0.55 + 0.2 * megapixels + sum(m.gigabytes for m in measures) * max(1.0, megapixels / 0.25)


def get_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol '{name}'{nearest(name, list(PROTOCOLS))}")
    return PROTOCOLS[name]


def get_measures(names: list[str]) -> list[Measure]:
    for name in names:
        if name not in MEASURES:
            raise UserError(f"unknown metric '{name}'{nearest(name, list(MEASURES))}")
    return [MEASURES[name] for name in dict.fromkeys(names)]
