"""Files as they come from phones, cameras and other programs: restored right, or one line that says why not."""

import json
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from consissr.errors import UserError
from consissr.images import codec, formats, metadata, png
from consissr.images.resize import resize


def photograph(rng, *shape):
    return rng.integers(0, 256, shape).astype(np.uint8)


def test_names_as_long_as_a_file_system_takes(infer, tmp_path, rng, files):
    """255 bytes; with a suffix a result's name is too long, which concerns that file alone."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "n" * 251 + ".png", "画" * 83 + "yy.png"):
        Image.fromarray(photograph(rng, 5, 6, 3)).save(tmp_path / "in" / name)
    status, out, _ = infer("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert status == 0 and files(tmp_path / "out") == files(tmp_path / "in")
    status, out, err = infer("-i", tmp_path / "in", "-o", tmp_path / "more", "--suffix", "_y")
    assert status == 1 and files(tmp_path / "more") == {"a_y.png"} and "done 1, skipped 0, failed 2" in out
    assert err.count("cannot be written") == 2


def test_whatever_a_file_makes_a_reader_raise_is_its_own_line(infer, folder, tmp_path, rng, files):
    tifffile.imwrite(folder / "overflow.tif", rng.integers(0, 65536, (30, 40, 3)).astype(np.uint16), tile=(16, 16))
    whole = (folder / "overflow.tif").read_bytes()
    width = struct.pack("<HHII", 322, 4, 1, 16)  # the tag TileWidth, one long
    assert whole.count(width) == 1
    (folder / "overflow.tif").write_bytes(whole.replace(width, width[:-1] + b"\x70"))
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    assert err.count("failed: ") == 1 and "overflow.tif: damaged image" in err


def test_whatever_a_header_makes_a_reader_raise_is_its_files_line(infer, folder, tmp_path, monkeypatch, files):
    probe, raises = formats.probe, {"a.png": MemoryError(), "b.jpg": UnboundLocalError("x")}

    def broken(path):
        if path.name in raises:
            raise raises[path.name]
        return probe(path)

    monkeypatch.setattr(formats, "probe", broken)
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"c.webp"}
    assert "a.png: MemoryError" in err and "b.jpg: UnboundLocalError: x" in err


def test_deep_colour_keeps_resolution_and_its_transparent_colour(tmp_path, rng):
    """16 bits per sample: dots per inch, and what PNG's tRNS makes invisible."""
    deep = rng.integers(1, 65536, (6, 5, 3)).astype(np.uint16)
    deep[2:4, 1] = (7, 8, 9)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", resolution=(300, 200), resolutionunit="INCH")
    for suffix in (".tif", ".png"):
        codec.write(tmp_path / f"b{suffix}", codec.read(tmp_path / "a.tif"))
        assert codec.read(tmp_path / f"b{suffix}").form.dpi == pytest.approx((300, 200), rel=1e-4)
    with (tmp_path / "c.png").open("wb") as file:
        png.write(file, deep, chunks=[(b"tRNS", struct.pack(">3H", 7, 8, 9))])
    photo = codec.read(tmp_path / "c.png")
    assert photo.form.alpha and torch.equal(photo.alpha[0] == 0, torch.from_numpy((deep == (7, 8, 9)).all(2)))
    with Image.open(tmp_path / "c.png") as image:
        assert codec.from_pil(image).alpha is None  # of which Pillow keeps 8 bits, and no colour of 16
    with (tmp_path / "d.png").open("wb") as file:
        png.write(file, deep[..., :1], chunks=[(b"tRNS", struct.pack(">H", 7))])
    with Image.open(tmp_path / "d.png") as image:
        for photo in (codec.from_pil(image), codec.read(tmp_path / "d.png")):
            assert torch.equal(photo.alpha[0] == 0, torch.from_numpy(deep[..., 0] == 7))


def test_a_file_where_a_results_folder_must_be(infer, folder, tmp_path, files):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").write_text("a file")
    status, out, err = infer("-i", folder, "-o", tmp_path / "out", "--recursive")
    assert status == 1 and "done 3, skipped 0, failed 1" in out
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp", "sub"}


def test_places_that_cannot_be_written_are_refused_before_the_model_loads(infer, folder, tmp_path):
    inside = folder / "a.png" / "sub"
    other, loop = ["-o", tmp_path / "o"], tmp_path / "loop"
    loop.symlink_to(loop)
    for flags in (
        ["-o", inside],
        ["-o", inside / "c.png"],
        [*other, "--json", inside / "log"],
        [*other, "--json", tmp_path],
        ["-o", f"{tmp_path}/a\0b"],
        [*other, "--suffix", "a\0"],
        [*other, "--json", f"{tmp_path}/a\0"],
        ["-o", loop],
        [*other, "--json", loop],
    ):
        status, _, err = infer("-i", folder / "a.png", *flags)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, flags
    assert not infer.loads


