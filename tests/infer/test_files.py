"""Which files scripts/infer.py reads and writes, under which names, in which forms and sizes."""

import os

import numpy as np
import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.inference import jobs


def test_folder(infer, folder, tmp_path, files):
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 0 and err == ""
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (36, 48)
    assert "done 3, skipped 0, failed 0" in out and out.count("\n") == 1


def test_recursive_keeps_sub_folders(infer, folder, tmp_path, files):
    assert infer("-i", folder, "-o", tmp_path / "out", "--recursive")[0] == 0
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp", "sub/d.png"}


def test_results_below_the_input_are_not_inputs(infer, folder, files):
    assert infer("-i", folder, "-o", folder / "results", "--recursive")[0] == 0
    assert infer("-i", folder, "-o", folder / "results", "--recursive", "--overwrite")[0] == 0
    assert files(folder / "results") == {"a.png", "b.jpg", "c.webp", "sub/d.png"}


def test_what_earlier_runs_left_beside_the_inputs_is_no_input(infer, folder, files):
    """Pictures of sampling steps, and the frames of a film that is not whole yet."""
    assert infer("-i", folder, "-o", folder, "--save-steps")[0] == 0
    for name in ("a.mp4_frames/in/000001.png", "walk_steps/1.png"):  # the second is the user's
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.mp4_frames" / "film.json").write_text("{}")
    assert infer("-i", folder, "-o", folder, "--recursive", "-s", 2)[0] == 0
    new = {name for name in files(folder) if "_x2" in name}
    assert new == {"a_x2.png", "b_x2.jpg", "c_x2.webp", "sub/d_x2.png", "walk_steps/1_x2.png"}


def test_single_file(infer, folder, tmp_path, files):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "deep" / "r.tif", "-s", 1.5)[0] == 0
    with Image.open(tmp_path / "deep" / "r.tif") as image:
        assert image.size == (14, 18)  # 13.5 and 18
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out")[0] == 0
    assert files(tmp_path / "out") == {"a.png"}


def test_list_pattern_and_several(infer, folder, tmp_path, files):
    listed = folder / "list.txt"
    listed.write_text("# two of them\na.png\n\nsub/d.png\n")
    assert infer("-i", listed, "-o", tmp_path / "1")[0] == 0
    assert files(tmp_path / "1") == {"a.png", "sub/d.png"}
    assert infer("-i", folder / "*.png", "-o", tmp_path / "2")[0] == 0
    assert files(tmp_path / "2") == {"a.png"}
    assert infer("-i", folder / "a.png", folder / "b.jpg", folder / "a.png", "-o", tmp_path / "3")[0] == 0
    assert files(tmp_path / "3") == {"a.png", "b.jpg"}


def test_list_with_a_missing_file(infer, folder, tmp_path, files):
    (folder / "list.txt").write_text("a.png\ngone.png\n")
    status, _, err = infer("-i", folder / "list.txt", "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png"}
    assert "gone.png: cannot be read (No such file or directory)" in err


def test_extension(infer, folder, tmp_path, files):
    Image.new("RGBA", (8, 8)).save(folder / "t.png")
    Image.new("P", (8, 8)).save(folder / "p.gif")
    assert infer("-i", folder, "-o", tmp_path / "out", "--ext", "jpg")[0] == 0
    assert files(tmp_path / "out") == {"a.jpg", "b.jpg", "c.jpg", "p.jpg", "t.png"}
    assert infer("-i", folder / "p.gif", "-o", tmp_path / "gif")[0] == 0
    assert files(tmp_path / "gif") == {"p.png"}


def test_equal_stems_stay_apart(infer, folder, tmp_path, files):
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    assert infer("-i", folder, "-o", tmp_path / "out", "--ext", "png")[0] == 0
    assert files(tmp_path / "out") == {"a_jpg.png", "a_png.png", "b.png", "c.png"}


def test_same_name_from_two_folders(infer, folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "sub" / "a.png")
    status, _, err = infer("-i", folder / "a.png", folder / "sub" / "a.png", "-o", tmp_path / "out")
    assert status == 2 and "would both become" in err


