"""Where a base model comes from: one file, mirrors in order, a pinned digest, and what is said when there is none."""

import json
import shutil

import pytest
import torch
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file

from consissr.errors import UserError
from consissr.models.text import OpenClipText
from consissr.weights.base import load_base


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
    assert list(found.prompts) == ["a cat", ""]
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


def test_a_name_that_can_be_none_gets_one_line():
    for name, said in (("sd21base", "did you mean 'sd21-base'"), ("a b/c d", "nor a known name")):
        with pytest.raises(UserError, match=said):
            load_base(name)


def test_a_folder_that_lacks_its_text_encoder_is_refused(tmp_path):
    """Where it is asked to embed prompts; embeddings that a model stores need none."""
    with pytest.raises(UserError, match="text_encoder/.*copy that folder"):
        load_base(str(tmp_path), prompts=[""])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("unet/config.json", None),
        ("unet/config.json", "[]"),
        ("unet/config.json", '{"block_out_channels": [8, 24]}'),
        ("unet/config.json", '{"block_out_channels": [0, 16]}'),
        ("unet/config.json", '{"block_out_channels": "8"}'),
        ("unet/config.json", '{"attention_head_dim": 0}'),
        ("unet/config.json", '{"act_fn": "nothing"}'),
        ("unet/config.json", '{"cross_attention_dim": 9}'),
        ("unet/config.json", '{"norm_num_groups": 5}'),
        ("vae/config.json", '{"scaling_factor": "0.18215"}'),
        ("scheduler/scheduler_config.json", '{"beta_start": "x"}'),
        ("scheduler/scheduler_config.json", '{"beta_end": NaN}'),
        ("scheduler/scheduler_config.json", '{"beta_end": -1}'),
        ("scheduler/scheduler_config.json", '{"beta_start": null}'),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": [1000]}'),
    ],
)
def test_damaged_parts_are_one_line_that_names_the_file(tiny_model, tmp_path, file, text):
    folder = shutil.copytree(tiny_model.parent / "base", tmp_path / "base")
    path = folder / file
    known = json.loads(path.read_text())
    path.unlink()
    if text is not None:
        changed = json.loads(text)
        path.write_text(json.dumps(known | changed if isinstance(changed, dict) else changed))
    with pytest.raises(UserError) as error:
        load_base(str(folder))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or str(path.parent) in str(error.value) or "scaling_factor" in str(error.value)
