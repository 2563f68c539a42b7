"""Learned metrics without downloads: weights of random values in a given folder, and what happens without them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import learned, listings
from consissr.evaluation.evaluate import evaluate
from consissr.evaluation.folders import pair, read_image
from consissr.evaluation.output import markdown
from consissr.evaluation.protocols import MEASURES, get_measures, get_protocol


@pytest.fixture(autouse=True)
def any_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of random values stand for the real ones, whose hash they lack."""
    monkeypatch.setattr(learned, "checked", lambda file, path: hashlib.sha256(path.read_bytes()).hexdigest())


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
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, text, quick_gelu=True)  # sizes are read from the file
    torch.save(model.state_dict(), folder / "ViT-B-32.pt")
    done = run(sets, tmp_path / "s.jsonl", ["clip-i", "delta-clip-i"], folder)
    similarity = done.values["bad"]["clip-i"]
    assert similarity.shape == (1, 3) and (similarity <= 1 + 1e-5).all() and similarity.min() < 1
    expected = similarity.mean() / done.lr_similarity.mean() - 1
    assert done.mean("bad", "delta-clip-i") == pytest.approx(expected)
    image = read_image(sets["bad"] / "b.png")  # 96x192: enlarged, and the sides cut off
    prepare = open_clip.image_transform(
        224, False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    theirs = prepare(Image.open(sets["bad"] / "b.png"))
    mine = learned.ClipImageSimilarity(folder / "ViT-B-32.pt", "cpu")
    assert (mine._prepare(image)[0] - theirs).abs().mean() < 0.01, "theirs rounds to 8 bits between"
    text = torch.nn.functional.normalize(model.encode_text(open_clip.tokenize(["a dog", "a white dog"])), dim=-1)
    wanted = (100 * mine.embed(image) @ text.T).softmax(-1)[0].tolist()
    assert max(wanted) > 0.7, "without CLIP's factor of 100 both would be about a half"
    assert learned.prompt_similarities(image, ["a dog", "a white dog"], folder, "cpu") == pytest.approx(
        wanted, abs=0.01
    )
    shares = learned.prompt_similarities(torch.rand(1, 3, 40, 60), ["a dog", "a white dog"], folder, "cpu")
    assert sum(shares) == pytest.approx(1)


def test_everything_else_comes_out(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl", list(MEASURES), None)
    lacking = {m.name for m in MEASURES.values() if m.source in ("pyiqa", "clip")}
    assert set(done.unavailable) - {"st-lpips"} == lacking
    assert done.mean("good", "niqe") > 0


def test_listing_names_files_and_sources() -> None:
    lines = listings.weights_text(None).splitlines()
    learned_lines = [line for line in lines if not line.startswith(("st-lpips", " ")) or "https://" in line]
    rows = list(zip(learned_lines[::2], learned_lines[1::2], strict=True))
    assert {row.split()[0] for row, _ in rows} == {m.name for m in MEASURES.values() if m.source in ("pyiqa", "clip")}
    for row, advice in rows:
        _, name, place = row.split()
        assert place == "missing" and name in advice and "get https://" in advice and "--weights" in advice
    names = {row.split()[1] for row, _ in rows}
    assert {"MANIQA_PIPAL-ae6d356b.pth", "RN50.pt", "pt_inception-2015-12-05-6726825d.pth"} <= names


def test_a_file_is_what_its_hash_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DISTS' weights under LPIPS' name are refused; a file of the named hash is taken."""
    monkeypatch.undo()
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "a.pth").write_bytes(content)
    assert learned.checked(learned.WeightFile("clip", "a", digest[:8]), tmp_path / "a.pth") == digest
    with pytest.raises(UserError, match=f"a.pth is not LPIPS.*starts with {digest[:8]} instead of df73285e"):
        learned.checked(learned.WEIGHTS["lpips"][0], tmp_path / "a.pth")
    assert all(len(file.digest) in (8, 64) for files in learned.WEIGHTS.values() for file in files)


def test_fid_of_features_that_differ(monkeypatch: pytest.MonkeyPatch, sets: dict[str, Path]) -> None:
    """pyiqa's distance of two sets of features in two dimensions, by hand: |m1-m2|^2 + tr(C1+C2-2(C1 C2)^.5)."""
    fid_arch = pytest.importorskip("pyiqa.archs.fid_arch")
    monkeypatch.setattr(learned, "_pyiqa_metric", lambda *_: distance)

    def features(folder: str) -> np.ndarray:
        means = [np.asarray(read_image(path)).mean(axis=(0, 2, 3))[:2] for path in sorted(Path(folder).iterdir())]
        return np.array(means, dtype=np.float64) * [1.0, 3.0]

    def distance(sr: str, hr: str, **_) -> float:
        a, b = features(sr), features(hr)
        return fid_arch.frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))

    bad, hr = (sorted(sets[name].iterdir()) for name in ("bad", "hr"))
    found = learned.frechet_distance(bad, hr, None, "cpu")
    a, b = (
        np.array([np.asarray(read_image(p)).mean(axis=(0, 2, 3))[:2] for p in files]) * [1, 3] for files in (bad, hr)
    )
    product = np.cov(a.T) @ np.cov(b.T)
    root = np.sqrt(np.abs(np.linalg.eigvals(product))).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert learned.frechet_distance(hr, hr, None, "cpu") == pytest.approx(0, abs=1e-6)


def test_few_images_have_no_fid(sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "missing_text", lambda *_: "")
    monkeypatch.setattr(learned, "fingerprint", lambda *_: "x")
    monkeypatch.setattr(learned, "frechet_distance", lambda *_: 7.0)
    pairs = pair({"good": sets["good"]}, sets["hr"], None)
    how = (get_measures(["psnr", "fid"]), get_protocol("ccsr"), tmp_path / "s.jsonl")
    refused, asked = (evaluate(pairs, *how, jobs=1, small_fid=small) for small in (False, True))
    assert refused.unavailable == {"fid": "of 3 images it says nothing: use 50 or more, or --small-fid"}
    assert asked.mean("good", "fid") == 7.0 and "clean-fid" in markdown(asked)


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
        learned.missing_text("lpips", tmp_path / "nowhere")


def test_which_values_are_better() -> None:
    """Distances, and NIQE, are better when lower; by these tables are ranked and printed bold."""
    assert {m.name for m in MEASURES.values() if not m.higher} == {"lpips", "st-lpips", "dists", "fid", "flat", "niqe"}
