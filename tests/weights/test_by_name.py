"""`scripts/infer.py -m NAME` from nothing to a photograph, for every layout that was published: then without a network,
from a damaged cache, by two processes at once, and after a download that was cut off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from consissr.config.loading import save_config
from consissr.config.machine import cache_folder
from consissr.weights.cache import by_hand_folder
from consissr.weights.files import read_config
from tests.training.children import finish, forkserver, say_into
from tests.weights.standin import Hub, serve, turn_to

V2, KIJAI, CAMENDURU, MIRROR = (
    "kharma1/ccsr_v2_repost", "Kijai/ccsr-safetensors", "camenduru/CCSR", "Manojb/stable-diffusion-2-1-base",
)  # fmt: skip


@pytest.fixture
def restore(script, tmp_path, capsys) -> Callable[..., tuple[int, np.ndarray | None, str]]:
    """restore(name, *flags) -> (exit status, the result's pixels, what was said), in one step on a small picture."""
    main = script("infer").main
    photo, result = tmp_path / "photo.png", tmp_path / "results" / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(photo)
    (tmp_path / "quick.yaml").write_text("geometry: pad\nshort_side: 0\n")
    flags = ["-i", photo, "-o", tmp_path / "results", "--config", tmp_path / "quick.yaml", "--device", "cpu", "-q"]
    flags += ["--plan", "nuts", "--steps", "1", "--t-min", "0", "--guidance", "1"]

    def run(name: str, *more: str) -> tuple[int, np.ndarray | None, str]:
        result.unlink(missing_ok=True)
        capsys.readouterr()
        status = main(["-m", name, *map(str, flags), *more])
        pixels = np.asarray(Image.open(result)) if result.is_file() else None
        return status, pixels, "".join(capsys.readouterr())

    return run


def whole_v2(hub: Hub, all_in_one: Path, _) -> str:
    """The third party's repository, with the base in half precision."""
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = all_in_one / part / f"{stem}.safetensors"
        halved = {name: value.half() for name, value in load_file(weights).items()}
        save_file(halved, weights.with_name(f"{stem}.fp16.safetensors"), {"format": "pt"})
        weights.chmod(0o644)
        weights.unlink()
    serve(hub, V2, *all_in_one.iterdir())
    return "ccsr-v2"


def v1_ckpt(hub: Hub, _, v1: dict[str, Path]) -> str:
    """The second place of v1; the first one has nothing."""
    serve(hub, CAMENDURU, v1["ckpt"])
    return "ccsr-v1"


def v1_half(hub: Hub, _, v1: dict[str, Path]) -> str:
    """The first place of v1, where only the file in half precision is."""
    serve(hub, KIJAI, v1["half"])
    return "ccsr-v1"


def mirrored_base(hub: Hub, all_in_one: Path, _) -> str:
    """The authors' two folders by hand, and the base from the second mirror, since the first is missing."""
    for part in ("controlnet", "vae"):
        shutil.copytree(all_in_one / part, by_hand_folder("ccsr-v2") / part)
    serve(hub, MIRROR, *(all_in_one / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")))
    return "ccsr-v2"


def by_hand(hub: Hub, all_in_one: Path, _) -> str:
    """ConsisSR's one file by hand, as a Lightning checkpoint."""
    shared = all_in_one.parent / "consissr_A.safetensors"
    by_hand_folder("consissr").mkdir(parents=True)
    torch.save({"state_dict": load_file(shared), "epoch": 3}, by_hand_folder("consissr") / "ConsisSR.ckpt")
    return "consissr"


def our_layout(hub: Hub, all_in_one: Path, _) -> str:
    """A model folder of ours with its base inside, as `convert.py --push` leaves it."""
    folder = shutil.copytree(all_in_one.parent / "tiny", hub.root / "someone" / "tiny")
    shutil.copytree(all_in_one.parent / "base", folder / "base")
    config = read_config(folder)
    config.model.base = "./base"
    save_config(config, folder / "config.yaml")
    (folder / "junk.bin").write_bytes(b"never asked for")
    return "someone/tiny"


SLOW = (v1_ckpt, mirrored_base)
LAYOUTS = (*(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW), whole_v2, v1_half, by_hand, our_layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_one_command_then_without_a_network_then_from_a_damaged_cache(
    layout, machine, all_in_one, v1, tiny_model, shared, restore, monkeypatch
):
    near = all_in_one.parent
    shutil.copytree(tiny_model, near / "tiny")
    shutil.copytree(tiny_model.parent / "base", near / "base")
    shutil.copyfile(shared / "conformance" / "consissr_A" / "weights.safetensors", near / "consissr_A.safetensors")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    name = layout(machine, all_in_one, v1)

    flags = ("-s", "8") if name == "consissr" else ()  # its UNet halves the size three times more
    status, first, said = restore(name, *flags)
    assert status == 0 and first.shape == ((128, 128, 3) if flags else (64, 64, 3)), said
    assert first.std() > 1 and not any("junk" in path for _, path in machine.asked)
    assert "Bearer hf_secret" in machine.tokens or name == "consissr"

    machine.asked.clear()
    status, again, said = restore(name, *flags)
    assert status == 0 and np.array_equal(again, first) and machine.asked == [], said
    machine.gone()

    models, hub = cache_folder() / "models", Path(os.environ["CONSISSR_HOME"]).parent / "hf"
    damages = [(models, zero), (hub, truncate)]
    for cache, spoil in damages + ([(models, truncate), (hub, zero)] if layout is whole_v2 else []):
        weights = [path for path in cache.rglob("*.safetensors") if path.is_file() and "blobs" not in path.parts]
        if not weights:
            continue
        spoil(max(weights, key=lambda path: path.stat().st_size))
        status, again, said = restore(name, *flags)
        if status:  # its only copy: one line, and it is fetched again as soon as there is a network
            assert "could not be fetched" in said and "Traceback" not in said
            assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
            back = machine.back()
            status, again, said = restore(name, *flags)
            back.gone()
        assert status == 0 and np.array_equal(again, first), (spoil, said)


def truncate(path: Path) -> None:
    """As after a full disk."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def zero(path: Path) -> None:
    """As after a broken block: the size is right, and so is the header."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


def test_half_precision_is_fetched_where_it_will_do_and_serves_offline(machine, v1, restore):
    """bf16 takes the small file; fp32 then fetches the large one, and without a network has to do with what is here."""
    serve(machine, KIJAI, v1["half"])
    serve(machine, CAMENDURU, v1["ckpt"])
    assert restore("ccsr-v1", "--precision", "bf16")[0] == 0
    assert not any("ckpt" in path for _, path in machine.asked)
    assert restore("ccsr-v1", "--precision", "fp32")[0] == 0
    assert any("ckpt" in path for _, path in machine.asked)
    for folder in (cache_folder() / "models").iterdir():
        if not json.loads((folder / "origin.json").read_text())["half"]:
            shutil.rmtree(folder)
    machine.gone()
    shutil.rmtree(Path(os.environ["CONSISSR_HOME"]).parent / "hf")
    status, pixels, said = restore("ccsr-v1", "--precision", "fp32")
    assert status == 0 and pixels is not None


def infer_apart(arguments: list[str], address: str, folder: Path, log: Path) -> None:
    """scripts/infer.py as this process, on the machine that fixture `machine` makes."""
    from scripts.infer import main

    turn_to(address, folder, pytest.MonkeyPatch())
    torch.set_num_threads(1)
    say_into(log)
    sys.exit(main(arguments))


def test_two_processes_fetch_and_convert_once(machine, v1, restore, tmp_path):
    """Both restore; the file was downloaded once, and converted once."""
    serve(machine, CAMENDURU, v1["ckpt"])
    Image.new("RGB", (8, 8), "red").save(tmp_path / "p.png")
    command = ["-m", "ccsr-v1", "-i", str(tmp_path / "p.png"), "--device", "cpu", "--precision", "fp32"]
    command += ["--config", str(tmp_path / "quick.yaml"), "--plan", "nuts", "--steps", "1", "--t-min", "0"]
    command += ["--overwrite", "-o", str(tmp_path / "both")]
    logs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    places = [(command, machine.address, tmp_path, log) for log in logs]
    both = [forkserver().Process(target=infer_apart, args=place) for place in places]
    for process in both:
        process.start()
    assert finish(*both, seconds=900) == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert sum(log.read_text().count("converting ccsr-v1") for log in logs) == 1
    gets = [path for method, path in machine.asked if method == "GET" and "resolve" in path]
    assert len(gets) == 1 and (tmp_path / "both" / "p.png").is_file()


def test_a_download_that_was_cut_off_is_started_again(machine, v1, restore, tmp_path, monkeypatch):
    """After a killed process it goes on where that stopped; so it does where a connection drops."""
    serve(machine, CAMENDURU, v1["ckpt"])
    size = v1["ckpt"].stat().st_size
    machine.stuck = "real-world_ccsr.ckpt"
    code = (
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000; from consissr.weights import hub"
    )
    code += "; hub.LARGE = 1000; hub.fetch('camenduru/CCSR', lambda files, half: list(files))"
    environment = os.environ | {"HF_ENDPOINT": machine.address, "HF_HUB_CACHE": str(tmp_path / "hf")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}  # what people set
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    assert machine.halfway.wait(600)
    parts: list[Path] = []
    while not parts or parts[0].stat().st_size < size // 2 - 20_000:  # what was sent has yet to be written
        assert process.poll() is None
        parts = list((tmp_path / "hf").rglob("*.consissr-part"))
        time.sleep(0.05)
    process.kill()
    process.communicate()
    reached = parts[0].stat().st_size
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("consissr.weights.hub.LARGE", 1000)
    machine.stuck, machine.cut = "", {"real-world_ccsr.ckpt": 100_000}
    status, pixels, said = restore("ccsr-v1")
    assert status == 0 and pixels is not None, said
    assert machine.ranges == [f"bytes={reached}-", f"bytes={reached + 100_000}-"]
    assert not list((tmp_path / "hf").rglob("*.consissr-part"))


def test_what_is_of_another_kind_is_one_line_and_fetched_once(machine, restore, tmp_path):
    """A file of another model under the right name, and hands that put half of it there."""
    foreign = tmp_path / "real-world_ccsr.ckpt"
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, foreign)
    serve(machine, CAMENDURU, foreign)
    for _ in range(2):
        status, _, said = restore("ccsr-v1")
        assert status == 2 and "neither ConsisSR's nor CCSR's" in said and said.count("\n") == 1
    assert len([path for command, path in machine.asked if command == "GET" and foreign.name in path]) == 1
    by_hand_folder("ccsr-v2").joinpath("vae").mkdir(parents=True)
    by_hand_folder("ccsr-v2").joinpath("vae", "config.json").write_text("{}")
    status, _, said = restore("ccsr-v2")
    assert status == 2 and "is not complete" in said and "drive.google.com" in said and said.count("\n") == 1
    by_hand_folder("consissr").mkdir(parents=True)
    by_hand_folder("consissr").joinpath("ConsisSR.zip").write_bytes(b"PK")
    status, _, said = restore("consissr")
    assert status == 2 and "holds no model" in said and "ConsisSR.ckpt" in said
