"""Stage 'deft' on tiny networks: where the decoder comes from and goes to, its losses and discriminators."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ccsr import deft
from ccsr.deft import Deft
from ccsr.discriminator import ViT, condition_of
from ccsr.nano import NanoDeft
from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation import learned
from consissr.nano.config import run_config
from consissr.restorer import Restorer
from consissr.training.stage import Batch
from consissr.weights.base import load_base
from consissr.weights.latents import load_latents, save_latents


def config(tiny_model: Path, tmp_path: Path, *words: str) -> TrainConfig:
    """A DeFT run on the tiny model."""
    path = tmp_path / "deft.yaml"
    path.write_text("stage: deft\n")
    own = [f"init={tiny_model}", f"model.base={tiny_model.parent / 'base'}", "model.hint=conv", "sampler.plan=nuts"]
    return run_config(path, [*own, "deft.discriminator_width=8", "deft.perceptual=none", *words])


def test_the_first_stages_settings_are_its_own(tiny_model, tmp_path):
    """Networks, plan and kind of latent are those that stage 1 was trained with, not this run's defaults."""
    stored = FolderConfig(model=ModelConfig(hint="stack"), sampler=SamplerConfig(steps=7, posterior="sample"))
    run = config(tiny_model, tmp_path)
    frozen = deft.first_stage(run, SimpleNamespace(config=stored))
    assert (frozen.model, frozen.sampler, frozen.nuts.posterior) == (stored.model, stored.sampler, "sample")
    assert frozen.tala.probability == "off", "no loss of the first stage is trained"
    own = {name: getattr(run, name) for name in ("model", "sampler", "nuts", "tala")}
    assert replace(frozen, **own) == run, "all else is the run's"


