"""Every part of a release arrives in its model folder: small releases in the authors' formats, on any machine."""

from __future__ import annotations

import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from consissr.diffusion.schedule import alpha_bar
from consissr.weights import conversion, publish, released_ccsr, released_consissr
from consissr.weights.base import load_base
from consissr.weights.conversion import convert
from consissr.weights.files import CARD, LORA, WEIGHTS, write_weights
from consissr.weights.find import find_model
from consissr.weights.folder import load_model, save_base
from consissr.weights.ldm import KeyReport
from consissr.weights.model import Released
from tests.models.conftest import autoencoder_to_ldm, unet_to_ldm
from tests.models.test_released import v1_state

FIRST = "input_blocks.0.0.weight"
"""The ControlNet's first convolution, as CCSR v1 names it."""


def unpacked(root: Path, name: str, folder: Path) -> Path:
    """A conformance folder that the repository holds."""
    with tarfile.open(root / "tests" / "conformance" / "small" / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@pytest.fixture
def v2(root, tmp_path) -> Path:
    """CCSR v2 as its authors publish it: a folder with controlnet/, unet/, vae/ and scheduler/."""
    return unpacked(root, "ccsr", tmp_path)


@pytest.fixture
def v1(v2, monkeypatch) -> dict[str, Tensor]:
    """CCSR v1's state dict: v2's networks by v1's names, with an encoder of the hint that is not the autoencoder's."""
    state = v1_state(released_ccsr.read_v2(v2), unet_to_ldm, autoencoder_to_ldm)
    state |= {name: value + 1 for name, value in state.items() if name.startswith("cond_encoder.")}
    heads = partial(released_ccsr.read_v1, heads=(2, 4, 4, 4))  # the release's are 64 wide, these are not
    monkeypatch.setattr(released_ccsr, "read_v1", heads)
    return {name: value.clone().contiguous() for name, value in state.items()}


@pytest.fixture
def consissr(root, tmp_path) -> Path:
    """ConsisSR's one file as its authors publish it; CLIP's config lies beside it, as clip.json."""
    folder = unpacked(root, "consissr", tmp_path)
    (folder / "clip.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["clip"]))
    return folder / "weights.safetensors"


@torch.no_grad()
def other_base(model: Released, folder: Path) -> Path:
    """The model's base as a folder of its own, with another decoder than the model's, as Stable Diffusion's is."""
    save_base(folder, model)
    path = folder / "vae" / WEIGHTS
    save_file({n: x + 1 if n.startswith("decoder.") else x for n, x in load_file(path).items()}, path)
    return folder


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """That `got` has all that `want` has, up to the axes of a 1x1 convolution."""
    assert want and got.keys() >= want.keys()
    assert not [name for name in want if not torch.equal(got[name].flatten(), want[name].float().flatten())]


def ldm_named(vae: torch.nn.Module) -> dict[str, Tensor]:
    """An autoencoder's weights under the names that they have in one file."""
    return {autoencoder_to_ldm(name): value for name, value in vae.state_dict().items()}


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What a state dict holds below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def names_below(folder: Path) -> set[str]:
    """All files of a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_v1s_first_convolution_takes_the_latent_and_then_the_hint():
    """Else CCSR v1 would treat the noise as its hint and the photograph as noise: its results would be garbage."""
    weight = torch.arange(2 * 8 * 3 * 3).float().view(2, 8, 3, 3)
    found = released_ccsr.split_first({FIRST: weight, "input_blocks.0.0.bias": torch.ones(2)})
    assert torch.equal(found[FIRST], weight[:, :4])
    assert torch.equal(found["input_hint_block.0.weight"], weight[:, 4:])
    z, hint = torch.randn(2, 1, 4, 8, 8).unbind()
    want = F.conv2d(torch.cat([z, hint], 1), weight, torch.ones(2))
    on_latent = F.conv2d(z, found[FIRST], found["input_blocks.0.0.bias"])
    on_hint = F.conv2d(hint, found["input_hint_block.0.weight"], found["input_hint_block.0.bias"])
    assert torch.allclose(on_latent + on_hint, want, rtol=1e-5, atol=1e-2)


def test_ccsr_v1_keeps_its_hint_encoder_and_its_decoder(v1, v2, tmp_path):
    """Else a converted CCSR v1 would see the photograph through the base's encoder, which its ControlNet was not
    trained with, or decode with the base's decoder: blurred, and other colours than the authors'.
    """
    save_file(v1, tmp_path / "v1.safetensors")
    base = other_base(released_ccsr.read_v2(v2), tmp_path / "base")
    assert convert(tmp_path / "v1.safetensors", tmp_path / "model", str(base)).kind == "CCSR v1"
    model = load_model(tmp_path / "model", prompts=())
    assert_same(ldm_named(model.hint_latents.vae), below(v1, "cond_encoder."))
    assert_same(ldm_named(model.latents.vae), below(v1, "first_stage_model."))
    first = v1[f"control_model.{FIRST}"]
    assert torch.equal(model.controlnet.conv_in.weight, first[:, :4])
    assert torch.equal(model.controlnet.controlnet_cond_embedding[0].weight, first[:, 4:])


def test_ccsr_v2_keeps_the_decoder_of_its_second_stage(v2, tmp_path):
    """Else a converted CCSR v2 would silently decode with its base's decoder: DeFT, half of the method, gone."""
    base = other_base(released_ccsr.read_v2(v2), tmp_path / "base")
    assert convert(v2, tmp_path / "model", str(base)).kind == "CCSR v2"
    model, released = load_model(tmp_path / "model", prompts=()), load_file(v2 / "vae" / WEIGHTS)
    assert_same(below(model.latents.vae.state_dict(), "decoder."), below(released, "decoder."))
    plain = load_base(str(base)).latents.vae.decoder.conv_out.bias
    assert not torch.equal(plain, model.latents.vae.decoder.conv_out.bias), "the base's is another"


def test_consissr_keeps_its_autoencoder_and_its_hint_encoder(consissr, tmp_path):
    """Else a converted ConsisSR would silently run with the autoencoder of whatever base it is put on."""
    clip = consissr.with_name("clip.json")
    base = other_base(conversion.read(consissr, clip), tmp_path / "base")
    assert convert(consissr, tmp_path / "model", str(base), clip).kind == "ConsisSR"
    model, released = load_model(tmp_path / "model", prompts=()), load_file(consissr)
    assert_same(ldm_named(model.latents.vae), below(released, "first_stage_model."))
    assert_same(ldm_named(model.hint_latents.vae), below(released, "cond_encoder."))


def test_clips_towers_have_the_heads_of_vit_h():
    """Else ConsisSR's image tower would load without a word and split its features into 20 heads in place of the 16 it
    was trained with: its image prompt would be noise. The weights' shapes are the same, so nothing else would tell.
    """
    from open_clip import CLIP, get_model_config

    known = get_model_config("ViT-H-14")
    known |= {part: known[part] | {"layers": 2} for part in ("vision_cfg", "text_cfg")}  # 32 and 24 take long
    with torch.device("meta"):
        state = CLIP(**known).state_dict()
    assert released_consissr.clip_config(state) == known
    clip = released_consissr.read_clip(state, None, KeyReport())
    assert clip.visual.transformer.resblocks[0].attn.num_heads == 16
    assert clip.transformer.resblocks[0].attn.num_heads == 16


def test_the_schedule_and_the_prediction_of_a_v2_folder_are_kept(v2, tmp_path):
    """Else a model on a base of another kind (SD2.1-768, which predicts v) would take v for noise, and steps of another
    schedule: its results would be garbage.
    """
    path = v2 / "scheduler" / "scheduler_config.json"
    said = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    read = released_ccsr.read_v2(v2)
    assert (read.betas, read.prediction_type) == ((500, 0.001, 0.02), "v_prediction")
    convert(v2, tmp_path / "model", "own")
    model = load_model(tmp_path / "model", prompts=())
    assert (model.betas, model.prediction_type) == ((500, 0.001, 0.02), "v_prediction")
    denoiser = model.denoiser()
    assert denoiser.prediction_type == "v_prediction" and torch.equal(model.alpha_bar, alpha_bar(500, 0.001, 0.02))


def test_every_part_goes_to_the_hub_and_comes_from_it(consissr, machine, monkeypatch, tmp_path):
    """Else a model that was uploaded would lack a part where it is used: it would not load, or restore in another way
    (without its hint encoder, say) than at home.
    """

    class Api(HfApi):
        """Uploads into the hub that stands in, by the patterns that it is given."""

        def create_repo(self, repo_id: str, **_: object) -> str:
            return repo_id

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
            for name in filter_repo_objects(names_below(folder_path), allow_patterns=allow_patterns):
                self.upload_file(repo_id=repo_id, path_or_fileobj=(folder_path / name).read_bytes(), path_in_repo=name)

        def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str) -> None:
            path = machine.root / repo_id / path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(path_or_fileobj)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder, clip = tmp_path / "model", consissr.with_name("clip.json")
    convert(consissr, folder, "sd21-base", clip)
    save_base(folder / "base", conversion.read(consissr, clip))  # as models on a base of their own have it
    write_weights(folder / LORA, {"unet.lora.down.weight": torch.zeros(1)})  # as trained ones with adapters have it
    files = names_below(folder)
    assert {name.split("/")[0] for name in files} == {
        "config.yaml", "controlnet", "unet_adapter.safetensors", "pytorch_lora_weights.safetensors", "image_encoder",
        "vae", "hint_vae", "prompts.safetensors", "base", CARD,
    }  # fmt: skip
    publish.push(folder, "someone/model")
    assert names_below(machine.root / "someone" / "model") == files
    assert names_below(Path(find_model("someone/model"))) == files
