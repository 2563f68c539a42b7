"""EXIF, XMP and settings in results, and formats that not every machine knows."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image

from consissr.images import codec, formats

XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF tiff:Orientation=\"6\" xmp:Rating='4'/></x:xmpmeta>"
UPRIGHT = XMP.replace(b'"6"', b'"1"')
HDR = b"<x:xmpmeta xmlns:hdrgm='http://ns.adobe.com/hdr-gain-map/1.0/' hdrgm:Version='1.0'/>"
TAGS, COMMENT = ExifTags.IFD.Exif, ExifTags.Base.UserComment


@pytest.fixture
def photograph(tmp_path):
    """A JPEG with an artist and a rating."""
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Photographer"
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "a.jpg", exif=exif, xmp=XMP)
    return tmp_path / "a.jpg"


def xmp_of(path):
    with Image.open(path) as image:
        image.load()
        return image.info.get("xmp")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_xmp_is_kept_and_stands_upright(photograph, tmp_path, suffix):
    if suffix not in formats.WRITABLE:
        pytest.skip("this Pillow knows no AVIF")
    codec.write(tmp_path / f"b{suffix}", codec.read(photograph))
    codec.write(tmp_path / f"c{suffix}", codec.read(tmp_path / f"b{suffix}"))
    assert xmp_of(tmp_path / f"c{suffix}") == UPRIGHT
    with Image.open(tmp_path / f"c{suffix}") as image:
        assert image.getexif()[ExifTags.Base.Artist] == "A. Photographer"


def test_xmp_of_16_bit_files(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((4, 5, 3), np.uint16), photometric="rgb", extratags=[(700, 1, len(XMP), XMP)]
    )
    for suffix in (".tif", ".png"):
        codec.write(tmp_path / f"b{suffix}", codec.read(tmp_path / "a.tif"))
        assert codec.read(tmp_path / f"b{suffix}").form.bits == 16
        xmp = xmp_of(tmp_path / f"b{suffix}")
        assert b"Rating='4'" in xmp and b'"6"' not in xmp  # Pillow itself drops the orientation of TIFF files


def test_words_on_a_gain_map_go_with_it(infer, photograph, tmp_path):
    """They would send readers to a picture that is not in the result."""
    Image.open(photograph).save(photograph, xmp=HDR)
    status, _, err = infer("-i", photograph, "-o", tmp_path / "out")
    assert status == 0 and "a.jpg: its gain map or depth map is left out" in err
    assert xmp_of(tmp_path / "out" / "a.jpg") is None


def test_metadata_as_asked(infer, photograph, tmp_path):
    for asked in ("keep", "strip", "settings"):
        assert infer("-i", photograph, "-o", tmp_path / asked, "-s", 2, "--seed", 7, "--metadata", asked)[0] == 0
    found = {asked: Image.open(tmp_path / asked / "a.jpg") for asked in ("keep", "strip", "settings")}
    assert found["keep"].getexif()[ExifTags.Base.Artist] and COMMENT not in found["keep"].getexif().get_ifd(TAGS)
    assert not found["strip"].getexif() and xmp_of(tmp_path / "strip" / "a.jpg") is None
    assert found["settings"].getexif()[ExifTags.Base.Artist] == "A. Photographer"
    made = json.loads(found["settings"].getexif().get_ifd(TAGS)[COMMENT].removeprefix(b"ASCII\0\0\0"))
    assert {name: made[name] for name in ("model", "scale", "seed", "key")} == {
        "model": "nano-ccsr", "scale": 2, "seed": 7, "key": "a.jpg",
    }  # fmt: skip


def test_settings_of_a_file_and_of_frames_are_written_down(infer, model, photograph, tmp_path):
    """What is needed to make the picture again: its noise's name, and what stood in --config."""
    (tmp_path / "sampler.yaml").write_text("guidance: 2.0\nt_min: 0.25")
    flags = ["--config", tmp_path / "sampler.yaml", "--frames", "--metadata", "settings", "--json", tmp_path / "log"]
    assert infer("-i", photograph, "-o", tmp_path / "out", *flags)[0] == 0
    comment = Image.open(tmp_path / "out" / "a.jpg").getexif().get_ifd(TAGS)[COMMENT]
    made = json.loads(comment.removeprefix(b"ASCII\0\0\0"))
    assert (made["key"], made["guidance"], made["t_min"]) == ("frame", 2.0, 0.25)
    logged = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert logged["key"] == "frame" == model.calls[0].keys[0]


def test_a_record_that_a_format_cannot_hold_is_told(infer, tmp_path, caplog):
    for name in ("a.bmp", "b.tif", "c.tif", "d.png"):
        form = codec.Form(bits=16 if name in ("b.tif", "d.png") else 8)
        codec.write(tmp_path / "in" / name, codec.Photo(torch.zeros(3, 4, 5), None, form))
    assert infer("-i", tmp_path / "in", "-o", tmp_path / "1")[0] == 0 and not caplog.messages
    assert infer("-i", tmp_path / "in", "-o", tmp_path / "2", "--metadata", "settings")[0] == 0
    told = [message for message in caplog.messages if "cannot hold how it was restored" in message]
    assert len(told) == 2 and "a.bmp" in told[0] and "b.tif" in told[1]


def test_formats_that_are_missing_here(infer, photograph, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WRITABLE", {".png": formats.WRITABLE[".png"]})
    status, _, err = infer("-i", photograph, "-o", tmp_path / "out", "--ext", "jxl")
    assert status == 2 and err == "error: --ext jxl cannot be written here: pip install -U pillow-jxl-plugin\n"


def test_a_profile_is_not_lost_in_a_format_without_one(tmp_path):
    form = codec.Form(profile=b"colours")
    assert formats.suffix_for(".bmp", form) == ".png" and formats.suffix_for(".bmp", codec.Form()) == ".bmp"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_dots_per_inch_are_kept(tmp_path, suffix):
    Image.new("RGB", (6, 4)).save(tmp_path / f"a{suffix}", dpi=(300, 300))
    codec.write(tmp_path / f"b{suffix}", codec.read(tmp_path / f"a{suffix}"))
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert tuple(round(float(value)) for value in image.info["dpi"]) == (300, 300)


def test_dots_per_inch_that_a_format_cannot_say_are_left_out(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", dpi=(70000, 70000))
    codec.write(tmp_path / "b.jpg", codec.read(tmp_path / "a.png"))
    assert codec.read(tmp_path / "b.jpg").form.dpi is None  # 70000 less 65536 would be wrong
