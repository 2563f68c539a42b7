"""Stage 'clip' and a prior with captions, through the front door: what they write, and that it is of use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.errors import UserError
from consissr.models.image_prompt import tower_features
from consissr.nano.captions import WORDS
from consissr.nano.clip import Contrast, random_windows, write_tokenizer
from consissr.training.stage import Batch
from consissr.weights.base import load_base, load_text
from consissr.weights.image_encoder import load_tower, save_tower
from scripts.train import main

RUN = [
    *("batch=8", "micro_batch=8", "steps=100", "checkpoint_every=100", "tracker=none", "data.crop=64", "ema=0"),
    "compile=false",
]
CLIP = ["clip.image_size=32", "clip.patch_size=8", "clip.width=32", "clip.layers=1", "clip.head_width=16"]
TEXT = ["clip.text_width=16", "clip.text_layers=1", "clip.text_heads=2", "clip.embed_dim=16", "clip.held_out=24"]
RATE = ["optimizer.lr=0.01", "optimizer.warmup=2"]
PRIOR = ["prior.widths=[16,16]", "prior.attention=[false,true]", "prior.heads=2", "prior.context_dim=16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures that differ in colour, brightness and texture."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        small = rng.uniform(0.6, 1, (4 + 6 * (i % 3), 5, 3)) * rng.uniform(0, 255, 3)
        Image.fromarray(small.astype(np.uint8)).resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def clip(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder pair after a hundred steps."""
    folder = tmp_path_factory.mktemp("clip")
    own = [f"data.paths=[{photos}]", f"data.validation={photos}", f"output_dir={folder}", *RUN, *CLIP, *TEXT, *RATE]
    assert main(["--config", "configs/nano/clip.yaml", *own]) == 0
    return folder


def test_the_pair_learns_and_says_how_much(clip: Path) -> None:
    found = json.loads((clip / "retrieval.json").read_text())
    assert found["crops"] == 24 and 12 < found["captions"] <= 24  # else nothing could pass the last line
    assert found["top1"] <= found["top5"] <= 1
    assert found["top5"] > 2 * 5 / found["captions"]  # twice what guessing finds


def test_a_base_can_load_its_text_encoder(clip: Path) -> None:
    text = load_text(Path(clip))
    empty, one, other = text.encode(["", "dark photo, blue", "bright photo, red"])
    assert empty.shape == (24, 16) and text.encode(["word " * 99]).shape == (1, 24, 16)
    assert empty.isfinite().all() and not torch.allclose(one, other, atol=1e-2)


