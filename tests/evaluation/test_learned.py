"""Learned metrics without downloads: weights of random values in a given folder, and what happens without them."""

from pathlib import Path

import pytest
import torch

from consissr.errors import UserError
from consissr.evaluation import learned
from consissr.evaluation.evaluate import evaluate
from consissr.evaluation.folders import pair
from consissr.evaluation.output import markdown
from consissr.evaluation.protocols import MEASURES, get_measures, get_protocol


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def constant_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of full shapes that takes no room in a file: small tensors random, large ones of one number."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.05
        if value.numel() < 500_000
        else torch.full((1,), 0.01).expand(value.shape)
        for name, value in module.state_dict().items()
    }


@pytest.fixture
def lpips_weights(tmp_path: Path) -> Path:
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("pyiqa")
    folder = tmp_path / "weights" / "somewhere"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        alexnet = torchvision.models.alexnet()
    torch.save(constant_state(alexnet), folder / "alexnet-owt-7be5be79.pth")
    widths = (64, 192, 384, 256, 256)
    layers = {f"lin{i}.model.1.weight": torch.full((1, width, 1, 1), 0.1) for i, width in enumerate(widths)}
    torch.save(layers, folder / "LPIPS_v0.1_alex-df73285e.pth")
    return tmp_path / "weights"


def run(sets: dict[str, Path], cache: Path, metrics: list[str], weights: Path | None):
    pairs = pair({"good": sets["good"], "bad": sets["bad"]}, sets["hr"], sets["lr"])
    return evaluate(pairs, get_measures(metrics), get_protocol("ccsr"), cache, weights, jobs=1)


def test_lpips_from_a_given_folder(sets: dict[str, Path], tmp_path: Path, lpips_weights: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl", ["psnr", "lpips", "musiq"], lpips_weights)
    assert 0 < done.mean("good", "lpips") < done.mean("bad", "lpips")
    assert done.mean("good", "psnr") > 30
    assert list(done.unavailable) == ["musiq"]
    assert len(done.versions["lpips weights"]) == 16 and "pyiqa" in done.versions
    text = markdown(done)
    assert "LPIPS" in text and "musiq is not computed: weights missing: musiq_koniq_ckpt-e95806b9.pth" in text


def test_scores_belong_to_the_weights(sets: dict[str, Path], tmp_path: Path, lpips_weights: Path) -> None:
    before = run(sets, tmp_path / "s.jsonl", ["lpips"], lpips_weights).mean("bad", "lpips")
    path = next(lpips_weights.rglob("LPIPS*"))
    torch.save({name: 2 * value for name, value in torch.load(path, weights_only=True).items()}, path)
    learned.fingerprint.cache_clear()
    from consissr.evaluation.scores import get_scorer

    get_scorer.cache_clear()
    after = run(sets, tmp_path / "s.jsonl", ["lpips"], lpips_weights).mean("bad", "lpips")
    assert after == pytest.approx(2 * before, rel=1e-4)


def test_clip_similarity(sets: dict[str, Path], tmp_path: Path) -> None:
    """delta-CLIP-I is the ratio of mean similarities minus 1 (Eq. 5, ConsisSR)."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path / "weights"
    folder.mkdir()
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 1}
    model = open_clip.CLIP(16, vision, text, quick_gelu=True)  # sizes are read from the file
    torch.save(model.state_dict(), folder / "ViT-B-32.pt")
    done = run(sets, tmp_path / "s.jsonl", ["clip-i", "delta-clip-i"], folder)
    similarity = done.values["bad"]["clip-i"]
    assert similarity.shape == (1, 3) and (similarity <= 1 + 1e-5).all() and similarity.min() < 1
    expected = similarity.mean() / done.lr_similarity.mean() - 1
    assert done.mean("bad", "delta-clip-i") == pytest.approx(expected)
    shares = learned.prompt_similarities(torch.rand(1, 3, 40, 60), ["a dog", "a white dog"], folder, "cpu")
    assert sum(shares) == pytest.approx(1)


def test_everything_else_comes_out(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl", list(MEASURES), None)
    assert set(done.unavailable) == {m.name for m in MEASURES.values() if m.source != "own"}
    assert done.mean("good", "niqe") > 0


def test_listing_names_files_and_sources(tmp_path: Path) -> None:
    rows = learned.listing(None)
    assert {metric for metric, *_ in rows} == {m.name for m in MEASURES.values() if m.source != "own"}
    for _, name, place, advice in rows:
        assert place == "missing" and name in advice and advice.startswith("https://") and "--weights" in advice
    names = {name for _, name, *_ in rows}
    assert {"MANIQA_PIPAL-ae6d356b.pth", "RN50.pt", "pt_inception-2015-12-05-6726825d.pth"} <= names


def test_damaged_weights_are_named(sets: dict[str, Path], tmp_path: Path, lpips_weights: Path) -> None:
    path = next(lpips_weights.rglob("alexnet*"))
    path.write_bytes(path.read_bytes()[:1000])
    from consissr.evaluation.scores import get_scorer

    learned.fingerprint.cache_clear()
    get_scorer.cache_clear()
    with pytest.raises(UserError, match="alexnet-owt-7be5be79.pth"):
        run(sets, tmp_path / "s.jsonl", ["lpips"], lpips_weights)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_here_is_not_the_weights_fault(lpips_weights: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device} cannot be used here") as caught:
        learned.load("lpips", lpips_weights, device)
    assert "download" not in str(caught.value)


def test_a_wrong_weights_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        learned.missing("lpips", tmp_path / "nowhere")
