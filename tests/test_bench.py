"""What the benchmark compares is the same mathematics: our fast path and the plain reference agree within rounding."""

import json
import os
from argparse import Namespace

import pytest
import torch
from PIL import Image

from ccsr import nuts_plan
from ccsr.methods import method
from consissr.bench import commandline, flicker
from consissr.bench.clock import Clock
from consissr.bench.inference import Question, compare
from consissr.bench.models import Networks, from_folder
from consissr.bench.process import apart
from consissr.bench.reference import Reference
from consissr.bench.work import macs_of
from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import ddpm_plan
from consissr.diffusion.sampler import seeded_draw
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.errors import UserError
from consissr.evaluation import complexity
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Denoiser
from consissr.models.surgery import replace_blocks

CPU = torch.device("cpu")
RELEASED = {"first_prompt": "negative", "start": "lq"}
PROMPTED = {"guidance": 4.5, "positive": "good", "negative": "bad"}


def embed(prompts):
    """Embeddings (B, 5, 8) that depend on the prompt."""
    rows = [torch.randn(5, 8, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
    return torch.stack(rows)


class Tokens(torch.nn.Module):
    """Stands for image tower and adapter: `count` tokens of 8 values."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def encode(self, x):
        return x.reshape(len(x), -1)[:, : 8 * self.count].reshape(len(x), self.count, 8).contiguous()


@pytest.fixture(scope="module")
def ccsr_parts(tiny_model):
    parts, _ = from_folder(str(tiny_model), {}, CPU, torch.float32)
    parts.text = embed
    return parts


def consissr_parts(like, tokens):
    """Every addition of ConsisSR on tiny networks, all of it with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    kind = "pooled" if tokens == 1 else "patches"
    model = ModelConfig(
        hint="stack", position_embedding=16, transposed_attention=True, image_prompt="hpa", image_tokens=kind
    )
    unet = UNet2DConditionModel.from_config(like.denoiser.unet.config)
    controlnet = build_controlnet(unet, model)
    replace_blocks(unet, model)
    for network in (unet, controlnet):
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        network.eval().requires_grad_(False)
    table = alpha_bar()
    denoiser = Denoiser(unet, controlnet, table)
    return Networks(like.latents, denoiser, Tokens(tokens), Schedule(table), CPU, torch.float32, model, embed)


def both(parts, config, plan, sequential):
    """Relative difference of the two paths, and how often each called the UNet, the ControlNet and the encoder."""
    x = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    reference = Reference(parts, parts.model, parts.text, sequential)
    ours = parts.restorer(config)
    rows = {"reference": [0, 0], "ours": [0, 0]}

    def count(name, place):
        def hook(module, inputs, out):
            rows[name][place] += len(inputs[0])

        return hook

    for name, path in (("reference", reference), ("ours", ours)):
        unet = path.unet if name == "reference" else path.denoiser.unet
        unet.register_forward_hook(count(name, 0))
        path.latents.vae.encoder.register_forward_hook(count(name, 1))
    plain = reference.restore(x, seeded_draw(0, [0]), config, plan, Clock(CPU))
    fast = ours.restore_tensor(x, [0], plan=plan)
    return ((fast - plain).norm() / plain.norm()).item(), rows


@pytest.mark.parametrize("settings", [{"posterior": "sample"}, PROMPTED | RELEASED])
def test_ccsr_paths_agree(ccsr_parts, settings):
    config = SamplerConfig(**settings)
    difference, rows = both(ccsr_parts, config, nuts_plan(6, 2 / 3, 0.5), sequential=False)
    assert difference < 1e-4
    guided = "guidance" in settings
    assert rows["reference"] == [3 if guided else 2, 2 if guided else 1]
    assert rows["ours"] == [3 if guided else 2, 1]


@pytest.mark.parametrize("tokens", [1, 4])
def test_consissr_paths_agree(ccsr_parts, tokens):
    parts = consissr_parts(ccsr_parts, tokens)
    config = SamplerConfig(plan="ddpm", start="noise", first_prompt="guided", **PROMPTED)
    difference, rows = both(parts, config, ddpm_plan(3), sequential=True)
    assert difference < 1e-4
    assert rows["reference"] == [6, 1] and rows["ours"] == [6, 1]


def test_work_counts_what_is_saved(ccsr_parts):
    from consissr.bench.models import SamplingMethod

    config = SamplerConfig(**PROMPTED, **RELEASED)
    work = macs_of(ccsr_parts, config, SamplingMethod("", "ccsr", nuts_plan(6, 2 / 3, 0.5)), 64)
    assert work["reference"]["encode"] == 2 * work["ours"]["encode"]
    assert work["ours"]["decode"] == work["reference"]["decode"]
    assert 0 < work["ours"]["step"] < work["reference"]["step"]


def test_inference_from_the_command_line(script, tiny_model, tmp_path, capsys):
    log = tmp_path / "bench.json"
    script("bench").main(["inference", "--size", str(tiny_model), "--pixels", "32", "--runs", "1", "--json", str(log)])
    found = json.loads(log.read_text())
    assert found["relative_difference"] < 1e-4
    for path in ("reference", "ours"):
        parts = found[path]
        timed = sum(parts[name]["wall"]["median"] for name in ("encode", "decode", "colour", "write"))
        assert 0 < timed < parts["total"]["wall"]["median"]
    assert "relative difference of the results" in capsys.readouterr().out


@pytest.mark.parametrize("method", [pytest.param("ccsr-1", marks=pytest.mark.slow), "ccsr-2-guided", "consissr"])
def test_random_weights(script, monkeypatch, tmp_path, method):
    """The path of `--size sd21 --random-weights`, with smaller numbers in place of SD2.1's."""
    small = {
        "UNET": {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": [2, 4, 4, 4], "layers_per_block": 1},
        "VAE": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
        "TEXT": {"vocab_size": 200, "intermediate_size": 64, "num_hidden_layers": 1},
        "TOWER": {"image_size": 28, "layers": 1, "width": 80},
    }
    for name, sizes in small.items():
        monkeypatch.setattr(complexity, name, getattr(complexity, name) | sizes)
    flags = ["--size", "sd21", "--random-weights", "--method", method, "--pixels", "64", "--runs", "1"]
    script("bench").main(["inference", *flags, "--json", str(tmp_path / "bench.json")])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["relative_difference"] < 1e-4
    work = found["macs"]
    assert work["reference"]["encode"] == (2 if method == "ccsr-2-guided" else 1) * work["ours"]["encode"]


@pytest.mark.parametrize("model", ["nano-ccsr", "nano-consissr"])
def test_bundled_models(model):
    """The reference follows what they predict: residuals from z_lq."""
    found = compare(Question(model, method("ccsr-2" if model == "nano-ccsr" else "consissr", 3), pixels=64, runs=1))
    assert found["relative_difference"] < 1e-4


def test_full_size_is_asked_for_in_full(script, capsys):
    assert script("bench").main(["inference", "--size", "sd21"]) == 2
    assert "--random-weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inference", "--runs", "0"], "--runs 0"),
        (["degradation", "--images", "0"], "--images 0"),
        (["sizes", "--json", "{folder}/none/x.json"], "x.json is no file"),
        (["sizes", "--json", "{folder}"], "is no file"),
        (["fidelity", "--lr", "{folder}/none", "--hr", "{folder}"], "holds no image"),
    ],
)
def test_mistakes_come_before_the_measurement(script, capsys, tmp_path, words, message):
    assert script("bench").main([word.replace("{folder}", str(tmp_path)) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


def test_a_film_of_no_photograph_is_one_line(capsys, tmp_path):
    Image.new("RGB", (100, 200)).save(tmp_path / "small.png")
    for name, said in (("none.png", "none.png: "), ("small.png", "small.png is too small: give a photograph of at")):
        assert flicker.main([str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1


def test_a_measurement_of_training_says_what_is_read_and_degraded(script, capsys, tmp_path):
    photos = tmp_path / 'photos, [a] "b"'
    photos.mkdir()
    Image.new("RGB", (80, 80), "teal").save(photos / "a.png")
    flags = ["--workers", "1", "--images", "2", "--set", "data.crop=64", "micro_batch=1", "--json", tmp_path / "x.json"]
    assert script("bench").main(["training", "--data", str(photos), *map(str, flags)]) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert list(row) == ["workers", "read", "per core", "CPU ms", "and degraded"] and min(row.values()) > 0


def test_sizes_of_pictures_and_their_ratios(script, capsys, monkeypatch):
    from consissr.bench import tiles

    assert tiles.sides(48.77, 2) == (4032, 3024)

    def measured(what, run, megapixels, **given):
        return {"megapixels": megapixels, "per_megapixel": 3 * megapixels, "ratio": 1.0}

    monkeypatch.setattr(tiles, "apart", measured)
    script("bench").main(["tiles", "--megapixels", "0.25", "0.5"])
    assert "2.000" in capsys.readouterr().out


def test_a_measurement_that_fails_apart_is_one_line():
    with pytest.raises(UserError, match="^reading a failed: FileNotFoundError: .*a'$"):
        apart("reading a", os.listdir, path="a")
    with pytest.raises(UserError, match="^b failed: its process ended with status 9$"):
        apart("b", os._exit, status=9)


def test_workers_are_at_least_one():
    with pytest.raises(UserError, match="--workers 0 is out of range: use at least 1"):
        commandline.check(Namespace(workers=[2, 0], json=None))