@pytest.fixture
def tuned(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder with a decoder that differs from the base's, as the stage exports it."""
    stage = Deft(config(tiny_model, tmp_path))
    with torch.no_grad():
        for parameter in stage.phases[0].parameters.values():
            parameter.add_(0.01)
    stage.export(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_only_the_decoder_is_stored(tuned: Path, tiny_model: Path) -> None:
    assert [file.name for file in (tuned / "vae").iterdir()] == ["decoder.safetensors"]
    loaded, base = Restorer.load(str(tuned)).latents, load_base(str(tiny_model.parent / "base")).latents
    for name, value in base.state_dict().items():
        wanted = value + 0.01 if name.startswith("vae.decoder.") else value  # post_quant_conv is stored, not tuned
        assert torch.equal(loaded.state_dict()[name], wanted), name


def test_tuning_goes_on_from_a_tuned_decoder(tuned: Path, tmp_path: Path, tiny_model: Path) -> None:
    again = Deft(config(tuned, tmp_path, f"model.base={tiny_model.parent / 'base'}"))
    first = load_base(str(tiny_model.parent / "base")).latents.vae.decoder.conv_in.weight
    assert torch.equal(again.phases[0].parameters["conv_in.weight"], first + 0.01)
    assert again.first.latents is again.latents


def test_a_whole_autoencoder_stays_whole(tiny_model: Path, tmp_path: Path) -> None:
    """Its encoder may be another than the base's."""
    own, folder = load_base(str(tiny_model.parent / "base")).latents, tmp_path / "model"
    with torch.no_grad():
        own.vae.encoder.conv_in.weight.add_(0.5)
    shutil.copytree(tiny_model, folder)
    save_latents(folder / "vae", own)
    stage = Deft(config(folder, tmp_path, f"model.base={tiny_model.parent / 'base'}"))
    with torch.no_grad():
        stage.latents.vae.decoder.conv_in.weight.add_(0.01)
    stage.export(tmp_path / "out")
    loaded = Restorer.load(str(tmp_path / "out")).latents
    assert torch.equal(loaded.vae.encoder.conv_in.weight, own.vae.encoder.conv_in.weight)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, stage.latents.vae.decoder.conv_in.weight)


def test_a_decoder_alone_needs_its_own_base(tuned: Path) -> None:
    with pytest.raises(UserError, match="holds a decoder only"):
        load_latents(tuned / "vae")
    with pytest.raises(UserError, match="belongs to another model"):
        load_latents(tuned / "vae", load_base("nano").latents)


# --- losses and adversaries ---


@pytest.fixture(scope="module")
def dinos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name small random networks in DINO's and DINOv2's place."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(3)
    torch.save(ViT(16, 8, 12, depth=12, heads=6).state_dict(), folder / "dino.pth")
    torch.save(ViT(16, 8, 12, depth=2, heads=6, layer_scale=True).state_dict(), folder / "dino_v2.pth")
    return [f"deft.dino={folder / 'dino.pth'}", f"deft.dino_v2={folder / 'dino_v2.pth'}", "deft.discriminator=dino"]


def make_batch(seed: int = 0) -> Batch:
    """Two images of 32 pixels."""
    hq = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    lq = torch.nn.functional.avg_pool2d(hq, 5, 1, 2)
    return Batch(hq=hq, lq=lq, names=["a", "b"], generators=[torch.Generator().manual_seed(i) for i in range(2)])


def losses(stage: Deft, step: int) -> list[dict[str, torch.Tensor]]:
    """Both phases' losses on the same batch, gradients added up."""
    batch, found = make_batch(), []
    with torch.no_grad():
        stage.prepare(batch)
    for phase in stage.phases:
        for parameter in stage.networks.parameters():
            parameter.requires_grad_(False)
        for parameter in phase.parameters.values():
            parameter.requires_grad_(True)
        found.append(phase.loss(batch, step))
        found[-1]["loss"].backward()
    return found


AS_RELEASED = ["reconstruction=l2", "clamp=true", "perceptual=none", "adaptive=false"]
AS_RELEASED += ["adversarial_weight=0.05", "adversarial_start=100"]


def test_the_released_losses(tiny_model: Path, tmp_path: Path, dinos: list[str]) -> None:
    """MSE + 0.05 (-D), from step 101 on; the discriminator learns from the first step; it and the decoder alone do."""
    stage = Deft(config(tiny_model, tmp_path, *dinos, *(f"deft.{word}" for word in AS_RELEASED)))
    assert stage.adversary not in stage.compile_modules and stage.lpips is None
    judge, stored = stage.adversary.discriminator.vit.state_dict(), torch.load(dinos[0].removeprefix("deft.dino="))
    assert all(torch.equal(judge[name], value) for name, value in stored.items())
    augmentation, _ = stage.adversary.view(make_batch())
    assert not torch.equal(augmentation(make_batch().hq), make_batch().hq), "shifted or cut out"
    spectral = {name: value.clone() for name, value in stage.buffers.items()}
    for step, weight in ((100, 0.0), (101, 0.05)):
        decoder, judge = losses(stage, step)
        assert decoder.keys() == {"loss", "pixel", "adversarial"}
        wanted = decoder["pixel"] + weight * decoder["adversarial"]
        assert decoder["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)
        assert judge["loss"] > 0
    batch = prepared(stage)
    told = condition_of(stage.adversary.summary, batch.lq)
    assert torch.equal(batch.cache["summary"], told), "the discriminator is told of the low-quality image"
    image = stage.latents.decode(batch.cache["x0_from_T"]).clamp(-1, 1)
    assert decoder["pixel"].item() == pytest.approx((image - make_batch().hq).square().mean().item(), rel=1e-5)
    assert len(spectral) == 5 * 6  # a pair of vectors for each of three convolutions in each of five heads
    assert all(not torch.equal(value, spectral[name]) for name, value in stage.buffers.items() if value.numel() > 1)
    trained = {id(p) for phase in stage.phases for p in phase.parameters.values()}
    assert {id(p) for p in stage.networks.parameters() if p.grad is not None} == trained


def prepared(stage: Deft) -> Batch:
    """The batch as the losses are given it."""
    batch = make_batch()
    with torch.no_grad():
        stage.prepare(batch)
    return batch


@pytest.mark.parametrize("discriminator", ["patchgan", "dino"])
def test_features_of_equal_images_are_equal(
    tiny_model: Path, tmp_path: Path, dinos: list[str], discriminator: str
) -> None:
    """The perceptual loss sees both images under one view: it is 0 for the photograph itself and not for others."""
    words = [*dinos, f"deft.discriminator={discriminator}", "stage=nano_deft", "deft.perceptual=features"]
    stage, batch = NanoDeft(config(tiny_model, tmp_path, *words)), make_batch()
    with torch.no_grad():
        stage.prepare(batch)
        view = stage.adversary.view(batch)
        for image, equal in ((batch.hq, True), (batch.lq, False)):
            _, features = stage.adversary(image, batch, view)
            if discriminator == "dino":
                seen = stage.adversary.discriminator(image, batch.cache["summary"], *view)[1]
                assert torch.equal(features[0], seen[0]), "shifted, cut out and windowed as drawn"
            assert (stage.perceptual(image, batch, view, features) < 1e-6) == equal
    assert losses(stage, 5)[0]["features"] > 0, "under the view that the logits were drawn for"


def test_the_same_batch_gives_the_same_losses(tiny_model: Path, tmp_path: Path, dinos: list[str]) -> None:
    """Shifts, cutouts and windows are the images' own; global random numbers play no part."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(7)
        stage = Deft(config(tiny_model, tmp_path, *dinos))
        torch.manual_seed(seed)
        found.append([part["loss"].item() for part in losses(stage, 5)])
    assert found[0] == found[1]


def test_post_quant_conv_can_be_tuned(tiny_model: Path, tmp_path: Path) -> None:
    plain, more = (Deft(config(tiny_model, tmp_path, f"deft.post_quant_conv={word}")) for word in ("false", "true"))
    added = more.phases[0].parameters.keys() - plain.phases[0].parameters.keys()
    assert added == {"post_quant_conv.weight", "post_quant_conv.bias"}
    losses(more, 1)
    assert all(p.grad.abs().sum() > 0 for p in more.phases[0].parameters.values())


def test_missing_feature_networks_are_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    if importlib.util.find_spec("pyiqa"):  # an extra
        with pytest.raises(UserError, match=r"vgg16-397923af.pth from https.*deft.perceptual=none"):
            Deft(config(tiny_model, tmp_path, "deft.perceptual=lpips", f"deft.weights={tmp_path}"))
    with pytest.raises(UserError, match="deft.weights=FILE.*python -m ccsr.vgg"):
        NanoDeft(config(tiny_model, tmp_path, "stage=nano_deft", "deft.perceptual=vgg"))
    monkeypatch.setattr(learned, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs pyiqa"):
        Deft(config(tiny_model, tmp_path, "deft.perceptual=lpips"))
    with pytest.raises(
        UserError, match=r"^stage 'deft' tunes .* a trained model: give init=MODEL_FOLDER \(stage 'nuts'\)$"
    ):
        Deft(config(tiny_model, tmp_path, "init="))
    missing = tmp_path / "dinov2_vits14_pretrain.pth"
    with pytest.raises(UserError, match="no such file.*deft.dino_v2=FILE"):
        Deft(config(tiny_model, tmp_path, "deft.discriminator=dino", f"deft.dino_v2={missing}"))


def test_lpips_is_taken_at_its_weight(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def forward(self, image: torch.Tensor, wanted: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert not normalize  # images are in [-1, 1] already
            return (image - wanted).abs().mean(dim=(1, 2, 3))[:, None]

    folders = []
    monkeypatch.setattr(deft, "lpips_network", lambda folder: folders.append(folder) or Distance())
    Deft(config(tiny_model, tmp_path, "deft.perceptual=lpips"))
    words = [
        "deft.perceptual=lpips",
        f"deft.weights={tmp_path}",
        "deft.perceptual_weight=3",
        "deft.adversarial_start=10",
    ]
    stage = Deft(config(tiny_model, tmp_path, *words))
    assert folders == [None, tmp_path]
    assert stage.lpips in list(stage.networks.modules()), "it goes to the device with the others"
    found = losses(stage, 0)[0]
    assert found["lpips"].item() == pytest.approx(found["pixel"].item(), rel=1e-6)
    assert found["loss"].item() == pytest.approx(4 * found["pixel"].item(), rel=1e-6)


def test_dry_runs_need_no_files(tiny_model: Path, tmp_path: Path) -> None:
    """The networks of the released sizes (DINO ViT-S/16 at 224, DINOv2 ViT-S/14 at 518, VGG16), without memory."""
    model = Deft(config(tiny_model, tmp_path)).first.model
    words = ["deft.perceptual=lpips", "deft.discriminator=dino", "deft.dino=none.pth"]
    stage = Deft.untrained(config(tiny_model, tmp_path, *words), model)
    assert stage.first.model is model and next(stage.lpips.parameters()).is_meta
    judge, summary = stage.adversary.discriminator.vit, stage.adversary.summary
    for vit, patch, side in ((judge, 16, 224), (summary, 14, 518)):
        assert vit.side == side and vit.pos_embed.shape == (1, (side // patch) ** 2 + 1, 384)
        assert vit.patch_embed.proj.kernel_size == (patch, patch) and len(vit.blocks) == 12
        assert {block.attn.num_heads for block in vit.blocks} == {6} and vit.pos_embed.is_meta
        assert hasattr(vit.blocks[0].ls1, "gamma") == (vit is summary), "DINOv2 scales its layers"
    assert Deft.untrained(config(tiny_model, tmp_path), model).lpips is None
    nano = config(tiny_model, tmp_path, "stage=nano_deft", "deft.perceptual=vgg")
    assert next(NanoDeft.untrained(nano, model).lpips.parameters()).is_meta
