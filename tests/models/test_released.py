"""Readers of the authors' files: every key of the full-size release fits, nothing foreign does, nothing runs."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from consissr.config.folder import StoredModelConfig
from consissr.diffusion.schedule import alpha_bar
from consissr.errors import UserError
from consissr.weights import released_ccsr
from consissr.weights import released_consissr as released
from consissr.weights.files import read_weights


@pytest.fixture(scope="session")
def fixture_a(shared):
    return shared / "conformance" / "consissr_A"


@pytest.fixture(scope="session")
def clip(fixture_a):
    return json.loads((fixture_a / "config.json").read_text())["clip"]


@pytest.fixture
def state(fixture_a):
    return load_file(fixture_a / "weights.safetensors")


def test_every_key_of_the_full_size_release_is_read(shared):
    """At SD2.1 size, with tensors that take little memory; sizes and CLIP's heads come from the shapes."""
    shapes = json.loads((shared / "reference" / "consissr_keys_sd21.json").read_text())
    counts = json.loads((shared / "reference" / "consissr_param_counts.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    compared = [name for name in shapes if name.startswith(("first_stage_model.", "cond_encoder."))]
    state |= {name: torch.zeros(shapes[name]) for name in compared}  # the hint's encoder is the autoencoder's
    model = released.read(state | {"alphas_cumprod": alpha_bar().float(), "betas": torch.zeros(1000)})
    additions = {"hint": "stack", "position_embedding": 64, "transposed_attention": True, "image_prompt": "hpa"}
    additions |= {"image_kv": "separate", "adapter_init": "as_released"}
    assert vars(model.config.model) == vars(StoredModelConfig(**additions))
    assert model.unet.config.attention_head_dim == (5, 10, 20, 20)
    assert model.image_prompt.tower.transformer.resblocks[0].attn.num_heads == 16
    assert sum(p.numel() for p in model.unet.parameters()) == 943_196_740
    assert sum(p.numel() for p in model.controlnet.parameters()) == 400_675_808
    assert sum(p.numel() for p in model.latents.parameters()) == 83_653_863
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_450_950_364, counts
    assert model.hint_latents is None
    used = sum(model.report.used.values()) + sum(len(keys) for keys in model.report.ignored.values())
    assert used == len(shapes) + 2


def test_a_stage_one_file_is_recognised(state, clip):
    teacher = "cond_stage_model.model."
    copies = {k.replace(teacher, f"{teacher}v_fix."): v for k, v in state.items() if k.startswith(f"{teacher}visual.")}
    teachers = {k.replace("v_fix.visual.", "v_fix."): v for k, v in copies.items()}
    model = released.read(state | teachers, clip)
    assert model.kind == "ConsisSR's first stage (RCLIP)"
    assert len(model.report.ignored["teacher of the RCLIP stage"]) == len(teachers) > 10
    assert released.read(state, clip).kind == "ConsisSR"


def test_reading_is_strict(state, clip):
    some = "model.diffusion_model.output_blocks.0.0.in_layers.0.weight"
    with pytest.raises(UserError, match="lacks up_blocks.0.resnets.0.norm1.weight"):
        released.read({name: value for name, value in state.items() if name != some}, clip)
    for extra in ("model.diffusion_model.label_emb.weight", "control_model.zero_convs.99.0.weight", "lpips.weight"):
        with pytest.raises(UserError, match=r"unknown"):
            released.read(state | {extra: torch.zeros(3)}, clip)
    with pytest.raises(UserError, match="another shape"):
        released.read(state | {some: torch.zeros(3)}, clip)
    with pytest.raises(UserError, match="not a ConsisSR release"):
        released.read({"weight": torch.zeros(3)})
    with pytest.raises(UserError, match="noise schedule"):
        released.read(state | {"alphas_cumprod": alpha_bar(1000, 0.001, 0.02).float()}, clip)


def test_a_hint_encoder_of_its_own_is_kept(state, clip):
    assert released.read(state, clip).hint_latents is not None
    copied = ("first_stage_model.encoder.", "first_stage_model.quant_conv.")
    same = {n.replace("first_stage_model.", "cond_encoder."): v for n, v in state.items() if n.startswith(copied)}
    model = released.read(state | same, clip)
    assert model.hint_latents is None


def make_folder(path: str) -> None:
    """What must not run when a file is read."""
    os.mkdir(path)


class Trap:
    """Unpickling this calls a function."""

    def __init__(self, function, path):
        self.function, self.path = function, path

    def __reduce__(self):
        return self.function, (str(self.path),)


def test_lightning_files_are_read_and_run_nothing(state, clip, tmp_path):
    wrapped = {f"module.{name}": value for name, value in state.items()}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": wrapped, "epoch": 3, "callbacks": {"x": Trap(make_folder, tmp_path / "executed")}}, path)
    assert read_weights(path).keys() == state.keys()
    assert released.read(path, clip).report.used["unet"] == 552
    assert not (tmp_path / "executed").exists()


def test_a_file_that_would_run_a_system_function_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "x": Trap(os.mkdir, tmp_path / "executed")}, path)
    with pytest.raises(UserError, match="asks to run posix.mkdir"):
        read_weights(path)
    assert not (tmp_path / "executed").exists()


