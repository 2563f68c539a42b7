"""What image files can hold: formats, modes, depths, metadata. Needs Pillow only: planning a run must be quick.

`probe` reads a file's header; `Form` says how an image was stored, so that its result can be stored likewise.
"""

import ctypes
import importlib.util
import ntpath
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from consissr.errors import UserError
from consissr.images.color_tags import colour_chunks, hdr, is_ordinary
from consissr.images.metadata import DAMAGE, dpi, has_gain_map, orientation, png_orientation


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an image is stored. Palettes and bilevel images count as what they are expanded to (RGB, grey)."""

    grey: bool = False
    alpha: bool = False
    bits: int = 8  # per sample: 8 or 16
    cmyk: bool = False
    profile: bytes | None = None  # embedded ICC profile
    chunks: tuple[tuple[bytes, bytes], ...] = ()  # of a PNG file, about its colours: see colour_chunks
    dpi: tuple[float, float] | None = None
    lossless: bool = False  # a WebP file that is
    exif: bytes | None = None  # descriptive tags only; the orientation is applied to the pixels and left out
    xmp: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a file format can hold when this package writes it."""

    name: str  # Pillow's
    alpha: bool = False
    deep: bool = False  # 16 bits per sample
    cmyk: bool = False
    exif: bool = True
    profile: bool = True
    longest: int = 2**31 - 1  # pixels of the longest side

    def keeps_exif(self, form: Form) -> bool:
        """Whether EXIF stands in files of this format and, in it, how a picture was restored."""
        return self.exif and not (self.name == "TIFF" and form.bits == 16 and not form.grey)

    def holds(self, form: Form, side: int = 1) -> bool:
        """True when transparency, depth and colours of `form` are kept, and `side` pixels are not too long."""
        kept = (self.alpha or not form.alpha) and (self.deep or form.bits == 8) and (self.profile or not form.profile)
        if self.name == "TIFF" and form.grey and form.alpha and form.bits == 16:
            return False  # Pillow, and so this program, could not read it
        return kept and (self.name == "PNG" or is_ordinary(form.chunks, form.profile)) and side <= self.longest


