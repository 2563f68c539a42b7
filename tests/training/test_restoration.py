"""ConsisSR's stages and ingredients on tiny networks: every variant learns, is stored, goes on and restores."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from consissr import Restorer
from consissr.errors import UserError
from consissr.models.attention import TransformerBlock
from consissr.models.image_prompt import build_tower
from consissr.nano.config import run_config
from consissr.training.restoration import starting_model
from consissr.training.stage import Batch
from consissr.training.tala import Tala
from consissr.weights.folder import load_prompts, save_prompts
from consissr.weights.image_encoder import load_tower, save_tower
from consissr.weights.latents import TUNED, save_decoder, save_latents
from scripts.train import stage_builder
from tests.training.variants import DDPM, VARIANTS, VISION, frozen, loop, two_steps


@pytest.mark.parametrize("tokens", ["pooled", "patches"])
def test_the_tower_learns_from_its_frozen_self(base: Path, photos: Path, tmp_path: Path, tokens: str) -> None:
    run = loop(base, photos, tmp_path, "stage=rclip", f"model.image_tokens={tokens}")
    before = {name: p.clone() for name, p in frozen(run).items()}
    assert {id(p) for p in frozen(run).values()} == {id(p) for p in run.stage.teacher.parameters()}
    assert run.weights().keys() - two_steps(run) == set()
    assert all(torch.equal(value, frozen(run)[name]) for name, value in before.items())
    run.stage.export(tmp_path)
    words = ["stage=tala", "model.image_prompt=hpa", f"model.image_tokens={tokens}", f"init={tmp_path}", *DDPM]
    model = starting_model(run_config(None, [f"model.base={base}", *words]))
    for tower in (load_tower(tmp_path)[0], model.image_prompt.tower):  # what stage 'tala' starts from
        for name, value in tower.state_dict().items():
            assert torch.equal(value, run.stage.student.state_dict()[name]), name


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_variant_learns_is_stored_goes_on_and_restores(base: Path, photos: Path, tmp_path: Path, name: str) -> None:
    run = loop(base, photos, tmp_path, *VARIANTS[name])
    before = {key: p.clone() for key, p in frozen(run).items()}
    missed = run.weights().keys() - two_steps(run)
    assert not missed, sorted(missed)[:5]
    assert all(torch.equal(value, frozen(run)[key]) for key, value in before.items())
    run.stage.export(tmp_path / "model")

    again = starting_model(run_config(None, [f"model.base={base}", f"init={tmp_path}/model", *VARIANTS[name]]))
    stage = run.stage
    pairs = [(again.unet, stage.denoiser.unet), (again.controlnet, stage.denoiser.controlnet)]
    if stage.image_prompt is not None:
        pairs.append((again.image_prompt, stage.image_prompt))
    for loaded, trained in pairs:
        for key, value in trained.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key

    restorer = Restorer.load(str(tmp_path / "model"), device="cpu")
    out = restorer(torch.zeros(1, 3, 10, 12), scale=2)
    assert out.shape == (1, 3, 20, 24) and out.isfinite().all()


def test_the_released_adapter_learns_nothing_of_the_image(base: Path, photos: Path, tmp_path: Path) -> None:
    """Two layers at zero in series: neither weight ever gets a gradient (the biases do)."""
    words = ["stage=tala", "model.image_prompt=hpa", "model.adapter_init=as_released", *DDPM]
    run = loop(base, photos, tmp_path, *words)
    seen = two_steps(run)
    dead = {n for n in run.weights() if n.startswith("controlnet/adapter.") or "to_out_ip.0.weight" in n}
    assert len(dead) > 8 and not seen & dead


@pytest.mark.parametrize("kv", ["shared", "separate"])
def test_an_image_branch_can_be_added_to_a_model(base: Path, photos: Path, tmp_path: Path, kv: str) -> None:
    """What the first model lacks starts as a no-op; what it has and the run leaves out is an error."""
    first = loop(base, photos, tmp_path / "a", *VARIANTS["pre-training"])
    two_steps(first)
    first.stage.export(tmp_path / "model")
    init, kept = f"init={tmp_path}/model", "model.unet_trained=[conv_out]"
    with pytest.raises(UserError, match="would lose"):
        loop(base, photos, tmp_path / "b", *VARIANTS["nuts"], "model.hint=conv", init)
    run = loop(base, photos, tmp_path / "b", *VARIANTS["nuts"], "model.hint=conv", init, kept, f"model.image_kv={kv}")
    batch = next(iter(run.batches()))
    t = torch.tensor([700, 300])
    with torch.no_grad():
        run.stage.prepare(batch)
        z = batch.cache["z_hq"]
        old = first.stage.denoiser(z, t, first.stage.condition(batch))
        new = run.stage.denoiser(z, t, run.stage.condition(batch))
    assert torch.equal(old, new) and old.abs().sum() > 0
    for network in (run.stage.denoiser.controlnet, run.stage.denoiser.unet):
        for block in (m for m in network.modules() if isinstance(m, TransformerBlock) and kv == "separate"):
            assert torch.equal(block.attn2.to_k_ip.weight, block.attn2.to_k.weight), "copies of what was trained"
            assert torch.equal(block.attn2.to_v_ip.weight, block.attn2.to_v.weight)
    run.stage.export(tmp_path / "grown")
    with pytest.raises(UserError, match="leaves out or does otherwise: use model.transposed_attention=True"):
        loop(base, photos, tmp_path / "c", "model.position_embedding=16", kept, f"init={tmp_path}/grown")


def test_what_a_run_would_lose_or_misread_is_said(
    base: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tuned decoder, prompts that the base cannot embed, and another reading of the network's output."""
    first = loop(base, photos, tmp_path / "a", *VARIANTS["pre-training"])
    first.stage.export(tmp_path / "model")
    words = [*VARIANTS["pre-training"], f"init={tmp_path}/model", "model.hint=conv"]
    with pytest.raises(UserError, match=r"leaves out or does otherwise: use model\.residual=0"):
        loop(base, photos, tmp_path / "b", *words, "stage=nano_nuts", "model.residual=0.5")
    plain = first.stage.latents.vae.decoder.conv_out.bias.clone()
    with torch.no_grad():
        first.stage.latents.vae.decoder.conv_out.bias += 1
    save_decoder(tmp_path / "model" / "vae", first.stage.latents)
    text = first.stage.text.clone() + 1
    save_prompts(tmp_path / "model", {"": text})
    run = loop(base, photos, tmp_path / "b", *words)
    told = f"{tmp_path}/model: its decoder was tuned on its results and stays: tune it again (stage deft), or use keep_"
    assert f"{told}decoder=false" in caplog.messages and torch.equal(run.stage.text, text)
    assert torch.equal(run.stage.latents.vae.decoder.conv_out.bias, plain + 1)
    run.stage.export(tmp_path / "again")
    assert torch.equal(load_prompts(tmp_path / "again")[""], text) and (tmp_path / "again/vae").is_dir()
    run = loop(
        base, photos, tmp_path / "c", *words, "keep_decoder=false", "model.base=sd21-base"
    )  # the default: init's
    assert torch.equal(run.stage.latents.vae.decoder.conv_out.bias, plain)
    assert len([message for message in caplog.messages if message.startswith(told)]) == 1
    run.stage.export(tmp_path / "without")
    assert not (tmp_path / "without/vae").exists()
    (tmp_path / "model/vae" / TUNED).unlink()  # as releases are converted: the whole autoencoder, its decoder tuned
    save_latents(tmp_path / "model/vae", first.stage.latents, torch.float16)
    assert not torch.equal(loop(base, photos, tmp_path / "d", *words).stage.latents.vae.decoder.conv_out.bias, plain)
    run = loop(base, photos, tmp_path / "e", *words, "keep_decoder=false")
    assert torch.equal(run.stage.latents.vae.decoder.conv_out.bias, plain)
    with torch.no_grad():
        first.stage.latents.vae.encoder.conv_in.weight.mul_(1.1)
    save_latents(tmp_path / "model/vae", first.stage.latents)
    with pytest.raises(UserError, match="keep_decoder=false: .*/model has an encoder of its own, whose latents"):
        loop(base, photos, tmp_path / "f", *words, "keep_decoder=false")
    shutil.copytree(base, tmp_path / "model/base")
    settings = yaml.safe_load((tmp_path / "model/config.yaml").read_text())
    settings["model"]["base"] = "./base"
    (tmp_path / "model/config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="brings the base along that its decoder was tuned with; name another"):
        loop(
            base,
            photos,
            tmp_path / "g",
            *[w for w in words if "model.base" not in w],
            "keep_decoder=false",
            "model.base=sd21-base",
        )
    save_prompts(tmp_path / "model", {"a photo": text})
    needed = f"^{tmp_path}/model holds no embedding of the empty prompt, which training needs: convert it again$"
    with pytest.raises(UserError, match=needed):
        loop(base, photos, tmp_path / "d", *words)


def test_augmentation_draws_for_each_image(base: Path, tmp_path: Path) -> None:
    """p(t) is the power in stage 'tala' and off in stage 'nuts' unless set; one draw for the batch where asked."""
    count = 40

    def mask(*words: str) -> list[bool]:
        """Which images start from z_lq, at p = 0.67: without noise an input that is not zero does."""
        config = run_config(None, [f"model.base={base}", f"output_dir={tmp_path}", *DDPM, *words])
        stage = stage_builder(config.stage)(config)
        z, seen = torch.zeros(count, 4, 2, 2), []
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        batch = Batch(hq=z, names=[], generators=generators, cache={"z_hq": z, "z_lq": z + 1, "hint": z})
        batch.randint, batch.randn = lambda high: torch.full((count,), 960), lambda *shape: torch.zeros(count, *shape)
        stage.denoiser.forward = lambda z_t, t, condition: seen.append(z_t) or z_t
        stage.loss(batch, 0)
        return (seen[-1 if config.stage == "nuts" else 0][:, 0, 0, 0] > 0).tolist()

    nuts = ["stage=nuts", "nuts.losses=[l_diff]"]
    assert 18 <= sum(mask("stage=tala")) <= 36
    assert mask(*nuts, "tala.probability=power") == mask("stage=tala")
    assert sum(mask(*nuts)) == sum(mask("stage=tala", "tala.probability=off")) == 0
    assert sum(mask("stage=tala", "tala.gamma=20")) < sum(mask("stage=tala", "tala.gamma=5"))
    assert sum(mask("stage=tala", "tala.shared_draw=true")) in (0, count)


def test_the_literal_paper_has_no_adapter(base: Path, photos: Path, tmp_path: Path) -> None:
    """RCLIP's embedding itself is attended to, by keys and values as wide as the text's (Sec. 3.3)."""
    save_tower(tmp_path, build_tower(8, VISION))
    words = ["stage=tala", "model.image_prompt=hpa", "model.adapter=none", f"model.image_encoder={tmp_path}", *DDPM]
    run = loop(base, photos, tmp_path / "a", *words)
    assert not [name for name in run.weights() if "adapter" in name]
    assert not run.weights().keys() - two_steps(run)
    run.stage.export(tmp_path / "model")
    restorer = Restorer.load(str(tmp_path / "model"), device="cpu")
    x = torch.rand(1, 3, 10, 12)
    torch.testing.assert_close(restorer.image_prompt.encode(x), run.stage.image_prompt.encode(x))
    assert restorer(x, scale=2).isfinite().all()


class Soft:
    """Two prompt tokens: the image's mean colour, repeated."""

    def encode(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 8) * 3


def test_soft_prompt_tokens_reach_the_networks(base: Path, photos: Path, tmp_path: Path) -> None:
    words = [f"model.base={base}", f"output_dir={tmp_path}", "stage=tala", *DDPM]
    stage = Tala(run_config(None, words), soft_prompt=Soft())
    image = torch.full((2, 3, 64, 64), 0.5)
    batch = Batch(hq=image, lq=image, names=[], generators=[torch.Generator().manual_seed(i) for i in range(2)])
    stage.prepare(batch)
    assert stage.condition(batch).text.shape == (2, 8 + 2, 8)
    assert stage.loss(batch, 0)["loss"].isfinite()
    stage.export(tmp_path)
    restorer = Restorer.load(str(tmp_path), device="cpu")
    x = torch.rand(1, 3, 10, 12)
    without = restorer(x, scale=2)
    restorer.soft_prompt = Soft()
    assert not torch.equal(restorer(x, scale=2), without)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampler.plan=nuts"], "sampler.plan=ddpm"),
        (["tala.gamma=0"], "above 0"),
        (["tala.probability=quadratic"], "tala.probability is 'quadratic'"),
        (["model.image_prompt=hpa", "model.image_encoder=nowhere"], "nowhere holds no image_encoder"),
        (["model.image_prompt=hpa", "model.image_encoder=open_clip:ViT-H-99/x"], "not of the form"),
        (["model.image_prompt=hpa", "model.image_encoder=open_clip:ViT-B-32-quickgelu/openai"], "QuickGELU"),
        (
            ["model.image_prompt=hpa", "model.adapter=none"],
            "has 12 channels and the text's 8",
        ),
        (["stage=nano_tala", "tala.metric=pixels"], "linear path"),
        (["stage=nano_tala", "tala.error=cubed"], "tala.error is 'cubed'"),
        (["stage=nano_tala", "tala.plan_share=1.5"], "tala.plan_share is 1.5: use a share from 0 to 1"),
        (["tala.error=absolute"], "unknown key 'tala.error'"),
    ],
)
def test_mistakes_are_named(base: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config = run_config(None, ["stage=tala", f"model.base={base}", *DDPM, *words])
        stage_builder(config.stage)(config)