def test_damaged_and_foreign_files_get_one_line(fixture_a, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((fixture_a / "weights.safetensors").read_bytes()[:100_000])
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    cut = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    empty = tmp_path / "empty.ckpt"
    torch.save({"epoch": 3}, empty)
    nothing = tmp_path / "nothing.ckpt"
    nothing.touch()
    for path in (damaged, text, cut, empty, nothing, tmp_path / "absent.ckpt"):
        with pytest.raises(UserError) as error:
            read_weights(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.fixture
def v2(shared):
    return shared / "conformance" / "ccsr_A"


def test_ccsr_v2_is_read_whatever_its_vae_calls_attention(v2, tmp_path):
    new = released_ccsr.read_v2(v2)
    shutil.copytree(v2, tmp_path / "old", copy_function=shutil.copyfile)
    weights = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(v2 / "vae" / weights.name)
    for ours, theirs in old.items():
        state = {name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}."): t for name, t in state.items()}
    weights.parent.chmod(0o755)
    weights.unlink()
    save_file(state, weights)
    again = released_ccsr.read_v2(tmp_path / "old")
    assert all(torch.equal(a, b) for a, b in zip(new.latents.parameters(), again.latents.parameters(), strict=True))
    assert torch.equal(new.alpha_bar, alpha_bar())
    with pytest.raises(UserError, match="not CCSR v2's"):
        released_ccsr.read_v2(tmp_path)


@torch.no_grad()
def test_a_v2_controlnet_renamed_into_v1s_layout_gives_identical_residuals(v2, to_ldm, vae_to_ldm):
    """v1 takes z_t and hint in one convolution of eight channels; everything else is the same network."""
    v2_model = released_ccsr.read_v2(v2)
    model = released_ccsr.read_v1(v1_state(v2_model, to_ldm, vae_to_ldm), heads=(2, 4, 4, 4))
    assert tuple(model.controlnet.config.block_out_channels) == tuple(v2_model.controlnet.config.block_out_channels)
    z, hint, text = torch.randn(2, 4, 16, 24), torch.randn(2, 4, 16, 24), torch.randn(2, 7, 32)
    t = torch.tensor([999, 3])
    down, middle = v2_model.controlnet(z, t, text, hint, return_dict=False)
    again, mid = model.controlnet(z, t, text, hint, return_dict=False)
    for want, got in zip([*down, middle], [*again, mid], strict=True):
        assert torch.allclose(want, got, atol=1e-6 * want.abs().max().item() + 1e-7)
    assert torch.equal(v2_model.unet(z, t, text).sample, model.unet(z, t, text).sample)
    with pytest.raises(UserError, match="not CCSR v1's"):
        released_ccsr.read_v1({"control_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)})


def v1_state(model, to_ldm, vae_to_ldm) -> dict[str, torch.Tensor]:
    """A CCSR model's weights under v1's names."""
    unet, control = model.unet.state_dict(), model.controlnet.state_dict()
    bias = control.pop("controlnet_cond_embedding.0.bias")
    first = [control.pop("conv_in.weight"), control.pop("controlnet_cond_embedding.0.weight")]
    joined = {"input_blocks.0.0.weight": torch.cat(first, 1)}
    joined["input_blocks.0.0.bias"] = control.pop("conv_in.bias") + bias
    state = {f"control_model.{name}": value for name, value in (to_ldm(control) | joined).items()}
    state |= {f"model.diffusion_model.{name}": value for name, value in to_ldm(unet).items()}
    vae = {vae_to_ldm(name): value for name, value in model.latents.vae.state_dict().items()}
    vae = {n: v[:, :, None, None] if ".attn_1." in n and v.ndim == 2 else v for n, v in vae.items()}
    state |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    encoder = {n: v for n, v in vae.items() if n.startswith(("encoder.", "quant_conv."))}
    return state | {f"cond_encoder.{name}": value for name, value in encoder.items()}
