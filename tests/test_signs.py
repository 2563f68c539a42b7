"""Drawn pictures for nano's training: each from its own seed, with letters and edges, in every typeface."""

from pathlib import Path

import numpy as np
from PIL import ImageFont

from consissr.nano import signs


def test_the_same_seed_draws_the_same_picture(tmp_path: Path, monkeypatch) -> None:
    """Whatever is drawn before; another seed draws another one."""
    for folder, count in (("one", 3), ("two", 2)):
        monkeypatch.setattr("sys.argv", ["signs", str(tmp_path / folder), "--count", str(count), "--seed", "4"])
        signs.main()
    one, two = ([p.read_bytes() for p in sorted((tmp_path / folder).iterdir())] for folder in ("one", "two"))
    assert one[:2] == two
    assert len(set(one)) == 3


def test_pictures_have_smooth_areas_and_sharp_edges() -> None:
    """What photographs of this size lack: edges one pixel wide beside areas with hardly any change."""
    for seed in range(5):
        picture = np.asarray(signs.Painter(seed, []).picture()).astype(float)
        assert picture.shape == (signs.SIDE, signs.SIDE, 3)
        steps = np.abs(np.diff(picture, axis=1)).max(-1)
        assert (steps < 2).mean() > 0.5
        assert (steps > 30).mean() > 0.005


def test_every_typeface_is_used(monkeypatch) -> None:
    """Of a folder, and Pillow's own."""
    asked, default = set(), ImageFont.load_default(20)
    monkeypatch.setattr(ImageFont, "truetype", lambda name, size: asked.add(name) or default)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: asked.add("Pillow's") or default)
    for seed in range(30):
        signs.Painter(seed, [Path("a.ttf"), Path("b.ttf")]).words((0, 0, 300, 300), (0, 0, 0))
    assert asked == {"a.ttf", "b.ttf", "Pillow's"}