_JPEG = Format(name="JPEG", cmyk=True, longest=65500)
_TIFF = Format(name="TIFF", alpha=True, deep=True, cmyk=True)
WRITABLE = {
    ".png": Format(name="PNG", alpha=True, deep=True),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": Format(name="WEBP", alpha=True, longest=16383),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format(name="BMP", exif=False, profile=False),
}
READABLE = frozenset(WRITABLE) | {
    ".apng", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpf", ".jpx", ".mpo", ".pbm",
    ".pgm", ".pnm", ".ppm", ".tga",
}  # fmt: skip
PLUGINS = {
    ".avif": ("PIL._avif", "Pillow"),
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".hif": ("pillow_heif", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
"""Pictures that Pillow reads where such a module is installed, and the package that brings it."""
HERE = frozenset(ending for ending, (module, _) in PLUGINS.items() if importlib.util.find_spec(module))
"""Those of them that are."""
READABLE |= HERE
WRITABLE |= {
    ending: target
    for ending, target in {
        ".avif": Format(name="AVIF", alpha=True, longest=65536),
        ".jxl": Format(name="JXL", alpha=True, profile=False),
    }.items()
    if ending in HERE
}
UNREADABLE = frozenset({
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".exr", ".hdr", ".ico", ".iiq", ".jxr", ".nef", ".nrw", ".orf", ".pcx",
    ".pef", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".srw", ".svg", ".wdp", ".x3f", ".xcf",
})  # fmt: skip
"""Pictures that are not read: a folder's are counted, so that nobody takes them for restored."""

_BITS_PER_SAMPLE = 258  # a TIFF tag


def suffix_for(wanted: str, form: Form, side: int = 1) -> str:
    """The suffix to write `form` under: `wanted` (such as ".jpg") where that format holds it, else ".png"."""
    target = WRITABLE.get(wanted.lower())
    return wanted if target is not None and target.holds(form, side) else ".png"


def output_size(height: int, width: int, scale: float, longest: int | None = None) -> tuple[int, int]:
    """Height and width of the result: floor(scale * side + 0.5), at least 1.

    `longest`, where given, replaces the scale by the one that gives the longest side that many pixels.
    """
    if longest is not None:
        scale = longest / max(height, width)
    return max(1, floor(scale * height + 0.5)), max(1, floor(scale * width + 0.5))


def reachable(path: str | Path, windows: bool = os.name == "nt") -> str:
    """A path for the system's calls: on Windows those of more than 260 characters need a mark."""
    if not windows or len(absolute := ntpath.abspath(path)) < 240:
        return str(path)
    mark = "\\\\?\\"
    if absolute.startswith(mark):
        return absolute
    return f"{mark}UNC{absolute[1:]}" if absolute.startswith("\\\\") else mark + absolute


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened with Pillow; all that a bad file makes Pillow raise becomes one clear line.

    Raises:
        UserError: the path is missing or unreadable, is no image, is damaged, or is too large to be trusted.
    """
    try:
        kind = os.stat(reachable(path)).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise UserError(f"{path}: not a file")  # opening a pipe would wait for ever
        use_plugin(Path(path).suffix.lower())
        # Open: a file with a name Pillow may map into memory, where it cuts the rows of turned TIFF at a wrong width.
        with open(reachable(path), "rb") as file, Image.open(file) as image:
            if image.format != "MPO":
                yield image
                return
            frames = image.n_frames
        # Several JPEG files in one, as phones write them for depth or HDR: the first is the picture. Pillow's reader of
        # such files trusts their table, which is often wrong.
        with JpegImagePlugin.JpegImageFile(reachable(path)) as image:
            image.n_frames = frames
            yield image
    except UnidentifiedImageError:
        reason = "not an image that can be read" if Path(path).stat().st_size else "the file is empty"
        if (ending := Path(path).suffix.lower()) in PLUGINS.keys() - HERE:
            reason += f"; {how_to_get(ending)}"
        raise UserError(f"{path}: {reason}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"{path}: has more than {limit:.0f} million pixels; cut it into parts") from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged image ({reason})") from None


def quiet() -> None:
    """For scripts: neither Pillow nor libtiff writes lines of its own, which name no file, to standard error."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused with a reason
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata
    with suppress(OSError, AttributeError):  # where the library's names are not to be had
        libtiff = ctypes.CDLL(Image.core.__file__)  # with what it is linked to
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            getattr(libtiff, name)(None)


def form_of(image: Image.Image) -> Form:
    """How `image` (opened, not necessarily loaded) is stored, except for `exif`; its pixels are not looked at.

    Raises:
        UserError: a mode whose range is not known (floating point) or that is no colour image (HSV); a TIFF that
            Pillow misreads.
    """
    mode = image.mode
    if mode in ("F", "HSV"):
        raise UserError(f"{mode} pixels are not supported; save the image as 8- or 16-bit grey or RGB first")
    packing = _raw_modes(image)
    if image.format == "TIFF" and 16 in image.tag_v2.get(_BITS_PER_SAMPLE, ()) and "16" not in "".join(packing):
        raise UserError("16-bit TIFF in separate planes is not supported; save its samples interleaved")
    grey = mode in ("1", "L", "LA", "La", "I") or mode.startswith("I;16") or "LA;16B" in packing
    deep = mode.startswith("I") or (mode in ("RGB", "RGBA") and any(re.search(";16[BLN]$", raw) for raw in packing))
    keyed = "transparency" in image.info and mode != "CMYK"  # a transparent colour, not a channel
    return Form(
        grey=grey,
        alpha=keyed or mode in ("LA", "PA", "La", "RGBA", "RGBa"),
        bits=16 if deep else 8,
        cmyk=mode == "CMYK",
        profile=None if mode == "LAB" else image.info.get("icc_profile") or None,
        dpi=dpi(image),
    )


def use_plugin(ending: str) -> None:
    """Let Pillow know files that end so, where it takes an installed plug-in."""
    if ending in HERE:
        with suppress(ImportError):
            module = importlib.import_module(PLUGINS[ending][0])  # pillow_jxl registers itself
            getattr(module, "register_heif_opener", lambda: None)()


def how_to_get(*endings: str) -> str:
    """What to install for pictures that need a plug-in."""
    return f"pip install -U {' '.join(sorted({PLUGINS[ending][1] for ending in endings}))}"


def more_than_one_picture(image: Image.Image) -> str:
    """What of a file is not restored: further frames, or what phones store beside the picture; "" where nothing is."""
    try:
        frames = getattr(image, "n_frames", 1)
    except DAMAGE:
        return ""
    if has_gain_map(image):
        return "its gain map or depth map is left out: the result is the picture that common viewers show"
    return f"only the first of {frames} pictures in the file was restored" if frames > 1 else ""


def size_as_seen(image: Image.Image, path: str | Path) -> tuple[int, int]:
    """Width and height, after rotation, of the image file `path` that is opened as `image`; its pixels stay unread."""
    # Of PNG, Pillow would decode all to look behind the pixels; what stands there counts beside what stands before.
    turn = png_orientation(reachable(path)) if image.format == "PNG" else orientation(image)
    return image.size[::-1] if turn >= 5 and image.format != "TIFF" else image.size  # Pillow swaps TIFF's sides itself


def probe(path: str | Path) -> tuple[int, int, Form, str]:
    """Height and width (as seen: after rotation), form, and what is not restored of an image file, from its header.

    Raises:
        UserError: as `opened` and `form_of`.
    """
    with opened(path) as image:
        try:
            form = replace(form_of(image), chunks=colour_chunks(reachable(path)))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        width, height = size_as_seen(image, path)
        notes = [more_than_one_picture(image)]
        if transfer := hdr(form.chunks):
            notes.append(f"its colours are HDR ({transfer}): it is restored like other pictures and stays HDR")
        return height, width, form, "; ".join(filter(None, notes))


def _raw_modes(image: Image.Image) -> list[str]:
    """How the file's samples are packed ("RGB;16B"), one entry per tile; [] for images from no file."""
    modes = []
    for tile in getattr(image, "tile", []):
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        modes += [word for word in arguments[:1] if isinstance(word, str)]
    return modes
