"""scripts/convert.py: the authors' checkpoints become folders that restore as recorded; other files get one line."""

import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from consissr.config.loading import load_config
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step, ddpm_plan
from consissr.diffusion.schedule import CLEAN, alpha_bar
from consissr.errors import UserError
from consissr.restorer import Restorer
from consissr.weights.conversion import BESIDE
from consissr.weights.files import read_config
from consissr.weights.folder import save_prompts


@pytest.fixture
def convert(script, tmp_path, capsys):
    """convert(source, *flags) -> (exit status, stdout, stderr, folder)."""
    main = script("convert").main

    def run(source, *flags):
        status = main([str(source), str(tmp_path / "out"), *map(str, flags)])
        return status, *capsys.readouterr(), tmp_path / "out"

    return run


def test_consissr_restores_as_recorded(convert, shared, tmp_path):
    fixture = shared / "conformance" / "consissr_A"
    (tmp_path / "clip.json").write_text(json.dumps(json.loads((fixture / "config.json").read_text())["clip"]))
    status, told, _, folder = convert(
        fixture / "weights.safetensors", "--base", "own", "--clip", tmp_path / "clip.json"
    )
    assert status == 0 and "is ConsisSR\n" in told and "image adapter" in told
    restorer = Restorer.load(str(folder), device="cpu", tile=0, vae_tile=0)
    assert restorer.sampler.guidance == 5 and len(restorer.sampler.timesteps) == 50
    inputs, outputs = (load_file(fixture / f"{name}.safetensors") for name in ("inputs", "outputs"))
    x = (inputs["lq_u8"].float() / 255).permute(2, 0, 1)[None] * 2 - 1
    noises = {"init": inputs["x_T"]} | {f"step[{i}]": noise for i, noise in enumerate(inputs["step_noises"])}
    tiles = restorer.tiles(restorer.sampler, (512, 512), 1)
    z = restorer.restore_latent(x, lambda name, shape: noises[name].float(), restorer.sampler, ddpm_plan(4), tiles)
    want = outputs["final_latent"]
    assert (z - want).norm() / want.norm() < 1e-4


def give_prompts(folder: Path) -> None:
    """Embeddings in the place of the text encoder that the fixture lacks."""
    sampler = read_config(folder).sampler
    width = json.loads((folder / "base" / "unet" / "config.json").read_text())["cross_attention_dim"]
    save_prompts(folder, {prompt: torch.zeros(1, 7, width) for prompt in (sampler.positive, sampler.negative)})


def test_ccsr_becomes_a_folder(convert, shared, caplog):
    status, told, _, folder = convert(shared / "conformance" / "ccsr_A", "--base", "own", "--half")
    assert status == 0 and "is CCSR v2\n" in told and "no text encoder" in caplog.text
    folder = folder.rename(folder.with_name("moved"))
    with pytest.raises(UserError, match="has no text_encoder/"):
        Restorer.load(str(folder), device="cpu")
    give_prompts(folder)
    restorer = Restorer.load(str(folder), device="cpu", geometry="pad")
    assert [step[0] for step in restorer.sampler.timesteps] == [999, 499]
    restored = restorer(torch.zeros(1, 3, 16, 16), 2)
    assert restored.shape == (1, 3, 32, 32) and restored.isfinite().all()


def test_the_schedule_of_a_ccsr_folder_is_kept(convert, shared, tmp_path):
    """A model trained on SD2.1-768 instead of -base predicts v."""
    for part in ("controlnet", "unet", "vae"):
        (tmp_path / "given" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "given" / part).symlink_to(shared / "conformance" / "ccsr_A" / part)
    path = tmp_path / "given" / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    said = {"num_train_timesteps": 1000, "beta_start": 0.001, "beta_end": 0.02, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(said | {"beta_schedule": "linear"}))
    status, _, error, folder = convert(tmp_path / "given", "--base", "own")
    assert status == 2 and "beta_schedule is 'linear'" in error and not folder.exists()
    path.write_text(json.dumps(said | {"beta_schedule": "scaled_linear"}))
    assert convert(tmp_path / "given", "--base", "own")[0] == 0
    give_prompts(folder)
    restorer = Restorer.load(str(folder), device="cpu")
    assert restorer.denoiser.prediction_type == "v_prediction"
    assert torch.equal(restorer.schedule.alpha_bar, alpha_bar(1000, 0.001, 0.02))


def test_ccsr_v1_becomes_a_folder(convert, shared, tmp_path, monkeypatch):
    """With a hint encoder and a text encoder of its own: parts and prompts are what the reader finds."""
    from open_clip.transformer import TextTransformer

    from consissr.weights import released_ccsr as released
    from tests.models.conftest import autoencoder_to_ldm, unet_to_ldm
    from tests.models.test_released import v1_state

    state = v1_state(released.read_v2(shared / "conformance" / "ccsr_A"), unet_to_ldm, autoencoder_to_ldm)
    state["cond_encoder.encoder.conv_in.bias"] = state["cond_encoder.encoder.conv_in.bias"] + 1
    tower = TextTransformer(77, 49408, 32, heads=1, layers=2, output_dim=8)
    state |= {f"cond_stage_model.model.{name}": value for name, value in tower.state_dict().items()}
    save_file({name: value.clone().contiguous() for name, value in state.items()}, tmp_path / "v1.safetensors")
    read = partial(released.read_v1, heads=(2, 4, 4, 4))  # the release's are 64 wide, these are not
    monkeypatch.setattr(released, "read_v1", read)
    status, told, _, folder = convert(tmp_path / "v1.safetensors", "--base", "own")
    assert status == 0 and "is CCSR v1\n" in told
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "base", "config.yaml", "controlnet", "hint_vae", "prompts.safetensors"
    }  # fmt: skip
    found, restorer = read(tmp_path / "v1.safetensors"), Restorer.load(str(folder), device="cpu")
    assert restorer.sampler.geometry == "ccsr_v1" and len(restorer.sampler.timesteps) == 16
    assert torch.equal(restorer.prompts[""], found.text.encode([""]))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    for ours, theirs in ((restorer.latents, found.latents), (restorer.hint_latents, found.hint_latents)):
        assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-5)
    assert not torch.allclose(restorer.hint_latents.encode(x), restorer.latents.encode(x), atol=1e-2)
    restored = restorer(x, 1, plan=[Step(999, CLEAN, "x0")], geometry="pad")
    assert restored.shape == x.shape and restored.isfinite().all()


