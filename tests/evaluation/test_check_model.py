"""scripts/check_model.py and the restorations behind it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.evaluation import restorations, workers
from consissr.images import codec
from consissr.weights import find
from consissr.weights.files import read_weights, write_weights
from consissr.weights.find import places
from consissr.weights.released_ccsr import AS_RELEASED_V1, AS_RELEASED_V2


@pytest.fixture
def pairs(tmp_path: Path, sets: dict[str, Path]) -> Path:
    """A folder with LR/ and HR/ of three real pairs."""
    for name in ("lr", "hr"):
        shutil.copytree(sets[name], tmp_path / "pairs" / name.upper())
    return tmp_path / "pairs"


@pytest.fixture
def call(script, capsys, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """call(arguments...) -> (exit status, stdout, stderr) of the script's main, which scores in this process."""
    monkeypatch.setattr(workers, "cores", lambda: 1)

    def run(*arguments: object) -> tuple[int, str, str]:
        status = script("check_model").main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row of a Markdown table, by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_another_model_or_other_images_are_restored_anew(call, pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Under one -o: a model of the same name with other weights, then other images of the same names."""
    other = tmp_path / "other" / tiny_model.name
    shutil.copytree(tiny_model, other)
    path = next(other.glob("controlnet/*.safetensors"))
    write_weights(path, {name: value * 2 for name, value in read_weights(path).items()})
    places = ("--realsr", pairs, "-o", tmp_path / "out")
    status, text, errors = call(tiny_model, *places)
    assert status == 0, errors
    first = rows(text)
    assert list(first)[1:] == ["bicubic", "bicubic+grain", f"{tiny_model} S=1", f"{tiny_model} S=2"]
    assert math.isfinite(float(first[f"{tiny_model} S=2"][-1])) and first["bicubic"][-1] == "-"
    (folder,) = (path for path in (tmp_path / "out" / "realsr").glob("tiny-*") if path.is_dir())
    assert {part.name for part in folder.iterdir()} == {"S1", "S1-wrong", "S2", "S2-wrong"}
    assert (folder / "S1" / "a.png").read_bytes() != (folder / "S1-wrong" / "a.png").read_bytes()

    (folder / "S2" / "b.png").unlink()
    assert rows(call(tiny_model, *places)[1]) == first, "an interrupted check goes on"
    second = rows(call(other, *places)[1])
    assert second["bicubic"] == first["bicubic"] and second[f"{other} S=1"] != first[f"{tiny_model} S=1"]
    shutil.copy(pairs / "LR" / "b.png", pairs / "LR" / "a.png")
    third = rows(call(tiny_model, *places)[1])
    assert third["bicubic"] != first["bicubic"] and third[f"{tiny_model} S=1"] != first[f"{tiny_model} S=1"]
    assert len(list((tmp_path / "out" / "realsr").glob("tiny-*.json"))) == 3


def test_weights_are_asked_for_in_the_precision_of_the_machine(
    call, pairs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else gigabytes in full precision would be fetched beside those in half precision that are restored with."""
    asked = []

    def find_model(name: str, half: bool = False) -> Path:
        asked.append(half)
        raise UserError("not here")

    monkeypatch.setattr(find, "find_model", find_model)
    monkeypatch.setattr(find, "choose_precision", lambda *_: "bf16")
    assert call(tiny_model, "--realsr", pairs, "-o", tmp_path / "out")[0] == 2 and asked == [True]


def test_photographs(call, make_picture, save, tiny_model: Path, tmp_path: Path) -> None:
    photos = save(tmp_path / "photos", {name: make_picture(i, size=(260, 270)) for i, name in enumerate("ab")})
    status, text, errors = call(tiny_model, "--photos", photos, "-o", tmp_path / "out")
    assert status == 0, errors
    assert list(rows(text))[3:] == [f"{tiny_model} S=1", "S=1, base's decoder"]
    (testset,) = (path for path in (tmp_path / "out" / "photos").glob("testset-*") if path.is_dir())
    assert len(list((testset / "LR").iterdir())) == 2


def test_a_test_set_is_whole_or_made_anew(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"a")
    made = []

    def write(place: Path) -> None:
        assert not place.exists(), "what an interrupted attempt left must go"
        made.append(place)
        (place / "LR").mkdir(parents=True)
        if len(made) > 1:
            (place / "testset.json").write_text("{}")

    for _ in range(3):
        place = restorations.testset_folder(tmp_path, str(tmp_path / "photos"), write)
    assert made == [place, place], "made, interrupted, made anew, kept"
    (tmp_path / "photos" / "a.png").write_bytes(b"b")
    assert restorations.testset_folder(tmp_path, str(tmp_path / "photos"), write) != place


def test_every_image_gets_another_s_condition(tmp_path: Path, make_picture, save) -> None:
    """Images of unequal sizes, an odd number of one size, and a stand-in that returns its condition."""
    sizes = {"a": (8, 8), "b": (8, 12), "c": (8, 8), "d": (8, 12), "e": (8, 8)}
    lr = save(tmp_path / "lr", {name: make_picture(ord(name), size=size) for name, size in sizes.items()})
    groups = restorations.companions(lr)
    assert groups == [["a", "c", "e"], ["b", "d"]]
    calls = []

    def swapped(x: torch.Tensor, scale: int, keys: list[str], plan: None, batch_size: int) -> torch.Tensor:
        calls.append(keys)
        assert batch_size == len(keys) == len(x)
        return x.roll(1, 0)

    restorations.restore(swapped, lr, tmp_path / "wrong", None, groups)
    for name, lender in zip("aceb", "eacd", strict=True):
        pixels = [codec.read(folder / f"{n}.png").pixels for folder, n in ((tmp_path / "wrong", name), (lr, lender))]
        assert torch.equal(*pixels), (name, lender)
    (tmp_path / "wrong" / "d.png").unlink()
    restorations.restore(swapped, lr, tmp_path / "wrong", None, groups)
    assert calls == [["a", "c", "e"], ["b", "d"], ["b", "d"]], "an image without its companion would keep its own"


def test_pairs_of_another_factor_are_restored_by_it(call, pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    for path in (pairs / "HR").iterdir():
        Image.open(path).reduce(2).save(path)
    status, text, errors = call(tiny_model, "--realsr", pairs, "-o", tmp_path / "out")
    assert status == 0, errors
    assert f"{tiny_model} S=1" in rows(text)


def test_mistakes_come_before_the_work(call, pairs: Path, tiny_model: Path, tmp_path: Path, make_picture, save) -> None:
    status, _, text = call("no-such-model")
    assert status == 2 and text.startswith("error: nothing to check: give --realsr DIR")
    (tmp_path / "empty").mkdir()
    for place, told in (("gone", "gone does not exist"), (tmp_path / "empty", "empty holds no images")):
        status, _, text = call(tiny_model, "--realsr", pairs, "--photos", place, "-o", tmp_path / "out")
        assert status == 2 and text.startswith("error: data path") and told in text
    assert not (tmp_path / "out").exists(), "the real pairs are not restored first"
    save(pairs / "LR", {"d": make_picture(3, size=(24, 28))})
    status, _, text = call(tiny_model, "--realsr", pairs, "-o", tmp_path / "out")
    assert status == 2 and "1 images without a partner" in text
    with pytest.raises(UserError, match="no other image has the size of d"):
        restorations.companions(pairs / "LR")


def test_plans_are_on_the_models_grid(script) -> None:
    """What is checked is what the model samples, and the label says how many steps that are."""
    plans_of = script("check_model").plans_of

    def times(config: SamplerConfig) -> dict[str, list[int] | None]:
        return {name: plan and [step.t for step in plan] for name, plan in plans_of(config).items()}

    assert times(SamplerConfig()) == {"S=1": [999], "S=2": [999, 666]}
    assert times(AS_RELEASED_V2) == {"S=1 leading": [999], "S=2 leading": [999, 499]}
    assert times(AS_RELEASED_V1) == {"S=1 linspace": [999], "S=2 linspace": [999, 658], "16 steps": None}
    assert times(SamplerConfig(steps=9, t_max=7 / 9)) == {"S=1": [999], "S=2": [999, 777], "4 steps": None}
    assert times(SamplerConfig(steps=1, t_max=1.0)) == {"S=1": [999]}
    two = [[999, 666, "step"], [666, -1, "x0"]]
    assert times(SamplerConfig(plan="ddpm", timesteps=two)) == {"2 steps": None}
    assert times(SamplerConfig(plan="ddpm", steps=50)) == {"50 steps": None}


def test_told_otherwise_in_tiles(tiny_model: Path) -> None:
    """Another image's condition reaches the networks, and nothing else of the model changes; in tiles, too."""
    from consissr.restorer import Restorer

    restorer, swapped = (Restorer.load(str(tiny_model), vae_tile=64) for _ in range(2))
    hints = []
    restorations.told_otherwise(swapped, hint=lambda z: hints.append(z) or z.roll(1, 0))
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own, other = restorer(x, batch_size=2), swapped(x, batch_size=2)
    assert len(hints) == 1 and len(hints[0]) == 2 and not torch.equal(own, other)
    assert torch.equal(swapped(torch.cat([x[:1], x[:1]]), keys="ab", batch_size=2),
                       restorer(torch.cat([x[:1], x[:1]]), keys="ab", batch_size=2))  # fmt: skip


def test_results_are_kept_for_weights_of_model_and_base(tmp_path: Path, tiny_model: Path) -> None:
    """A base that was trained on in place is another model."""
    lr, base = tmp_path / "lr", tmp_path / "base"
    for folder in (lr, base):
        folder.mkdir()
    (lr / "a.png").write_bytes(b"x")
    folders = set()
    for text in ("one", "two"):
        (base / "weights.safetensors").write_text(text)
        folders.add(restorations.results_folder(tmp_path, "m", places(str(tiny_model), str(base)), lr))
    assert len(folders) == 2
