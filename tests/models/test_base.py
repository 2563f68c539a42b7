"""Where a base model comes from: one file, mirrors in order, a pinned digest, and what is said when there is none."""

import hashlib

import pytest
import torch
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file

from consissr.errors import UserError
from consissr.models.text import OpenClipText
from consissr.weights import base
from consissr.weights.base import SD21_MIRRORS, Base, load_base


@pytest.fixture
def networks():
    """UNet (heads 64 wide, as in SD2.1), autoencoder and text tower, tiny."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
    )
    widths = (32, 32, 32, 32)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=1, **kinds)
    return unet.eval(), vae.eval(), TextTransformer(77, 49408, 64, heads=1, layers=2, output_dim=64).eval()


@pytest.fixture
def state(networks, to_ldm, vae_to_ldm):
    """All of it in one state dict, as Stability publishes it."""
    unet, vae, text = networks
    found = {f"model.diffusion_model.{name}": value for name, value in to_ldm(unet.state_dict()).items()}
    for name, value in vae.state_dict().items():
        square = ".mid_block.attentions." in name and value.ndim == 2
        found[f"first_stage_model.{vae_to_ldm(name)}"] = value[:, :, None, None].contiguous() if square else value
    found |= {f"cond_stage_model.model.{name}": value for name, value in text.state_dict().items()}
    found["cond_stage_model.model.logit_scale"] = torch.zeros(1)
    return found | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@torch.no_grad()
def test_a_base_in_one_file_is_read_without_a_network(networks, state, tmp_path, suffix):
    path = tmp_path / f"sd21{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 1}, path)
    else:
        save_file(state, path)
    found, (unet, vae, text) = load_base(str(path), prompts=["a cat", ""]), networks
    z, t, tokens = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 64)
    for got, want in ((found.unet, unet), (found.latents.vae, vae)):
        assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items())
    # sums of a file's mapped memory may round in another order than those of fresh memory
    assert torch.allclose(found.unet(z, t, tokens).sample, unet(z, t, tokens).sample, atol=1e-5)
    assert torch.allclose(found.latents.vae.decode(z).sample, vae.decode(z).sample, atol=1e-5)
    assert (found.betas, found.prediction_type) == ((1000, 0.00085, 0.012), "epsilon")
    assert list(found.prompts) == ["a cat", ""] and not found.text_free
    assert torch.equal(found.prompts["a cat"], OpenClipText(text).encode(["a cat"]))
    assert load_base(str(path)).prompts == {}
    assert next(load_base(str(path), torch.bfloat16).unet.parameters()).dtype == torch.bfloat16


def test_other_files_are_refused_by_name(state, tmp_path):
    path = tmp_path / "other.safetensors"
    for more, said in (
        ({"control_model.zero_convs.0.0.weight": torch.zeros(1)}, "control_model"),
        ({"alphas_cumprod": torch.linspace(0.99, 0.01, 1000)}, "noise schedule"),
        ({"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(1)}, "cond_stage_model"),
    ):
        save_file(state | more, path)
        with pytest.raises(UserError, match=said):
            load_base(str(path))
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"other\.safetensors is no Stable Diffusion base"):
        load_base(str(path))


def test_mirrors_are_tried_in_order(monkeypatch):
    asked = []

    def load_folder(place, dtype, prompts):
        asked.append(place)
        if len(asked) < 3:
            raise OSError(f"{place} is not a local folder\nand more")
        return Base(None, None, {}, True, (1000, 0.00085, 0.012), "epsilon", place)

    monkeypatch.setattr(base, "load_folder", load_folder)
    assert load_base("sd21-base").source == SD21_MIRRORS[2]
    assert asked == list(SD21_MIRRORS)


def test_without_a_network_one_message_says_what_to_do(monkeypatch):
    def load_folder(place, dtype, prompts):
        raise OSError("no connection")

    monkeypatch.setattr(base, "load_folder", load_folder)
    with pytest.raises(UserError) as error:
        load_base("sd21-base")
    said = str(error.value)
    assert "\n" not in said and "Download stable-diffusion-2-1-base" in said and "model.base=FOLDER" in said
    assert all(mirror in said for mirror in SD21_MIRRORS)
    with pytest.raises(UserError, match="nor a known name; did you mean 'sd21-base'"):
        load_base("sd21base")


def test_a_pinned_digest_is_checked(state, tmp_path):
    path = tmp_path / "sd21.safetensors"
    save_file(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_base(str(path), sha256=digest.upper()).source == str(path)
    with pytest.raises(UserError, match="it is another file"):
        load_base(str(path), sha256="0" * 64)


def test_a_pinned_digest_is_checked_of_what_a_mirror_gave(monkeypatch, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"a UNet")
    known = {(SD21_MIRRORS[0], "unet/diffusion_pytorch_model.safetensors"): str(file)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda place, name: known.get((place, name)))
    loaded = Base(None, None, {}, True, (1000, 0.00085, 0.012), "epsilon", SD21_MIRRORS[0])
    monkeypatch.setattr(base, "load_folder", lambda place, dtype, prompts: loaded)
    assert load_base("sd21-base", sha256=hashlib.sha256(b"a UNet").hexdigest()) is loaded
    with pytest.raises(UserError, match="it is another file"):
        load_base("sd21-base", sha256="0" * 64)
    known.clear()
    with pytest.raises(UserError, match=r"has no unet/diffusion_pytorch_model\.safetensors to check"):
        load_base("sd21-base", sha256="0" * 64)


def test_a_folder_that_lacks_its_text_encoder_is_refused(tmp_path):
    """It would pass for one that was trained without text, and restore everything wrongly."""
    (tmp_path / "model_index.json").write_text('{"text_encoder": ["transformers", "CLIPTextModel"]}')
    with pytest.raises(UserError, match="text_encoder/.*copy that folder"):
        load_base(str(tmp_path))