def test_foreign_damaged_and_missing_files_get_one_line(convert, tmp_path):
    save_file({"layer.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    for name, said in (
        ("foreign.safetensors", "layer.weight"),
        ("damaged.ckpt", "damaged.ckpt"),
        ("missing.ckpt", "does not exist"),
    ):
        status, told, error, folder = convert(tmp_path / name)
        assert status == 2 and told == "" and said in error and error.count("\n") == 1
        assert not folder.exists()


def test_settings_of_another_kind_and_names_too_long_get_one_line(convert, script, capsys, root, tmp_path):
    """--clip with JSON of something else, and a name that no file system takes."""
    with tarfile.open(root / "tests" / "conformance" / "small" / "consissr.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for text, said in (("{", "clip.json cannot be read"), ('{"embed_dim": 8}', "describes no network ('vision_cfg')")):
        (tmp_path / "clip.json").write_text(text)
        status, told, error, folder = convert(
            tmp_path / "consissr" / "weights.safetensors", "--clip", tmp_path / "clip.json"
        )
        assert status == 2 and told == "" and said in error and error.count("\n") == 1 and not folder.exists()
    assert script("convert").main(["--prefetch", 300 * "a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "None" not in error and error.count("\n") == 1


def test_a_base_is_found_from_any_directory(convert, shared, tmp_path, monkeypatch):
    """Named relative to where `convert.py` ran; or lying beside the networks, as CCSR's README arranges them."""
    fixture = shared / "conformance" / "ccsr_A"
    monkeypatch.chdir(fixture.parent)
    assert convert(fixture, "--base", fixture.name)[0] == 0
    folder = (tmp_path / "out").rename(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    assert read_config(folder).model.base == str(fixture.resolve())
    models = tmp_path / "preset" / "models"
    for part, source in (("controlnet", "controlnet"), ("vae", "vae"), (BESIDE, "")):
        (models / part).parent.mkdir(parents=True, exist_ok=True)
        (models / part).symlink_to(fixture / source)
    assert convert("preset/models")[0] == 0
    assert read_config(tmp_path / "out").model.base == str(models / BESIDE)


def test_existing_folders_stay(convert, tmp_path):
    (tmp_path / "out").mkdir()
    status, _, error, _ = convert(tmp_path)
    assert status == 2 and "exists" in error


def test_released_settings_equal_the_readers(root):
    from ccsr.timesteps import sampler_plan
    from consissr.weights.released_ccsr import AS_RELEASED_V1, AS_RELEASED_V2
    from consissr.weights.released_consissr import AS_RELEASED

    tiles = {"tile": 512, "tile_overlap": 256, "tile_weights": "as_released"}
    tiles |= {"vae_tile": 1792, "vae_tiling": "as_released"}
    known = {
        "consissr/infer_as_released.yaml": vars(AS_RELEASED) | {"tile": 0, "vae_tile": 0},
        "ccsr/infer_as_released_v1.yaml": vars(AS_RELEASED_V1),
        "ccsr/infer_as_released_v2.yaml": vars(AS_RELEASED_V2),
        "ccsr/infer_as_released_v2_tiled.yaml": vars(AS_RELEASED_V2) | tiles,
    }
    for name, settings in known.items():
        config = load_config(SamplerConfig, root / "configs" / name)
        assert vars(config) == settings | {"timesteps": []}
        assert [list(step) for step in sampler_plan(config)] == settings["timesteps"], name
    assert {path.name for path in (root / "configs").glob("*/infer*.yaml")} >= {"infer.yaml"}
    for path in (root / "configs").glob("*/infer*.yaml"):
        load_config(SamplerConfig, path)


def test_ccsr_v1_samples_on_its_table():
    """Indices 29..15 of round(999 k / 44), after one evaluation at 999 and a jump to the first of them."""
    from ccsr.timesteps import sampler_plan
    from consissr.weights.released_ccsr import AS_RELEASED_V1

    plan = sampler_plan(AS_RELEASED_V1)
    assert [step.t for step in plan[:3]] == [999, 658, 636] and plan[-1].t == 341
    assert all(abs(step.t - 999 * k / 44) < 0.5001 for step, k in zip(plan[1:], range(29, 14, -1), strict=True))
    assert [step.kind for step in plan] == ["renoise", *["step"] * 14, "x0"]


def test_settings_from_a_file(script, tiny_model, tmp_path):
    from PIL import Image

    (tmp_path / "three.yaml").write_text("plan: ddpm\nsteps: 3\nstart: noise\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    main = script("infer").main
    flags = ["-m", str(tiny_model), "--device", "cpu", "-i", str(tmp_path / "a.png"), "--save-steps"]
    assert main([*flags, "-o", str(tmp_path / "o"), "--config", str(tmp_path / "three.yaml")]) == 0
    steps = sorted(path.name for path in (tmp_path / "o").rglob("*_t*.png"))
    assert steps == ["00_t999.png", "01_t500.png", "02_t000.png"]
