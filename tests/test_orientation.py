"""The way up that files say: pixels and sizes follow it, without a look at the pixels where sizes will do."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin

from consissr.images import codec, formats


def picture(mode):
    """36 pixels wide, 24 high, all different."""
    samples = np.random.default_rng(0).integers(0, 256, (24, 36, 4)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(samples[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(samples[..., :3]).quantize(200) if mode == "P" else Image.fromarray(samples).convert(mode)


@pytest.mark.parametrize("value", range(5, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_turned_tiff_without_compression(tmp_path, mode, value):
    """Such files Pillow maps into memory, with the rows of the picture that it will be once it is turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    picture(mode).save(tmp_path / "a.tif", exif=exif)
    picture(mode).save(tmp_path / "b.tif", exif=exif, compression="tiff_lzw")
    assert formats.probe(tmp_path / "a.tif")[:2] == (36, 24)
    with Image.open(tmp_path / "a.tif") as image:
        turned = codec.from_pil(image)
        assert image.filename == str(tmp_path / "a.tif"), "the caller's image is left as it was"
    expected = codec.read(tmp_path / "b.tif")
    for photo in (turned, codec.read(tmp_path / "a.tif")):
        assert torch.equal(photo.pixels, expected.pixels)
        assert photo.alpha is None or torch.equal(photo.alpha, expected.alpha)


@pytest.mark.parametrize("place", ["before", "behind", "xmp behind", "xmp behind, exif before"])
def test_png_files_are_measured_without_their_pixels(tmp_path, monkeypatch, place):
    """A folder of frames would take minutes; also where the way up is said behind the pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    said = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    said = said if "xmp" not in place else (b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + xmp)
    other = Image.Exif()
    other[ExifTags.Base.Make] = "a camera, which says nothing of the way up"
    picture("RGB").save(buffer := io.BytesIO(), "PNG", exif=other if "exif" in place else b"")
    at = buffer.getvalue().index(b"IDAT" if place == "before" else b"IEND") - 4
    crc = struct.pack(">I", zlib.crc32(b"".join(said)))
    chunk = struct.pack(">I", len(said[1])) + b"".join(said) + crc
    (tmp_path / "a.png").write_bytes(buffer.getvalue()[:at] + chunk + buffer.getvalue()[at:])
    assert codec.read(tmp_path / "a.png").pixels.shape == (3, 36, 24)
    picture("RGB").save(tmp_path / "b.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("the pixels were decoded"))
    assert formats.probe(tmp_path / "a.png")[:2] == (36, 24) and formats.probe(tmp_path / "b.png")[:2] == (24, 36)
