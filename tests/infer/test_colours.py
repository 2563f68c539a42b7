"""What files say of their colours beside an ICC profile: kept where the format can, else another format is taken."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from consissr.images import codec, formats, png
from consissr.images.color_tags import png_chunks


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("deep", [False, True])
def test_what_png_files_say_of_their_colours_is_kept(tmp_path, rng, deep):
    """Linear light (gAMA 1.0) and HDR (cICP: BT.2020 primaries, PQ) look wrong without these words."""
    said = ((b"gAMA", struct.pack(">I", 100000)), (b"cICP", bytes((9, 16, 0, 1))))
    plain = io.BytesIO()
    if deep:
        png.write(plain, rng.integers(0, 65536, (5, 6, 3)).astype(np.uint16))
    else:
        Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)).save(plain, format="PNG")
    whole = plain.getvalue()
    (tmp_path / "a.png").write_bytes(whole[:33] + b"".join(chunk(*one) for one in said) + whole[33:])
    photo = codec.read(tmp_path / "a.png")
    codec.write(tmp_path / "b.png", photo)
    assert png_chunks(tmp_path / "b.png") == said
    assert torch.equal(codec.read(tmp_path / "b.png").pixels, photo.pixels)
    with pytest.raises(codec.UserError, match="colours; use .png"):  # of a format that has no such words
        codec.write(tmp_path / "b.tif", photo)


def with_chunks(path, *chunks):
    """A PNG file that says something of its colours."""
    plain = io.BytesIO()
    Image.new("RGB", (6, 5), "teal").save(plain, format="PNG")
    whole = plain.getvalue()
    path.write_bytes(whole[:33] + b"".join(chunk(*one) for one in chunks) + whole[33:])


def test_colours_that_a_format_cannot_say_become_png(infer, tmp_path, files):
    """--ext jpg; what is sRGB, said in whatever way, becomes JPEG."""
    srgb = (b"sRGB", b"\0")

    def gamma(value):
        return (b"gAMA", struct.pack(">I", value))

    primaries = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    adobe = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)

    def code(*numbers):
        return (b"cICP", bytes((*numbers, 0, 1)))

    said = {
        "usual": (gamma(45455), (b"cHRM", primaries)), "srgb": (gamma(100000), srgb), "cicp": (code(1, 13),),
        "mac": (gamma(55556),), "adobe": ((b"cHRM", adobe),), "p3": (srgb, code(12, 13)), "pq": (code(9, 16),),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, chunks in said.items():
        with_chunks(tmp_path / "in" / f"{name}.png", *chunks)
    status, _, err = infer("-i", tmp_path / "in", "-o", tmp_path / "out", "--ext", "jpg")
    assert status == 0 and err.count("note: ") == 1 and "pq.png: its colours are HDR (PQ)" in err
    jpegs = {f"{name}.jpg" for name in ("usual", "srgb", "cicp")}
    assert files(tmp_path / "out") == jpegs | {f"{name}.png" for name in ("mac", "adobe", "p3", "pq")}
    assert png_chunks(tmp_path / "out" / "p3.png") == said["p3"]
    status, _, err = infer("-i", tmp_path / "in" / "p3.png", "-o", tmp_path / "p3.jpg")
    assert status == 1 and "cannot hold its transparency, 16 bits, colours" in err


def test_colours_of_avif_files(infer, tmp_path):
    """Display P3 and HDR stand in a box of their own there, which Pillow neither tells nor writes."""
    if ".avif" not in formats.WRITABLE:
        pytest.skip("this Pillow knows no AVIF")
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "a.avif")
    plain = (tmp_path / "a.avif").read_bytes()
    at = plain.index(b"colrnclx") + 8
    for name, code in (("srgb", (1, 13)), ("p3", (12, 13)), ("pq", (9, 16))):
        (tmp_path / f"{name}.avif").write_bytes(plain[:at] + struct.pack(">HH", *code) + plain[at + 4 :])
        assert infer("-i", tmp_path / f"{name}.avif", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "srgb.avif").exists()
    assert dict(png_chunks(tmp_path / "out" / "p3.png")) == {b"cICP": bytes((12, 13, 0, 1))}
    assert dict(png_chunks(tmp_path / "out" / "pq.png")) == {b"cICP": bytes((9, 16, 0, 1))}


def test_adobe_rgb_of_cameras_is_kept(infer, tmp_path):
    """Without a profile: EXIF's interoperability index says it, also beside the settings of --metadata settings."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: 65535, ExifTags.IFD.Interop: {1: "R03", 2: b"0100"}}
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "a.jpg", exif=exif)
    for keep in ("keep", "settings"):
        assert infer("-i", tmp_path / "a.jpg", "-o", tmp_path / keep, "--metadata", keep)[0] == 0
        with Image.open(tmp_path / keep / "a.jpg") as image:
            assert image.getexif().get_ifd(ExifTags.IFD.Interop) == {1: "R03"}
            assert image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] == 65535
