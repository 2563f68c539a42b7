"""Scores of folders: averages, stability, cache, outputs."""

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import bootstrap, metrics, output, plots
from consissr.evaluation import evaluate as module
from consissr.evaluation.folders import pair, read_image
from consissr.evaluation.protocols import PROTOCOLS, get_measures, get_protocol

BASIC = ["psnr", "ssim", "niqe"]


def run(sets: dict[str, Path], cache: Path, names=("good", "bad"), metrics_=BASIC, protocol="ccsr", jobs=1, **options):
    pairs = pair({name: sets[name] for name in names}, sets["hr"], sets["lr"])
    return module.evaluate(pairs, get_measures(metrics_), get_protocol(protocol), cache, jobs=jobs, **options)


def test_values_are_the_metrics(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl")
    sr, hr = read_image(sets["bad"] / "b.png"), read_image(sets["hr"] / "b.png")
    assert done.values["bad"]["psnr"][0, 1] == pytest.approx(metrics.psnr(sr, hr).item())
    assert done.mean("good", "psnr") > done.mean("bad", "psnr") + 5
    assert np.isnan(done.global_std("good", "psnr"))


def test_runs_are_averaged_and_compared(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl", names=("runs", "good"))
    values = done.values["runs"]["psnr"]
    assert values.shape == (3, 3)
    assert done.global_std("runs", "psnr") == pytest.approx(np.std(values, axis=0).mean())
    images = [read_image(sets["runs"] / f"sample{i}" / "a.png")[0].numpy() for i in range(3)]
    assert done.local_std["runs"][0] == pytest.approx(np.std(np.stack(images), axis=0).mean(), abs=1e-7)
    assert "good" not in done.local_std


def test_protocols_differ_where_they_say(sets: dict[str, Path], tmp_path: Path) -> None:
    values = {name: run(sets, tmp_path / "s.jsonl", ["bad"], ["psnr", "ssim"], name) for name in PROTOCOLS}
    psnr = {name: done.mean("bad", "psnr") for name, done in values.items()}
    assert psnr["ccsr"] == psnr["osediff"] == psnr["consissr-table"]
    assert psnr["consissr-text"] < psnr["ccsr"] - 1
    assert psnr["seesr"] == psnr["ccsr-v1"] != psnr["ccsr"]


def test_nothing_is_computed_twice(sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(sets, tmp_path / "s.jsonl")
    calls = []
    original = module.image_scores
    monkeypatch.setattr(module, "image_scores", lambda *words: calls.append(words[0]) or original(*words))
    again = run(sets, tmp_path / "s.jsonl")
    assert not calls
    assert again.mean("bad", "niqe") == first.mean("bad", "niqe")
    (sets["bad"] / "a.png").write_bytes((sets["good"] / "a.png").read_bytes())
    changed = run(sets, tmp_path / "s.jsonl")
    assert not calls, "the content is known from the other folder"
    assert changed.values["bad"]["psnr"][0, 0] == first.values["good"]["psnr"][0, 0]
    run(sets, tmp_path / "s.jsonl", protocol="seesr")
    assert {measure.name for measures in calls for measure in measures.values()} == {"psnr", "ssim"}, (
        "NIQE does not depend on it"
    )


def test_a_killed_run_resumes(sets: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "s.jsonl"
    first = run(sets, cache)
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(lines[:4]) + "\n" + lines[4][:9])
    assert run(sets, cache).mean("good", "ssim") == first.mean("good", "ssim")
    assert run(sets, cache).mean("bad", "ssim") == first.mean("bad", "ssim"), "the torn line does no lasting harm"


def test_processes_agree_with_one(sets: dict[str, Path], tmp_path: Path) -> None:
    alone, shared = (run(sets, tmp_path / f"{jobs}.jsonl", jobs=jobs) for jobs in (1, 2))
    assert alone.values["bad"]["niqe"][0].tolist() == pytest.approx(shared.values["bad"]["niqe"][0].tolist())


def test_a_truncated_result_stops_with_its_name(sets: dict[str, Path], tmp_path: Path) -> None:
    path = sets["bad"] / "c.png"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="c.png"):
        run(sets, tmp_path / "s.jsonl", jobs=2)


def test_reference_folders_are_asked_for(sets: dict[str, Path], tmp_path: Path) -> None:
    pairs = pair({"good": sets["good"]}, None, None)
    with pytest.raises(UserError, match="--hr"):
        module.evaluate(pairs, get_measures(["psnr"]), get_protocol("ccsr"), tmp_path / "s.jsonl")
    done = module.evaluate(pairs, get_measures(["niqe"]), get_protocol("ccsr"), tmp_path / "s.jsonl", jobs=1)
    assert done.mean("good", "niqe") > 0


def test_unknown_words_name_the_nearest(sets: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="did you mean 'niqe'"):
        get_measures(["nique"])
    with pytest.raises(UserError, match="did you mean 'osediff'"):
        get_protocol("osedif")


def test_outputs(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl", names=("good", "bad", "runs"))
    output.write_all(done, tmp_path / "out")
    with (tmp_path / "out" / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 3 + 9 and rows[0]["method"] == "good" and rows[0]["l-std"] == "" != rows[6]["l-std"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["protocol"].startswith("ccsr:") and "torch" in summary["versions"]
    assert summary["methods"]["runs"]["g-std"]["psnr"] > 0 and summary["methods"]["good"]["l-std"] is None
    table = (tmp_path / "out" / "table.md").read_text()
    best = f"**{done.mean('good', 'psnr'):.2f}**"
    assert "Rank: mean over PSNR, SSIM, NIQE." in table and "3 images of " in table
    assert best in table and "<u>" in table and "Protocol ccsr" in table and "Rank" in table
    tex = (tmp_path / "out" / "table.tex").read_text()
    assert rf"\textbf{{{done.mean('good', 'psnr'):.2f}}}" in tex and r"\underline{" in tex and r"\uparrow" in tex


def test_small_images_cost_only_niqe(sets: dict[str, Path], tmp_path: Path, save) -> None:
    for name in ("good", "hr", "lr"):
        save(sets[name], {n: np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8) for n in "abc"})
    done = run(sets, tmp_path / "s.jsonl", names=["good"])
    assert "96x192" in done.unavailable["niqe"] and done.mean("good", "psnr") == pytest.approx(80)
    assert "niqe is not computed" in output.markdown(done)


def test_the_report_is_self_contained(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl")
    output.write_all(done, tmp_path / "out", pictures=2)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in report.replace("http-equiv", "") and "@DATA@" not in report and "@PLOTS@" not in report
    data = json.loads(report.split('type="application/json">')[1].split("</script>")[0])
    assert data["labels"] == ["LR", "bicubic (of LR)", "good", "bad", "HR"]
    assert len(data["embedded"]) == 2 and report.count("data:image/") == 2 * len(data["labels"])
    psnr = dict(zip("abc", data["values"]["good"]["psnr"], strict=True))
    assert data["embedded"] == sorted(data["embedded"], key=psnr.get), "worst first"
    assert data["conventions"][0][1].startswith("ccsr:") and data["differences"]["rows"][0][0] == "bad"


def test_a_flat_result_has_no_niqe(sets: dict[str, Path], tmp_path: Path, save) -> None:
    """It is said, and the outputs stay readable: strict JSON, a cache that is read again, a plot of the others."""
    save(sets["good"], {"b": np.zeros((96, 192, 3), np.uint8)})
    for _ in range(2):
        done = run(sets, tmp_path / "s.jsonl", metrics_=["niqe"])
    assert np.isnan(done.values["good"]["niqe"][0]).tolist() == [False, True, False] and done.mean("bad", "niqe") > 0
    assert '"niqe|' in (tmp_path / "s.jsonl").read_text() and "NaN" not in (tmp_path / "s.jsonl").read_text()
    output.write_all(done, tmp_path / "out", pictures=1)
    report = (tmp_path / "out" / "report.html").read_text()
    drawn, data = report.split('type="application/json">')
    values = json.loads(data.split("</script>")[0], parse_constant=pytest.fail)
    assert values["values"]["good"]["niqe"][1] is None and values["embedded"] == ["b"]
    assert (
        sum(path.split('"')[0].count("h0") for path in drawn.split('class="dots" d="')[1:]) == 5
        and "nan" not in drawn.split("<svg")[1].split("</svg>")[0]
    )
    assert "| good | - |" in (tmp_path / "out" / "table.md").read_text()
    assert "- good: no mean niqe, which is undefined for b." in (tmp_path / "out" / "table.md").read_text()


def test_hostile_names_come_out_as_names(sets: dict[str, Path], tmp_path: Path) -> None:
    """In LaTeX, CSV, Markdown, JSON and the page's script."""
    name = "=1+1 <!--<script> $a_b^c~d\\e{f} 100%|\n#"
    pairs = pair({name: sets["good"], "bad": sets["bad"]}, sets["hr"], None)
    done = module.evaluate(pairs, get_measures(["psnr"]), get_protocol("ccsr"), tmp_path / "s.jsonl", jobs=1)
    output.write_all(done, tmp_path / "out")
    report = (tmp_path / "out" / "report.html").read_text()
    data = json.loads(report.split('type="application/json">')[1].split("</script>")[0])
    assert data["methods"][0] == name and "<!--" not in report.split("<body>")[1]
    tex = (tmp_path / "out" / "table.tex").read_text()
    escaped = r"=1+1 <!--<script> \$a\_b\textasciicircum{}c\textasciitilde{}d\textbackslash{}e\{f\} 100\%| \#"
    assert escaped in tex and all(line.startswith(("%", "\\", "Method")) or "&" in line for line in tex.splitlines())
    with (tmp_path / "out" / "per_image.csv").open() as file:
        assert next(csv.DictReader(file))["method"] == f"'{name}"
    rows = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if "=1+1" in line]
    assert len(rows) >= 2 and "<script" not in rows[0] and r"100%\| #" in rows[0]


def test_methods_of_another_size_are_not_ranked(sets: dict[str, Path], tmp_path: Path) -> None:
    pairs = pair({"good": sets["good"], "bad": sets["bad"]}, sets["hr"], None, unranked=["good"])
    done = module.evaluate(pairs, get_measures(["psnr", "ssim"]), get_protocol("ccsr"), tmp_path / "s.jsonl", jobs=1)
    text = output.markdown(done)
    assert "**" not in text and "Rank" not in text and "Not ranked (a model of another size): good." in text
    with pytest.raises(UserError, match="no result folder is called 'x'"):
        pair({"good": sets["good"]}, sets["hr"], None, unranked=["x"])


def test_differences_are_paired(sets: dict[str, Path], tmp_path: Path) -> None:
    done = run(sets, tmp_path / "s.jsonl")
    (found,) = done.differences.values()
    values = done.values["bad"]["psnr"][0] - done.values["good"]["psnr"][0]
    assert found["psnr"].mean == pytest.approx(values.mean()) and values.min() <= found["psnr"].low < found["psnr"].high
    assert f"| bad | {values.mean():+.2f} [" in output.markdown(done)


def test_differences_are_resampled_once_for_all_outputs(sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, draw = [], bootstrap.hierarchical
    monkeypatch.setattr(bootstrap, "hierarchical", lambda values: calls.append(1) or draw(values))
    done = run(sets, tmp_path / "s.jsonl", metrics_=["psnr"])
    output.write_all(done, tmp_path / "out", pictures=0)
    output.markdown(done)
    assert len(calls) == 1


def test_a_metric_that_a_method_lacks_is_not_said_to_rank(sets: dict[str, Path], tmp_path: Path, save) -> None:
    save(sets["good"], {"b": np.zeros((96, 192, 3), np.uint8)})  # has no NIQE
    assert "Rank: mean over PSNR, SSIM." in output.markdown(run(sets, tmp_path / "s.jsonl"))


def test_a_protocols_border_counts_among_the_pixels_that_a_metric_needs(sets, tmp_path: Path, save) -> None:
    for name in ("good", "hr", "lr"):
        save(sets[name], {n: np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8) for n in "abc"})
    done = run(sets, tmp_path / "s.jsonl", names=["good"], metrics_=["psnr", "ssim"], protocol="ccsr-v1")
    assert list(done.unavailable) == ["ssim"] and "at least 19x19 pixels" in done.unavailable["ssim"]


def test_identical_images_are_told(sets: dict[str, Path], tmp_path: Path) -> None:
    (sets["good"] / "a.png").write_bytes((sets["hr"] / "a.png").read_bytes())
    assert "- good: 1 of its images are identical to HR; their PSNR counts as 80 dB." in output.markdown(
        run(sets, tmp_path / "s.jsonl")
    )


def test_a_cache_that_is_none_is_one_line(sets: dict[str, Path], tmp_path: Path) -> None:
    for content in (b"\xff\xfe\x00\n", b"{}\n", b'["a", "b"]\n'):
        (tmp_path / "s.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="is not a score cache"):
            run(sets, tmp_path / "s.jsonl")


def test_many_images_are_drawn_as_histograms() -> None:
    values = {"many": np.random.default_rng(0).normal(26, 2, 1000), "few": np.arange(5.0)}
    drawn, height = plots.distribution_plot(get_measures(["psnr"])[0], values)
    assert drawn.count('class="histogram"') == 1 == drawn.count('class="dots"') and height > 80
    assert len(drawn) < 6000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_report_works_in_a_browser(sets: dict[str, Path], tmp_path: Path, save) -> None:
    """Its script runs without a network: rows are filled in, two pictures lie over each other, the divider moves, keys
    step through the images, and the address leads to one."""
    save(sets["bad"], {"c": np.zeros((96, 192, 3), np.uint8)})  # has no NIQE
    output.write_all(run(sets, tmp_path / "s.jsonl"), tmp_path)
    report = tmp_path / "report.html"
    moves = """
    const seen = [], root = by("compare").shadowRoot;
    const now = () => seen.push([state.image, location.hash, by("right").value]);
    by("images").querySelectorAll("a")[1].click(); now();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "5", bubbles: true })); now();
    by("method").value = "bad"; by("method").onchange({ target: by("method") }); by("best").click(); now();
    by("methods").querySelectorAll("th button")[1].click(); seen.push(by("methods").rows[1].cells[0].textContent);
    by("compare").resize();
    root.querySelector("input").value = 25;
    root.querySelector("input").dispatchEvent(new Event("input"));
    seen.push(root.getElementById("bar").style.left, root.getElementById("left").alt, by("compare").box.style.width);
    addEventListener("hashchange", () => { now(); document.title = JSON.stringify(seen); });
    location.hash = "#b";
    """
    report.write_text(report.read_text().replace("</body>", f"<script>{moves}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", report.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    page = done.stdout.split("<script")[0]
    assert page.count("<tr") == 1 + 2 + 1 + 3 + 1 + 1, "two methods, three images, a difference, three headings"
    assert page.count("<figcaption") == 5, "LR, bicubic, two methods and HR at one crop"
    seen = json.loads(html.unescape(page.split("<title>")[1].split("</title>")[0]))
    rows = re.findall('data-image="(.)"', page)
    clicked, stepped, best, first, left, label, width, linked = seen
    assert clicked[1] == f"#{clicked[0]}" and stepped[:2] != clicked[:2] and stepped[1] == f"#{stepped[0]}"
    assert (stepped[2], best[2], best[0], first) == ("HR", "bad", rows[0], "bad") and linked[:2] == ["b", "#b"]
    assert float(left[:-2]) == pytest.approx(float(width[:-2]) / 4) and label == "bicubic (of LR)"


@pytest.mark.parametrize(("protocol", "crop"), [("ccsr", 0), ("ccsr-v1", 4), ("seesr", 4)])
def test_local_std_leaves_out_the_protocols_border(sets: dict[str, Path], tmp_path: Path, protocol: str, crop: int):
    """L-STD by hand: deviations over the runs of each sample in [0, 1], of the cropped images, then the mean."""
    done = run(sets, tmp_path / "s.jsonl", names=("runs",), protocol=protocol)
    wanted = []
    for name in "abc":
        runs = np.stack([np.asarray(Image.open(sets["runs"] / f"sample{i}" / f"{name}.png")) / 255 for i in range(3)])
        wanted.append(runs[:, crop : 96 - crop, crop : 192 - crop].std(0).mean())
    assert done.mean_local_std("runs") == pytest.approx(np.mean(wanted), rel=1e-5)
