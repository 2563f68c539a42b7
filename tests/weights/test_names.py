"""Published models by name, against a stand-in hub on this machine through the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from consissr.errors import UserError
from consissr.restorer import Restorer
from consissr.weights import find, hub
from consissr.weights.find import find_model
from consissr.weights.names import by_hand_folder, cache_folder, published
from consissr.weights.released_ccsr import jump
from tests.weights.standin import Hub, commit, v1_state

KIJAI, CAMENDURU, V2 = "Kijai/ccsr-safetensors", "camenduru/CCSR", "kharma1/ccsr_v2_repost"
ONE_STEP = [[999, -1, "x0"]]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with empty caches, and the hub it asks: `machine.root` holds the repositories."""
    from huggingface_hub import constants

    hub_ = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub_.address)
    template = hub_.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("CONSISSR_HOME", str(tmp_path / "home"))
    yield hub_
    hub_.gone()


@pytest.fixture(scope="session")
def v1(shared, tmp_path_factory) -> dict[str, Path]:
    """The v1 checkpoint of the reference's 825 keys, as a Lightning file and as a half-precision safetensors file."""
    shapes = json.loads((shared / "reference" / "ccsr_v1_stage2_keys.json").read_text())
    state, folder = v1_state(shapes), tmp_path_factory.mktemp("v1")
    torch.save({"state_dict": state, "epoch": 3}, folder / "real-world_ccsr.ckpt")
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    weights = {n: v.clone() for n, v in half.items() if not n.startswith(("decoder_loss.", "betas", "logvar"))}
    save_file(weights, folder / "real-world_ccsr-fp16.safetensors")
    return {"ckpt": folder / "real-world_ccsr.ckpt", "half": folder / "real-world_ccsr-fp16.safetensors"}


def serve(machine: Hub, place: str, *files: Path) -> Path:
    """A repository with copies of files and folders."""
    folder = machine.root / place
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
    return folder


def restored(name: str, base: str | None = None) -> torch.Tensor:
    """A picture through the model, in one step."""
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    restorer = Restorer.load(name, device="cpu", base=base, geometry="pad", short_side=0)
    return restorer(x, scale=4, plan=ONE_STEP)


def test_v1_by_name_then_without_a_network_then_from_a_damaged_cache(machine, v1):
    """The first place lacks the file, the second has it; what was converted is used, and made again when it broke."""
    serve(machine, CAMENDURU, v1["ckpt"])
    first = restored("ccsr-v1")
    assert first.shape == (1, 3, 64, 64) and first.isfinite().all()
    assert any(KIJAI in path for _, path in machine.asked), "places are tried in order"
    machine.asked.clear()
    assert torch.equal(restored("ccsr-v1"), first) and machine.asked == []
    (folder,) = (cache_folder() / "models").iterdir()
    weights = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    machine.gone()
    assert torch.equal(restored("ccsr-v1"), first), "made again from the hub's cache, without a network"
    assert Path(find_model("ccsr-v1")) == folder


def test_half_precision_files_serve_where_precision_allows(machine, v1):
    serve(machine, KIJAI, v1["half"])
    serve(machine, CAMENDURU, v1["ckpt"])
    folder = find_model("ccsr-v1", half=True)
    assert not any("ckpt" in path for _, path in machine.asked)
    stored = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_a_download_that_was_cut_off_goes_on(machine, v1):
    serve(machine, CAMENDURU, v1["ckpt"])
    machine.cut["real-world_ccsr.ckpt"] = 100_000
    try:
        find_model("ccsr-v1")
    except UserError as error:
        assert "\n" not in str(error)
        find_model("ccsr-v1")
    assert restored("ccsr-v1").isfinite().all()


def test_damaged_downloads_are_one_line_and_not_kept(machine, v1):
    serve(machine, CAMENDURU, v1["ckpt"])
    size = v1["ckpt"].stat().st_size
    machine.spoilt["real-world_ccsr.ckpt"] = bytes(size)
    with pytest.raises(UserError, match="came damaged .* and was not kept") as error:
        find_model("ccsr-v1")
    assert "\n" not in str(error.value)
    machine.spoilt.clear()
    assert find_model("ccsr-v1").is_dir()


def test_without_a_network_and_a_cache_one_line_says_what_to_do(machine):
    machine.gone()
    for name, said in (("ccsr-v2", "6.6 GB"), ("ccsr-v1", "real-world_ccsr.ckpt"), ("consissr", "ConsisSR.ckpt")):
        with pytest.raises(UserError, match="is not on this machine") as error:
            find_model(name)
        text = str(error.value)
        assert said in text and str(by_hand_folder(name)) in text and "\n" not in text
    with pytest.raises(UserError, match="no known name.*did you mean 'ccsr-v2'"):
        find_model("ccsr-v3")
    with pytest.raises(UserError, match="no known name"):
        find_model("a b/c d")