def test_similarities_keep_their_digits_under_autocast() -> None:
    """Only the projection, a layer of the network, is rounded."""
    torch.manual_seed(0)
    contrast, image, text = Contrast(16, 8), torch.randn(5, 8), torch.randn(3, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, projected = contrast(image, text), contrast.projection(text)
    with torch.no_grad():
        contrast.projection = torch.nn.Identity()
        wanted = contrast(image, projected)
    assert projected.dtype == torch.bfloat16 and found.dtype == torch.float32 and torch.equal(found, wanted)


def test_every_caption_word_is_one_token_and_other_text_has_tokens(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path, 24)
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.model_max_length == 24
    numbers = [tokenizer(word).input_ids[1:-1] for word in WORDS]
    assert {len(n) for n in numbers} == {1} and len({n[0] for n in numbers}) == len(WORDS)
    for text in ("Sharp zebra, 8k!", "naïve 漢字 🙂"):
        found = tokenizer(text).input_ids
        assert found[0] == tokenizer.bos_token_id and found[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in found[1:-1] and len(found) > 6
        assert tokenizer.decode(found[1:-1]).replace(" ", "") == text.lower().replace(" ", "")
    again = tmp_path / "again"
    write_tokenizer(again, 24)
    for name in ("vocab.json", "merges.txt"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_image_tower_comes_back_as_it_was_saved(clip: Path, tmp_path: Path) -> None:
    tower, settings = load_tower(clip)
    assert settings["vision_cfg"]["patch_size"] == 8 and next(tower.parameters()).dtype == torch.float32
    save_tower(tmp_path, tower)
    images = torch.linspace(-1, 1, 3 * 40 * 48).view(1, 3, 40, 48)
    for one, other in zip(tower_features(tower, images), tower_features(load_tower(tmp_path)[0], images), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="image_encoder"):
        load_tower(tmp_path / "nothing")


def test_windows_vary_in_scale_with_the_samples_own_draws() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    windows = random_windows(Batch(hq=ramp.expand(6, 3, 64, 64), names=[""] * 6, generators=generators), 0.4, 32)
    assert windows.shape == (6, 3, 32, 32)
    spans = (windows[:, 0, 0, -1] - windows[:, 0, 0, 0]) / 2  # of the ramp's range, less half a pixel at both ends
    assert spans.min() > 0.35 and spans.max() < 1.01 and spans.max() - spans.min() > 0.2
    alone = Batch(hq=ramp[None], names=[""], generators=[torch.Generator().manual_seed(5)])
    assert torch.equal(random_windows(alone, 0.4, 32)[0], windows[5])


@pytest.fixture(scope="module")
def autoencoder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    own = [f"data.paths=[{photos}]", f"output_dir={folder}", *RUN, "steps=1"]
    small = ["autoencoder.widths=[16,16]", "autoencoder.latent_channels=4"]
    assert main(["--config", "configs/nano/autoencoder.yaml", *own, *small]) == 0
    return folder


def prior(photos: Path, autoencoder: Path, clip: Path | str, folder: Path, *more: str) -> int:
    """Two steps of a tiny prior with the captions that `clip` reads."""
    own = [f"data.paths=[{photos}]", f"init={autoencoder}", f"output_dir={folder}", f"prior.text={clip}"]
    return main(["--config", "configs/nano/prior.yaml", *own, *RUN, "steps=2", "checkpoint_every=1", *PRIOR, *more])


def test_a_prior_with_captions_is_a_base_with_text(photos: Path, autoencoder: Path, clip: Path, tmp_path: Path) -> None:
    """Every part of the cross-attention has learned, and the result's prompts have an effect."""
    from consissr.training.checkpoints import load_checkpoint

    assert prior(photos, autoencoder, clip, tmp_path, "checkpoint_limit=9") == 0
    first, last = (load_checkpoint(tmp_path / f"checkpoint-{n}")["weights"] for n in (1, 2))
    read = [name for name in first if ".attn2." in name or ".norm2." in name]
    assert read and all(not torch.equal(first[name], last[name]) for name in read)
    prompts = ["dark photo", "bright photo"]
    base = load_base(str(tmp_path), prompts=prompts)
    text = load_text(Path(clip))
    assert all(torch.equal(base.prompts[prompt], text.encode([prompt])) for prompt in prompts)
    assert load_tower(tmp_path)[1] == load_tower(clip)[1]
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    dark, bright = (base.unet(z, 500, base.prompts[p]).sample for p in prompts)
    assert (dark - bright).abs().max() > 1e-6


def test_captions_are_dropped_at_the_configured_rate(
    photos: Path, autoencoder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from consissr.weights.base import ClipText

    seen: list[str] = []
    encode = ClipText.encode
    monkeypatch.setattr(ClipText, "encode", lambda self, prompts: seen.extend(prompts) or encode(self, prompts))
    for share, count in (("0.0", 0), ("1.0", 16)):
        seen.clear()
        assert prior(photos, autoencoder, clip, tmp_path / share, f"prior.caption_dropout={share}") == 0
        assert len(seen) == 16 and seen.count("") == count


@pytest.mark.parametrize(
    ("change", "words"),
    [("prior.text=nowhere", "output_dir of a clip run"), ("prior.context_dim=8", "prior.context_dim=8")],
)
def test_encoders_that_do_not_fit_are_refused(
    photos: Path,
    autoencoder: Path,
    clip: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
    words: str,
) -> None:
    assert prior(photos, autoencoder, clip, tmp_path, change) == 2
    assert words in caplog.text