def test_suffix(infer, folder, tmp_path, files):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out", "--suffix", "_sr")[0] == 0
    assert files(tmp_path / "out") == {"a_sr.png"}
    assert infer("-i", folder / "a.png", "-o", folder, "-s", 2.5)[0] == 0
    assert (folder / "a_x2.5.png").is_file()


def test_existing_results(infer, folder, tmp_path, files):
    out = tmp_path / "out"
    assert infer("-i", folder / "a.png", "-o", out)[0] == 0
    first = (out / "a.png").read_bytes()
    status, _, err = infer("-i", folder, "-o", out)
    assert status == 2 and "a.png exists" in err and "--overwrite" in err
    assert len(infer.loads) == 1 and files(out) == {"a.png"}  # refused before anything was loaded
    status, text, _ = infer("-i", folder, "-o", out, "--skip-existing", "--seed", 1)
    assert status == 0 and "done 2, skipped 1, failed 0" in text
    assert (out / "a.png").read_bytes() == first
    assert infer("-i", folder, "-o", out, "--overwrite", "--seed", 1)[0] == 0
    assert (out / "a.png").read_bytes() != first


def test_inputs_are_never_replaced(infer, folder):
    before = (folder / "a.png").read_bytes()
    for output in (folder, folder / "a.png", folder / "sub" / ".." / "a.png"):
        status, _, err = infer("-i", folder / "a.png", "-o", output, "--suffix", "", "--overwrite")
        assert status == 2 and "would replace an input" in err
    assert (folder / "a.png").read_bytes() == before


def test_the_log_is_no_picture(infer, folder, tmp_path):
    for log, said in ((folder / "a.png", "is no log"), (tmp_path / "out" / "a.png", "is a result's name, too")):
        status, _, err = infer("-i", folder, "-o", tmp_path / "out", "--json", log)
        assert status == 2 and said in err


def test_no_repeat_replaces_an_input(infer, folder, tmp_path):
    out = tmp_path / "out"
    assert infer("-i", folder / "a.png", "-o", out, "--repeat", 2)[0] == 0
    before = (out / "sample0" / "a.png").read_bytes()
    status, _, err = infer("-i", out / "sample0", "-o", out, "--repeat", 2, "--overwrite")
    assert status == 2 and "would replace an input" in err
    assert (out / "sample0" / "a.png").read_bytes() == before


def test_results_beside_the_inputs_are_skipped(infer, folder, files):
    """An interrupted run goes on; nothing is restored twice, and without the flag nothing is replaced."""
    assert infer("-i", folder / "a.png", folder / "b.jpg", "-o", folder)[0] == 0
    before = (folder / "a_x4.png").read_bytes()
    for flags in ([], ["--overwrite"]):
        status, _, err = infer("-i", folder, "-o", folder, *flags)
        assert status == 2 and "_x4" in err and "--skip-existing" in err
    status, text, _ = infer("-i", folder, "-o", folder, "--skip-existing")
    assert status == 0 and "done 1, skipped 2, failed 0" in text
    status, text, _ = infer("-i", *sorted(folder.glob("*_x4.*")), folder, "-o", folder, "--skip-existing")
    assert status == 0 and "done 0, skipped 3, failed 0" in text
    assert {name for name in files(folder) if "_x4" in name} == {"a_x4.png", "b_x4.jpg", "c_x4.webp"}
    assert (folder / "a_x4.png").read_bytes() == before
    own = ("-i", folder / "a.png", "-o", folder, "--suffix", "", "--skip-existing")
    status, _, err = infer(*own)
    assert status == 2 and "would replace an input" in err


def test_forms_are_kept(infer, tmp_path, rng):
    base = tmp_path / "in"
    base.mkdir()
    for name, mode, shape, kind in (
        ("l.png", "L", (5, 6), np.uint8),
        ("la.png", "LA", (5, 6, 2), np.uint8),
        ("rgba.png", "RGBA", (5, 6, 4), np.uint8),
        ("deep.png", "I;16", (5, 6), np.uint16),
        ("cmyk.tif", "CMYK", (5, 6, 4), np.uint8),
        ("one.png", "RGB", (1, 1, 3), np.uint8),
    ):
        samples = rng.integers(0, 256, shape).astype(kind)
        Image.frombytes(mode, shape[1::-1], samples.tobytes()).save(base / name)
    assert infer("-i", base, "-o", tmp_path / "out")[0] == 0
    for path in base.iterdir():
        with Image.open(path) as before, Image.open(tmp_path / "out" / path.name) as after:
            assert after.mode == before.mode
            assert after.size == (4 * before.width, 4 * before.height)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 53), (127, 640), (300, 20)])