@pytest.fixture
def all_in_one(shared, tmp_path) -> Path:
    """CCSR v2 with its base in one repository, small: the reference's networks, a text encoder and a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "v2"
    for part in ("controlnet", "vae", "unet"):
        shutil.copytree(shared / "conformance" / "ccsr_A" / part, folder / part, copy_function=shutil.copyfile)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(find.ASSETS / "nano" / part, folder / part)
    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes)).save_pretrained(folder / "text_encoder")
    said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said | {"prediction_type": "epsilon"}))
    return folder


def test_v2_with_its_base_from_one_repository(machine, all_in_one):
    """Its own base stays in the hub's cache; both prompts are encoded; the second time nothing is asked."""
    serve(machine, V2, *all_in_one.iterdir())
    first = restored("ccsr-v2")
    assert first.isfinite().all()
    config = (find_model("ccsr-v2") / "config.yaml").read_text()
    assert f"base: {V2}@{commit(V2)}" in config and "guidance: 4.5" in config
    machine.gone()
    assert torch.equal(restored("ccsr-v2"), first)
    with pytest.raises(UserError, match="is no repository of the hub|could not be fetched"):
        find_model("someone/else")


def test_two_processes_convert_once(machine, v1, tmp_path):
    """Started together through the environment that people set; one converts, the other waits."""
    serve(machine, CAMENDURU, v1["ckpt"])
    code = "import logging; logging.basicConfig(); from consissr.weights.find import find_model; "
    code += "print(find_model('ccsr-v1'))"
    environment = os.environ | {"HF_ENDPOINT": machine.address, "HF_HOME": str(tmp_path / "home2")}
    environment |= {"CONSISSR_HOME": str(tmp_path / "both"), "PYTHONPATH": str(Path(find.__file__).parents[2])}
    call = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen(call, **pipes) for _ in range(2)]
    told = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0] and sum(said.count("converting ccsr-v1") for _, said in told) == 1


def test_a_file_put_there_by_hand_is_converted(machine, shared):
    """ConsisSR's place is no hub; a folder of CCSR v2 by hand works the same way."""
    target = by_hand_folder("ccsr-v2")
    shutil.copytree(shared / "conformance" / "ccsr_A" / "controlnet", target / "controlnet")
    shutil.copytree(shared / "conformance" / "ccsr_A" / "vae", target / "vae")
    folder = find_model("ccsr-v2")
    assert (folder / "vae").is_dir() and "base: sd21-base" in (folder / "config.yaml").read_text()
    assert find_model("ccsr-v2") == folder and machine.asked == []
    by_hand_folder("consissr").mkdir()
    weights = shared / "conformance" / "consissr_A" / "weights.safetensors"
    shutil.copyfile(weights, by_hand_folder("consissr") / "ConsisSR.safetensors")
    assert (find_model("consissr") / "image_encoder").is_dir() and machine.asked == []


def test_a_full_disk_is_told_before_anything_is_fetched(machine, v1, monkeypatch):
    serve(machine, CAMENDURU, v1["ckpt"])
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="GB are free: make room, or set HF_HOME"):
        find_model("ccsr-v1")
    assert not any(command == "GET" and "resolve" in path for command, path in machine.asked)


def test_base_mirrors_are_tried_in_order(machine, shared, tmp_path):
    """The first mirror is missing, the second works; only the files that are needed are fetched."""
    from consissr.weights.base import base_path

    nano = Path(find.ASSETS) / "nano"
    parts = [nano / name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    folder = serve(machine, "Manojb/stable-diffusion-2-1-base", *parts)
    (folder / "v2-1_512-ema-pruned.ckpt").write_bytes(b"large")
    path = base_path("sd21-base")
    assert commit("Manojb/stable-diffusion-2-1-base") in path
    assert not any("ema-pruned" in asked for _, asked in machine.asked)
    machine.gone()
    assert base_path("sd21-base") == path


def test_a_model_folder_on_the_hub_is_used_as_it_is(machine, tiny_model):
    folder = serve(machine, "someone/tiny")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    base = str(tiny_model.parent / "base")
    first = restored("someone/tiny", base)
    machine.gone()
    assert torch.equal(restored("someone/tiny", base), first)


def test_every_name_says_where_it_lives():
    assert set(published()) == {"sd21-base", "ccsr-v2", "ccsr-v1", "consissr"}
    for entry in published().values():
        assert entry.sources or entry.by_hand["page"].startswith("https://")
        assert entry.gigabytes["full"] >= entry.gigabytes["half"] > 1 and entry.licence
    assert jump([499]) == [[999, 499, "renoise"], [499, -1, "x0"]]
