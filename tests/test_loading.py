"""What loading a model leaves in memory: every weight once, in the type asked for, and no text encoder."""

import gc
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from consissr.errors import UserError
from consissr.restorer import Restorer
from consissr.weights import base
from consissr.weights.find import find_model
from consissr.weights.folder import load_model, load_prompts, save_prompts

LARGE = 4096
"""Elements of a tensor that counts as a weight, not as a small table."""


class Made(TorchDispatchMode):
    """The types of all large tensors that operations write in memory."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel() >= LARGE:
                self.dtypes.add(tensor.dtype)
        return out


@pytest.mark.parametrize("name", ["nano-ccsr", "nano-consissr"])
def test_networks_are_never_in_another_type(name, monkeypatch):
    """The bundled weights are stored in float16: bfloat16 is neither theirs nor torch's default.

    The text encoder is left out: it runs on the CPU, in float32, and is let go.
    """
    encoder = SimpleNamespace(encode=lambda prompts: torch.zeros(1, 1, 64))
    monkeypatch.setattr(base, "load_text", lambda folder: encoder)
    with Made() as made:
        model = load_model(find_model(name), dtype=torch.bfloat16)
    assert torch.bfloat16 in made.dtypes and torch.float32 not in made.dtypes
    networks = [model.latents, model.unet, model.controlnet, model.image_prompt]
    for network in (network for network in networks if network is not None):
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.bfloat16}
        assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_loaded_weights_survive_their_file(tiny_model, tmp_path):
    """They are copies: the file may be written anew while the model is in use."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    controlnet = load_model(folder).controlnet
    before = {name: value.clone() for name, value in controlnet.state_dict().items()}
    file = folder / "controlnet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in controlnet.state_dict().items())


@pytest.mark.parametrize("name", ["controlnet/config.json", "image_encoder/config.json", "vae/config.json"])
@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_incomplete_folder_is_told(name, text, tmp_path):
    """A file that an interrupted copy left out, or cut off."""
    from consissr.weights.files import read_config
    from consissr.weights.find import find_model
    from consissr.weights.folder import load_controlnet
    from consissr.weights.image_encoder import load_image_prompt
    from consissr.weights.latents import load_latents

    file = tmp_path / name
    file.parent.mkdir()
    if text is not None:
        file.write_text(text)
    config = read_config(find_model("nano-consissr"))
    with pytest.raises(UserError, match=re.escape(str(file))):
        if name.startswith("controlnet"):
            load_controlnet(tmp_path, config.model)
        elif name.startswith("image_encoder"):
            load_image_prompt(tmp_path, config.model)
        else:
            load_latents(tmp_path / "vae")


def test_nothing_in_a_downloaded_config_is_resolved(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "secret")
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for text in ("model: {base: 'owner/${oc.env:MY_SECRET}'}\n", "\xff\xfe"):
        (folder / "config.yaml").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match="config.yaml") as error:
            Restorer.load(str(folder))
        assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_parts_that_do_not_fit_are_told(tiny_model, tmp_path):
    """A ControlNet of another width, with weights that are its own, and prompts of another base."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "controlnet" / "config.json"
    good = json.loads(file.read_text())
    for change in ({"cross_attention_dim": 9}, {"block_out_channels": [8, 32]}, {"norm_num_groups": "x"}):
        file.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="controlnet") as error:
            load_model(folder)
        assert "\n" not in str(error.value)
    file.write_text(json.dumps(good))
    save_prompts(folder, {"": torch.zeros(1, 77, 9)})
    with pytest.raises(UserError, match=r"prompts\.safetensors.*another base"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"{", b""])
def test_damaged_prompts_are_told(tmp_path, content):
    (tmp_path / "prompts.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="prompts.safetensors"):
        load_prompts(tmp_path)


def test_the_text_encoder_is_let_go(monkeypatch):
    """After the prompts are encoded nothing of it is left, neither the module nor any of its weights."""
    kept, original = [], base.load_text

    def load_text(folder):
        text = original(folder)
        kept.extend(weakref.ref(thing) for thing in (text, text.model, *text.model.parameters()))
        return text

    monkeypatch.setattr(base, "load_text", load_text)
    restorer = Restorer.load("nano-consissr", device="cpu")
    gc.collect()
    assert len(kept) > 10 and not any(reference() is not None for reference in kept)
    assert restorer.prompts.keys() == {restorer.sampler.positive, restorer.sampler.negative}


def test_a_base_beside_the_folder_is_not_in_it(tiny_model, monkeypatch):
    """Called from within the folder, below whose name "." each name seems to lie."""
    monkeypatch.chdir(tiny_model)
    assert load_model(find_model("."), base="../base", tuned_decoder=False).decoder == "base"
    with pytest.raises(UserError, match="brings the base along"):
        load_model(find_model("."), base="controlnet", tuned_decoder=False)