@pytest.mark.parametrize("scale", [4, 2.5, 0.3])
def test_exact_sizes(infer, tmp_path, height, width, scale):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    assert infer("-i", tmp_path / "a.png", "-o", tmp_path / "out", "-s", scale)[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))


def test_longest_side(infer, folder, tmp_path):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out", "--longest-side", 50)[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (38, 50)


def test_names_like_results_are_inputs_where_results_go_elsewhere(infer, tmp_path, files, caplog):
    """icon.png and icon_x2.png, a designer's: only beside their inputs are such names those of earlier results."""
    folder = tmp_path / "icons"
    folder.mkdir()
    names = {"icon.png", "icon_x2.png", "icon_1080px.png"}
    for name in names:
        Image.new("RGB", (8, 8), "teal").save(folder / name)
    (tmp_path / "list.txt").write_text("".join(f"icons/{name}\n" for name in sorted(names)))
    for source, place in ((folder, "a"), (folder / "*.png", "b")):
        assert infer("-i", source, "-o", tmp_path / place)[0] == 0
        assert files(tmp_path / place) == names
    assert infer("-i", folder, "-o", folder, "-s", 3)[0] == 0
    assert files(folder) == names | {"icon_x3.png"} and "2 left out as results of earlier runs" in caplog.text
    assert infer("-i", tmp_path / "list.txt", "-o", tmp_path, "-s", 5)[0] == 0  # a list names them
    assert files(folder) == names | {"icon_x3.png", "icon_x5.png", "icon_x2_x5.png", "icon_1080px_x5.png"}


def test_results_at_another_scale_are_not_restored_again(infer, folder, files):
    before = files(folder)
    assert infer("-i", folder, "-o", folder, "-s", 2)[0] == 0
    assert infer("-i", folder, "-o", folder, "-s", 3)[0] == 0
    new = files(folder) - before
    assert new == {
        f"{stem}_x{scale}.{end}" for stem, end in (("a", "png"), ("b", "jpg"), ("c", "webp")) for scale in "23"
    }
    assert infer("-i", folder / "a_x2.png", "-o", folder / "named", "-s", 2)[0] == 0  # who names one wants it


def test_earlier_results_of_equal_stems_are_not_restored_again(infer, folder, files):
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    for scale in "23":
        assert infer("-i", folder, "-o", folder, "-s", scale, "--ext", "png")[0] == 0
    results = {f"{stem}_x{scale}.png" for stem in ("a_jpg", "a_png", "b", "c") for scale in "23"}
    assert {name for name in files(folder) if "_x" in name} == results


def test_a_list_s_results_stay_below_the_output_folder(infer, tmp_path, files, monkeypatch):
    """Called from a folder that is also reached through a link, with absolute paths over that link."""
    (tmp_path / "real" / "data" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (8, 8), "teal").save(tmp_path / "real" / "data" / name)
    monkeypatch.chdir(tmp_path / "real" / "data")
    (tmp_path / "real" / "data" / "list.txt").write_text(
        f"{tmp_path}/link/data/a.png\n{tmp_path}/link/data/sub/b.png\n"
    )
    assert infer("-i", "list.txt", "-o", "results")[0] == 0
    assert files(tmp_path / "real" / "data" / "results") == {"a.png", "sub/b.png"}


def test_linked_folders_keep_their_names(infer, folder, tmp_path, files):
    """Data sets are linked more often than not: in lists, and below a folder, where a circle of links ends."""
    for name in ("one", "two"):
        (tmp_path / "store" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "store" / name / "x.png")
        (folder / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "two" / "back").symlink_to(folder.parent)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "list.txt").write_text("one/x.png\n./two/x.png\n")
    assert infer("-i", folder, "-o", tmp_path / "1", "--recursive")[0] == 0
    assert files(tmp_path / "1") == {"a.png", "b.jpg", "c.webp", "sub/d.png", "one/x.png", "two/x.png"}
    assert infer("-i", folder / "list.txt", "-o", tmp_path / "2")[0] == 0
    assert files(tmp_path / "2") == {"one/x.png", "two/x.png"}