def test_no_log_loses_results(infer, folder, tmp_path, files):
    if not (full := tmp_path.__class__("/dev/full")).exists():
        pytest.skip("no device that is always full")
    status, _, err = infer("-i", folder, "-o", tmp_path / "out", "--json", full)
    assert status == 2 and "No space left" in err and not infer.loads


def test_the_log_begins_before_the_first_image_ends(infer, folder, tmp_path, model):
    seen, restore = [], model.__class__.__call__

    class Looking(model.__class__):
        def __call__(self, *images, **settings):
            seen.append((tmp_path / "log").read_text())
            return restore(self, *images, **settings)

    model.__class__ = Looking
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out", "--json", tmp_path / "log")[0] == 0
    assert json.loads(seen[0])["event"] == "run"


def test_pictures_that_are_not_read_are_counted(infer, folder, tmp_path, monkeypatch, files):
    monkeypatch.setattr(formats, "READABLE", formats.READABLE - formats.PLUGINS.keys())
    for name in ("p.heic", "q.HEIC", "r.dng", "s.hif", "notes.md"):
        (folder / name).write_bytes(b"x")
    Image.new("RGB", (4, 4)).save(folder / "old.jpe", format="JPEG")
    for number, text in enumerate((folder, folder / "*")):  # a pattern that the shell leaves alone
        out = tmp_path / f"out{number}"
        status, _, err = infer("-i", text, "-o", out)
        assert status == 0 and files(out) == {"a.png", "b.jpg", "c.webp", "old.png"}
        assert err == "not read: 1 .dng, 2 .heic, 1 .hif (pip install -U pillow-heif)\n"


def test_further_pictures_of_a_file_are_told(infer, tmp_path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    status, _, err = infer("-i", tmp_path / "two.tif", "-o", tmp_path / "out")
    assert status == 0 and "two.tif: only the first of 2 pictures" in err


def test_a_phones_picture_with_another_behind_it(infer, tmp_path, rng):
    """Depth or an HDR gain map behind the picture, which may end early: the picture itself is whole."""
    first, second = (Image.fromarray(photograph(rng, 40, 48, 3)) for _ in range(2))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[:-300])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    status, _, err = infer("-i", tmp_path / "a.jpg", tmp_path / "b.jpg", "-o", tmp_path / "out")
    assert status == 0 and err.count("only the first of 2 pictures") == 2
    assert Image.open(tmp_path / "out" / "b.jpg").size == (192, 160)


def test_frames_share_their_noise(infer, model, tmp_path, rng):
    """Four equal frames under different names: equal results, in batches, too."""
    samples = photograph(rng, 8, 8, 3)
    for i in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(samples).save(tmp_path / "in" / f"{i:04d}.png")
    for flags, equal in (([], False), (["--frames"], True), (["--frames", "--batch-size", "3"], True)):
        out = tmp_path / f"out{len(flags)}"
        assert infer("-i", tmp_path / "in", "-o", out, *flags)[0] == 0
        results = [np.asarray(Image.open(path)).astype(int) for path in sorted(out.iterdir())]
        assert (np.abs(np.diff(results, axis=0)).mean() == 0) == equal


@pytest.mark.parametrize("under", ["noise", "white"])
def test_what_is_hidden_under_transparency_does_not_bleed(rng, under):
    """A dark disc on nothing: enlarged, its visible rim stays dark."""
    y, x = np.mgrid[:48, :48]
    disc = (x - 23.5) ** 2 + (y - 23.5) ** 2 < 15**2
    samples = np.zeros((48, 48, 4), np.uint8)
    samples[..., :3] = photograph(rng, 48, 48, 3) if under == "noise" else 255
    samples[disc] = (20, 30, 40, 255)
    photo = codec.from_pil(Image.fromarray(samples))
    large = codec.to_pil(photo.restored(resize(photo.pixels, (192, 192))))
    values = np.asarray(large).astype(int)
    seen = values[values[..., 3] > 0]
    assert np.abs(seen[:, :3] - (20, 30, 40)).max() <= 1


def test_visible_colours_stay_bit_for_bit(rng):
    samples = photograph(rng, 30, 20, 4)
    samples[5:9, 3:7, 3] = 0
    photo = codec.from_pil(Image.fromarray(samples))
    assert torch.equal(photo.pixels[:, samples[..., 3] > 0], codec.from_pil(Image.fromarray(samples[..., :3])).pixels[
        :, samples[..., 3] > 0
    ])  # fmt: skip


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_without_loss_stays_so(tmp_path, rng, lossless):
    Image.fromarray(photograph(rng, 16, 16, 3)).save(tmp_path / "a.webp", lossless=lossless)
    photo = codec.read(tmp_path / "a.webp")
    codec.write(tmp_path / "b.webp", photo)
    assert metadata.is_lossless_webp(tmp_path / "b.webp") == lossless
    assert torch.equal(codec.read(tmp_path / "b.webp").pixels, photo.pixels) == lossless


