"""The page's runs and texts, without gradio and a browser."""

import re
import sys
import zipfile
from threading import Event

import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.images import codec
from consissr.inference import page


@pytest.fixture
def root(tmp_path):
    (tmp_path / "served").mkdir()
    return tmp_path / "served"


def test_a_run_tells_where_it_is_and_leaves_nothing_behind(root, upload, load, enlarger):
    model = enlarger()
    uploads = [upload(name) for name in ("a.png", "a.png", "broken.jpg", "list.txt", "<i>.tif")]
    run = page.Run(root, uploads, 2, load(model, seed=5))
    told = list(run)
    assert [call.seed for call in model.calls] == [5] * 3
    assert [t.words for t in told if t.share is None] == [told[-1].words] and told[-1].words.endswith(
        "3 of 5 restored."
    )
    assert {"a.png: tile 2 of 3", "a (2).png: tile 3 of 3"} <= {t.detail.split(" (about")[0] for t in told}
    shares = [t.share for t in told[:-1]]
    assert shares == sorted(shares) and shares[0] == 0

    errors = {o.job.source.name: o.error for o in told[-1].outcomes if o.status == "failed"}
    assert errors == {"broken.jpg": "not an image that can be read", "list.txt": "not a kind of image that is read"}
    with zipfile.ZipFile(run.folder / page.ZIP) as file:
        assert sorted(file.namelist()) == ["<i>.tif", "a (2).png", "a.png"]
        assert file.read("a.png") == (run.folder / "out" / "a.png").read_bytes()
    assert codec.read(run.folder / "out" / "a.png").pixels.shape == (3, 18, 24)
    run.close()
    assert list(root.iterdir()) == []


def test_results_are_shown_beside_their_originals(root, upload, load):
    run = page.Run(root, [upload("<i>.tif"), upload("broken.png"), upload("b.png")], 2, load())
    texts = [page.results(told, run.folder) for told in run]
    last = texts[-1]
    assert texts[0] == "" and all(last.startswith(text) for text in texts), "what is there stays as it is"
    assert "<i>" not in last and last.count("<compare-images") == 2 and last.count(" checked") == 1
    assert "<b>broken.png</b>: not an image that can be read" in last and f"{page.ZIP}" in last
    places = re.findall(f'(?:left|right|href)="{re.escape(page.FILES)}(.*?)"', last)
    names = [place.removeprefix(run.folder.as_posix()) for place in places]
    assert names[:3] == ["/out/%3Ci%3E.tif", "/shown/in/%3Ci%3E.tif.jpg", "/shown/out/%3Ci%3E.tif.jpg"]
    assert names[3:] == ["/out/b.png", "/in/b.png", "/out/b.png", f"/{page.ZIP}"]
    with Image.open(run.folder / "shown" / "out" / "<i>.tif.jpg") as image:
        assert image.format == "JPEG" and image.size == (24, 18), "browsers show no TIFF"
    run.close()


def test_a_preview_that_cannot_be_written_costs_no_result(root, upload, load, monkeypatch):
    write = codec.write

    def full(path, *what):
        if "shown" in path.parts:
            raise UserError(f"{path}: cannot be written (No space left on device)")
        write(path, *what)

    monkeypatch.setattr(codec, "write", full)
    run = page.Run(root, [upload("a.tif"), upload("b.png")], 2, load())
    *_, last = run
    assert last.words.endswith("2 of 2 restored.")
    with zipfile.ZipFile(run.folder / page.ZIP) as file:
        assert sorted(file.namelist()) == ["a.tif", "b.png"]
    run.close()


def test_a_stopped_run_ends_within_a_picture_and_keeps_what_is_done(root, upload, load, enlarger):
    for how in ("stop", "leave"):
        seen, go_on, tiles = Event(), Event(), iter(range(12))

        def begun(tile, tiles=tiles, seen=seen, go_on=go_on):
            if next(tiles) == 10:  # in the fourth picture
                seen.set()
                assert go_on.wait(60)

        run = page.Run(root, [upload(f"{name}.png") for name in "abcd"], 2, load(enlarger(begun)))
        told = iter(run)
        assert next(told).words == "Loading the model ..." and seen.wait(60)
        if how == "stop":
            run.stop.set()
        else:
            told.close()  # what gradio does where nobody listens any more
        go_on.set()
        if how == "stop":
            *_, last = told
            assert last.words == "Stopped. 3 of 4 restored." and (run.folder / page.ZIP).exists()
            assert [outcome.job.source.name for outcome in last.outcomes] == ["a.png", "b.png", "c.png"]
        run.close()
        assert not run.thread.is_alive() and list(root.iterdir()) == []


def test_mistakes_become_words(root, upload, load, enlarger):
    def unreachable():
        raise UserError("model 'x' is not on this machine: use --model nano-ccsr")

    def full(tile):
        raise UserError(f"{next(root.iterdir()) / 'in' / 'a.png'}.icc is damaged; use a smaller --scale")

    def defect():
        raise ZeroDivisionError("oh")

    calls = [
        ([], 2, load(), "No photographs: add 1 to 32, or choose an example"),
        ([upload("a.png")] * 33, 2, load(), "33 photographs: add 1 to 32"),
        ([upload("a.png")], 100, load(), "scale 100 is out of range"),
        ([upload("a.png") + "gone"], 2, load(), "a.pnggone: not a kind"),
        ([upload("a.png").replace("a.png", "b.png")], 2, load(), "b.png cannot be read (No such file or directory)"),
        ([upload("a.png")], 2, unreachable, "model 'x' is not on this machine: use model nano-ccsr"),
        ([upload("a.png")], 2, load(enlarger(full)), ": a.png.icc is damaged; use a smaller scale"),
        ([upload("a.png")], 2, defect, "ZeroDivisionError: oh"),
    ]
    for uploads, scale, loaded, said in calls:
        run = page.Run(root, uploads, scale, loaded)
        *_, last = run
        text = last.words + "".join(f"{o.job.source.name}: {o.error}" for o in last.outcomes)
        assert said in text and last.share is None and str(root) not in text, text
        run.close()
    *_, last = page.Run(root, [upload("a.png")], 2, load())
    assert last.words.endswith("1 of 1 restored."), "a run that failed lets the next one begin"


def test_models_are_listed_with_what_they_download(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSISSR_HOME", str(tmp_path))
    labels = {name: label for label, name in page.models()}
    assert list(labels)[:2] == ["nano-ccsr", "nano-consissr"] and "sd21-base" not in labels
    assert labels["nano-ccsr"].endswith("(part of this package)") and "6.6 GB, once" in labels["ccsr-v2"]
    assert "9.8 GB, to be put there by hand" in labels["consissr"]
    (tmp_path / "by-hand" / "consissr").mkdir(parents=True)
    (tmp_path / "by-hand" / "consissr" / "ConsisSR.ckpt").touch()
    assert dict(map(reversed, page.models()))["consissr"] == "consissr (on this machine)"


def test_without_gradio_it_says_what_to_install(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert script("demo").main([]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install '.[demo]'\n"