def test_what_only_a_link_shows_is_found(infer, folder, tmp_path, files):
    """Its folder is hidden, or elsewhere; pictures of a kind that is not read are told there, too."""
    for place in (folder / ".store" / "album", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "x.png")
        (place / "y.nef").write_bytes(b"raw")
        (folder / place.name).symlink_to(place)
    status, _, err = infer("-i", folder, "-o", tmp_path / "out", "--recursive")
    assert status == 0 and "not read: 2 .nef" in err
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp", "sub/d.png", "album/x.png", "elsewhere/x.png"}


def test_a_locked_sub_folder_is_one_failure(folder, tmp_path, monkeypatch):
    """Such as lost+found on a disk. Root, as whom tests may run, may read all."""

    def refuse(name, ending):
        real = getattr(os, name)

        def call(path=".", *args, **how):
            if str(path).endswith(ending):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **how)

        monkeypatch.setattr(os, name, call)

    (folder / "locked").mkdir()
    refuse("scandir", "locked")
    refuse("stat", "locked/film.json")
    (folder / "sub" / "deep").mkdir()  # whose name alone can be read: chmod a-x sub
    for name in ("scandir", "stat", "lstat"):
        refuse(name, "sub/deep")
    planned = jobs.plan([str(folder)], jobs.Naming(output=tmp_path / "out"), recursive=True)
    assert [job.key for job in planned] == ["a.png", "b.jpg", "c.webp", "locked", "sub/d.png", "sub/deep"]
    assert [job.error for job in planned if job.error] == 2 * ["cannot be read (Permission denied)"]


def test_planning_compares_no_image_with_all_others(folder, tmp_path, monkeypatch):
    """Which for 100,000 frames of a film would take half an hour."""
    monkeypatch.setattr(jobs.Job, "__eq__", lambda job, other: pytest.fail("two jobs are compared"))
    Image.new("RGB", (8, 8)).save(folder / "a_x2.png")
    planned = jobs.plan([str(folder)], jobs.Naming(output=folder))
    assert [job.source.name for job in planned] == ["a.png", "b.jpg", "c.webp"]
    with pytest.raises(UserError, match="would replace an input"):
        jobs.plan([str(folder)], jobs.Naming(output=folder, scale=2))


def test_names_that_differ_by_case_only_stay_apart(infer, folder, tmp_path, files, monkeypatch):
    """On macOS and Windows one would replace the other; elsewhere results have their inputs' names."""
    Image.new("RGB", (8, 8)).save(folder / "A.jpg")
    assert infer("-i", folder, "-o", tmp_path / "0", "--ext", "png")[0] == 0
    assert files(tmp_path / "0") == {"A.png", "a.png", "b.png", "c.png"}
    Image.new("RGB", (8, 8)).save(folder / "sub" / "A.png")
    names = [folder / "a.png", folder / "sub" / "A.png"]
    assert infer("-i", *names, "-o", tmp_path / "2", "--suffix", "y")[0] == 0
    monkeypatch.setattr(jobs, "ONE_NAME", str.casefold)
    assert infer("-i", folder, "-o", tmp_path / "1", "--ext", "png")[0] == 0
    assert files(tmp_path / "1") == {"A_jpg.png", "a_png.png", "b.png", "c.png"}
    status, _, err = infer("-i", *names, "-o", tmp_path / "3", "--suffix", "y")
    assert status == 2 and "would both become" in err


def test_a_result_s_whole_name_leaves_nothing_to_add(infer, folder, tmp_path):
    for flags in (["--ext", "png"], ["--suffix", "_z"]):
        status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "b.jpg", *flags)
        assert status == 2 and "is the result's whole name: leave out --suffix and --ext" in err
    assert infer("-i", folder / "a.png", "-o", tmp_path / "b.jpg", "--ext", "jpg")[0] == 0


def test_an_output_folder_that_may_not_be_written_to_is_refused_at_once(infer, folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(jobs.os, "access", lambda path, mode: str(path) != str(tmp_path / "out"))  # root may write all
    status, _, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 2 and "may not be written to; use another place" in err and not infer.loads
