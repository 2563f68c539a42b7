"""The pixel contract: what goes in comes out, in the same form; what cannot be read gets one clear line."""

import io
import itertools
import os

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, JpegImagePlugin

from consissr.errors import UserError
from consissr.images import codec, formats, png
from consissr.images.codec import Form, Photo

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(height: int, width: int, channels: int, top: int = 255) -> np.ndarray:
    """A picture that lossy formats keep: slow waves, another one per channel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (7 + c) + c) * np.cos(y / (9 - c)) for c in range(channels)]
    return ((np.stack(waves, -1) * 0.4 + 0.5) * top).round().astype(np.uint8 if top == 255 else np.uint16)


def pillow(mode: str, size: tuple[int, int] = (24, 36)) -> Image.Image:
    channels = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 4, "I;16": 1}[mode]
    samples = smooth(*size, channels, 65535 if mode == "I;16" else 255)
    if mode == "P":
        return Image.fromarray(samples).quantize(200)
    if mode == "1":
        return Image.fromarray(samples[..., 0]).convert("1")
    return Image.frombytes(mode, size[::-1], samples.tobytes())


def round_trip(path) -> Photo:
    """Read, write under the same suffix (where it is written), and give what was read."""
    photo = codec.read(path)
    codec.write(path.with_name("again" + formats.suffix_for(path.suffix, photo.form)), photo)
    return photo


# --- round trips ---


@pytest.mark.parametrize(
    ("mode", "suffix", "mode_after"),
    [
        ("L", ".png", "L"),
        ("LA", ".png", "LA"),
        ("RGB", ".png", "RGB"),
        ("RGBA", ".png", "RGBA"),
        ("I;16", ".png", "I;16"),
        ("1", ".png", "L"),
        ("P", ".png", "RGB"),
        ("P", ".gif", "RGB"),
        ("RGB", ".bmp", "RGB"),
        ("L", ".tif", "L"),
        ("RGB", ".tif", "RGB"),
        ("RGBA", ".tif", "RGBA"),
        ("I;16", ".tif", "I;16"),
        ("CMYK", ".tif", "CMYK"),
        ("RGB", ".ppm", "RGB"),
    ],
)
def test_lossless_round_trip(tmp_path, mode, suffix, mode_after):
    before = pillow(mode)
    before.save(tmp_path / f"a{suffix}")
    photo = round_trip(tmp_path / f"a{suffix}")
    assert photo.pixels.shape == (3, 24, 36) and photo.pixels.dtype == torch.float32
    assert -1 <= photo.pixels.min() and photo.pixels.max() <= 1
    with Image.open(tmp_path / f"again{formats.suffix_for(suffix, photo.form)}") as after:
        assert after.mode == mode_after
        expected = before.convert(mode_after)
        if mode == "CMYK":  # the plain formula has no black ink, so only the colours come back
            after, expected = after.convert("RGB"), before.convert("RGB")
        difference = np.abs(np.asarray(after).astype(int) - np.asarray(expected))
        assert difference.max() <= (1 if mode == "CMYK" else 0)


@pytest.mark.parametrize(("mode", "suffix"), [("L", ".jpg"), ("RGB", ".jpg"), ("CMYK", ".jpg"), ("RGBA", ".webp")])
def test_lossy_round_trip(tmp_path, mode, suffix):
    pillow(mode).save(tmp_path / f"a{suffix}", quality=95)
    round_trip(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as before, Image.open(tmp_path / f"again{suffix}") as after:
        assert after.mode == mode
        colours = "RGB" if mode == "CMYK" else mode
        difference = np.abs(np.asarray(after.convert(colours)).astype(int) - np.asarray(before.convert(colours)))
        assert difference.mean() < 2


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_png(tmp_path, channels):
    samples = smooth(24, 36, channels, 65535)
    with open(tmp_path / "a.png", "wb") as file:
        png.write(file, samples, SRGB)
    photo = round_trip(tmp_path / "a.png")
    assert photo.form.bits == 16
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    colours = samples[..., [0, 0, 0] if channels == 2 else [0, 1, 2]]
    assert np.abs(photo.pixels.permute(1, 2, 0).numpy() - (colours / 65535 * 2 - 1)).max() < 1e-6
    if channels != 3:
        assert np.abs(photo.alpha[0].numpy() - samples[..., -1] / 65535).max() < 1e-6


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_tiff(tmp_path, order, compression, channels):
    samples = smooth(24, 36, channels, 65535)
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, samples, photometric="rgb", byteorder=order, compression=compression, iccprofile=SRGB, **extra
    )
    assert round_trip(path).form.bits == 16
    assert (tifffile.imread(tmp_path / "again.tif") == samples).all()
    with Image.open(tmp_path / "again.tif") as after:
        assert after.info["icc_profile"] == SRGB


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_applied_and_dropped(tmp_path, value, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    exif[ExifTags.Base.Artist] = "A. Photographer"
    path = tmp_path / f"a{suffix}"
    pillow("RGB").save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    assert formats.probe(path)[:2] == ((36, 24) if value >= 5 else (24, 36))
    photo = round_trip(path)
    with Image.open(path) as before:
        expected = np.asarray(ImageOps.exif_transpose(before).convert("RGB"))
    assert (codec.to_uint8(photo.pixels).permute(1, 2, 0).numpy() == expected).all()
    with Image.open(tmp_path / f"again{suffix}") as after:
        assert after.size == expected.shape[1::-1]
        tags = after.getexif()
        assert tags.get(ExifTags.Base.Orientation, 1) == 1
        assert tags[ExifTags.Base.Artist] == "A. Photographer"


def test_16_bit_tiff_in_planes(tmp_path):
    samples = smooth(24, 36, 3, 65535).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", compression="zlib")
    assert codec.read(tmp_path / "a.tif").form.bits == 16
    tifffile.imwrite(tmp_path / "b.tif", samples, photometric="rgb")  # Pillow reads this one wrongly, without a word
    with pytest.raises(UserError, match="separate planes"):
        codec.read(tmp_path / "b.tif")


def test_16_bit_cmyk_is_read_at_8_bits(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", smooth(24, 36, 4, 65535), photometric="separated")
    photo = codec.read(tmp_path / "a.tif")
    assert photo.form.bits == 8 and photo.form.cmyk
    with Image.open(tmp_path / "a.tif") as image:
        expected = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    assert (codec.to_uint8(photo.pixels).int() - expected).abs().max() <= 1


def test_orientation_of_16_bit_tiff(tmp_path):
    samples = smooth(24, 36, 3, 65535)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    round_trip(tmp_path / "a.tif")
    assert (tifffile.imread(tmp_path / "again.tif") == np.rot90(samples, -1)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profile_and_exif_are_kept(tmp_path, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Copyright] = "C. Holder"
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (48, 8, 0)})
    exif.get_ifd(ExifTags.IFD.Exif).update({ExifTags.Base.ExposureTime: 0.01, ExifTags.Base.ExifImageWidth: 36})
    pillow("RGB").save(tmp_path / f"a{suffix}", exif=exif.tobytes(), icc_profile=SRGB)
    round_trip(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"again{suffix}") as after:
        assert after.info["icc_profile"] == SRGB
        assert after.getexif()[ExifTags.Base.Copyright] == "C. Holder"
        where = after.getexif().get_ifd(ExifTags.IFD.GPSInfo)
        assert where[ExifTags.GPS.GPSLatitudeRef] == "N" and tuple(where[ExifTags.GPS.GPSLatitude]) == (48, 8, 0)
        details = after.getexif().get_ifd(ExifTags.IFD.Exif)
        assert float(details[ExifTags.Base.ExposureTime]) == 0.01
        assert ExifTags.Base.ExifImageWidth not in details  # it would be wrong after enlarging


def test_transparent_colour_becomes_a_channel(tmp_path):
    pillow("RGB").save(tmp_path / "a.png", transparency=tuple(int(v) for v in smooth(24, 36, 3)[0, 0]))
    photo = codec.read(tmp_path / "a.png")
    assert photo.alpha[0, 0, 0] == 0 and photo.alpha.mean() > 0.5
    palette = pillow("P")
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    assert codec.read(tmp_path / "p.png").alpha[0, 0, 0] == 0


def test_first_frame_of_several(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert codec.to_uint8(codec.read(tmp_path / "a.gif").pixels[:, 0, 0]).tolist() == [255, 0, 0]


def test_grey_result_is_the_luma(tmp_path):
    photo = Photo(torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 4, 4), None, Form(grey=True))
    codec.write(tmp_path / "a.png", photo)
    with Image.open(tmp_path / "a.png") as after:
        assert after.mode == "L" and after.getpixel((0, 0)) == round((0.299 + 0.114 / 2) * 255)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "CMYK"])
def test_pil_round_trip(mode):
    before = pillow(mode)
    after = codec.to_pil(codec.from_pil(before))
    assert after.mode == mode
    if mode != "CMYK":
        assert (np.asarray(after) == np.asarray(before)).all()


# --- refusals ---


def encoded(suffix: str, **options) -> bytes:
    buffer = io.BytesIO()
    pillow("RGB", (80, 104)).save(buffer, format=formats.WRITABLE[suffix].name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("part", [0, 0.01, 0.1, 0.5, 0.9, 0.98])
def test_truncated_file(tmp_path, suffix, part):
    path = tmp_path / f"a{suffix}"
    whole = encoded(suffix)
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(UserError, match="a" + suffix) as caught:
        codec.read(path)
    assert "\n" not in str(caught.value)


def test_truncated_16_bit_png(tmp_path):
    png.write(buffer := io.BytesIO(), smooth(24, 36, 3, 65535))
    whole = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        codec.read(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_random_damage_never_escapes(tmp_path, suffix, rng):
    """Whatever byte is wrong: a picture or a UserError, nothing else."""
    whole = bytearray(encoded(suffix))
    path = tmp_path / f"a{suffix}"
    for _ in range(40):
        data = whole.copy()
        for place in rng.integers(0, len(data), 5):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            codec.read(path)
        except UserError:
            pass


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UserError, match="not an image"):
        codec.read(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        codec.read(tmp_path / "b.png")
    with pytest.raises(UserError, match="No such file"):
        codec.read(tmp_path / "c.png")
    with pytest.raises(UserError, match="directory"):
        codec.read(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    pillow("RGB").save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match="Permission"):
        codec.read(tmp_path / "a.png")


def test_decompression_bomb(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="million pixels"):
        codec.read(tmp_path / "a.png")


def test_modes_without_a_known_range(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="F pixels"):
        codec.read(tmp_path / "a.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match="65535"):
        codec.read(tmp_path / "b.tif")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_reaches_a_file(tmp_path, value):
    pixels = torch.zeros(3, 4, 4)
    pixels[1, 2, 3] = value
    with pytest.raises(UserError, match="NaN"):
        codec.write(tmp_path / "a.png", Photo(pixels, None, Form()))
    with pytest.raises(UserError, match="NaN"):
        codec.write(tmp_path / "a.png", Photo(torch.zeros(3, 4, 4), pixels[1:2], Form(alpha=True)))
    assert not list(tmp_path.iterdir())


def test_formats_that_cannot_hold_it(tmp_path):
    photo = Photo(torch.zeros(3, 4, 4), torch.ones(1, 4, 4), Form(alpha=True))
    with pytest.raises(UserError, match="cannot hold"):
        codec.write(tmp_path / "a.jpg", photo)
    with pytest.raises(UserError, match="not written"):
        codec.write(tmp_path / "a.gif", photo)
    with pytest.raises(UserError, match="16383"):
        codec.write(tmp_path / "a.webp", Photo(torch.zeros(3, 1, 16384), None, Form()))
    assert formats.suffix_for(".jpg", photo.form) == ".png"
    assert formats.suffix_for(".webp", Form(bits=16)) == ".png"
    assert formats.suffix_for(".JPG", Form()) == ".JPG"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp"])
def test_every_result_can_be_read(tmp_path, suffix):
    for grey, alpha, bits in itertools.product((False, True), (False, True), (8, 16)):
        form = Form(grey=grey, alpha=alpha, bits=bits)
        path = tmp_path / f"a{formats.suffix_for(suffix, form)}"
        codec.write(path, Photo(torch.zeros(3, 4, 5), torch.full((1, 4, 5), 0.5) if alpha else None, form))
        assert formats.probe(path)[2].alpha == alpha


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"old")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left"):
        codec.write(path, Photo(torch.zeros(3, 4, 4), None, Form()))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_jpeg_keeps_colours_at_full_resolution(tmp_path):
    """Red and blue columns of one pixel: with halved chroma, as encoders do by default, they would be one purple."""
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    codec.write(tmp_path / "a.jpg", codec.from_pil(Image.fromarray(stripes)))
    with Image.open(tmp_path / "a.jpg") as image:
        assert JpegImagePlugin.get_sampling(image) == 0
        assert np.abs(np.asarray(image).astype(int) - stripes).mean() < 8