def test_bitmaps_of_five_and_six_bits(tmp_path):
    """RGB565, three masks in the header: pure red, green and blue."""
    pixels = struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF)
    header = struct.pack("<IiiHHIIiiII", 40, 4, -1, 1, 16, 3, len(pixels), 2835, 2835, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    start = 14 + len(header) + len(masks)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + pixels
    (tmp_path / "a.bmp").write_bytes(file)
    photo = codec.read(tmp_path / "a.bmp")
    assert photo.form.bits == 8
    want = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert np.asarray(codec.to_pil(photo))[0].tolist() == want


def test_cie_lab(tmp_path):
    """A grey of L* 53.6 is sRGB 128; a* 60 with little b* is a red."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colours = Image.new("RGB", (2, 1), (128, 128, 128))
    colours.putpixel((1, 0), (200, 40, 60))
    ImageCms.profileToProfile(colours, srgb, lab, outputMode="LAB").save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "LAB"
    back = np.asarray(codec.to_pil(codec.read(tmp_path / "a.tif"))).astype(int)
    assert np.abs(back[0] - [(128, 128, 128), (200, 40, 60)]).max() <= 3


def test_a_bad_model_id_is_one_line():
    from consissr.weights.find import find_model

    with pytest.raises(UserError, match="a b/c d"):
        find_model("a b/c d")


def test_without_the_modules_that_windows_lacks(monkeypatch):
    import sys

    from consissr.models import memory

    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises ImportError
    assert memory.peak_memory_mb() >= 0
    monkeypatch.setattr(sys, "platform", "win32")
    memory.set_heap()


def test_libtiff_writes_no_lines_of_its_own(tmp_path, rng, capfd):
    """They name no file; what is wrong stands in the file's own line."""
    Image.fromarray(photograph(rng, 64, 64)).save(tmp_path / "a.tif", compression="tiff_deflate")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[60:400] = bytes([7]) * 340
    (tmp_path / "a.tif").write_bytes(data)
    formats.quiet()
    with pytest.raises(UserError, match="a.tif: damaged image"):
        codec.read(tmp_path / "a.tif")
    assert capfd.readouterr().err == ""


def test_long_paths_on_windows():
    long = "n" * 250
    assert formats.reachable("C:\\photos\\a.png", windows=True) == "C:\\photos\\a.png"
    assert formats.reachable(f"C:\\photos\\{long}.png", windows=True) == f"\\\\?\\C:\\photos\\{long}.png"
    assert formats.reachable(f"\\\\server\\share\\{long}", windows=True) == f"\\\\?\\UNC\\server\\share\\{long}"
    assert formats.reachable(formats.reachable(f"C:\\{long}", windows=True), windows=True) == f"\\\\?\\C:\\{long}"
    assert formats.reachable(f"/{long}", windows=False) == f"/{long}"


def test_deep_grey_whose_white_is_zero_is_no_negative(tmp_path, rng):
    """Scanners' and microscopes' TIFF: PhotometricInterpretation 0, which Pillow turns for 8 bits only."""
    for kind in (np.uint8, np.uint16):
        top = np.iinfo(kind).max
        dark = np.array([[0, top // 10], [top // 3, top]], kind)
        tifffile.imwrite(tmp_path / "a.tif", top - dark, photometric="miniswhite")
        photo = codec.read(tmp_path / "a.tif")
        codec.write(tmp_path / "b.tif", photo)
        assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), dark)
        assert tifffile.TiffFile(tmp_path / "b.tif").pages[0].photometric == tifffile.PHOTOMETRIC.MINISBLACK


def test_deep_colours_stored_multiplied_with_alpha(tmp_path, rng):
    """16-bit TIFF with associated alpha: divided in 16 bits, to within what the stored product tells."""
    colours = rng.integers(0, 65536, (6, 8, 3)).astype(np.uint16)
    alpha = rng.integers(3000, 65536, (6, 8, 1)).astype(np.uint16)
    alpha[0] = 65535
    stored = np.rint(colours * (alpha / 65535)).astype(np.uint16)
    for order in "<>":
        rgba = np.concatenate([stored, alpha], 2)
        tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["assocalpha"], byteorder=order)
        photo = codec.read(tmp_path / "a.tif")
        seen = (photo.pixels.numpy() + 1) / 2 * 65535
        bound = 0.51 * 65535 / alpha.transpose(2, 0, 1) + 0.6  # half a step of the product, and rounding
        assert (np.abs(seen - colours.transpose(2, 0, 1)) <= bound).all()
        assert np.array_equal(np.rint(photo.alpha.numpy() * 65535), alpha.transpose(2, 0, 1))
