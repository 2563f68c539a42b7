"""Configuration: every field documented and read, mistakes named, shipped files valid."""

from __future__ import annotations

import ast
import csv
from operator import attrgetter
from pathlib import Path

import pytest

from consissr.config.folder import FolderConfig
from consissr.config.loading import load_config, save_config
from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.studies.spec import load_study

SOURCES = ("consissr", "ccsr", "scripts")


def fields(root: Path) -> list[tuple[str, str, str]]:
    """(class, field, docstring or "") of every dataclass field in the configuration folder."""
    found = []
    files = [*sorted((root / "consissr" / "config").glob("*.py")), root / "consissr" / "nano" / "config.py"]
    for node in [n for path in files for n in ast.parse(path.read_text()).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign) and not item.target.id.isupper():
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                found.append((node.name, item.target.id, after.value.value if documented else ""))
    return found


def test_every_field_is_documented(root: Path) -> None:
    assert [f"{c}.{name}" for c, name, text in fields(root) if len(text) < 15] == []


def test_every_field_is_read(root: Path) -> None:
    """A field's name stands as an attribute somewhere in the code, outside the files that define it."""
    read: set[str] = set()
    for folder in SOURCES:
        for path in (root / folder).rglob("*.py"):
            if path.parent.name == "config" or path.name == "config.py":
                continue
            tree = ast.parse(path.read_text())
            read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert [f"{c}.{name}" for c, name, _ in fields(root) if name not in read] == []


def test_training_configs_load(root: Path) -> None:
    files = [p for p in (root / "configs").rglob("*.yaml") if "stage:" in p.read_text()]
    assert files
    for path in files:
        assert run_config(path).stage


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stpes=3"], "unknown key 'stpes'; did you mean 'steps'"),
        (["data.corp=3"], "unknown key 'data.corp'; did you mean 'crop'"),
        (["steps"], "not of the form key=value"),
        (["steps=ten"], "steps"),
        (["deft.reconstruction=l3"], "deft.reconstruction is 'l3'"),
        (["nuts.losses=[]"], "nuts.losses is empty: name at least one"),
        (["nuts.losses=l_T"], r"nuts.losses: a list is needed: write it in brackets, such as \[one,two\]"),
        (["nuts.losses.x=1"], r"nuts.losses: a list is needed: write it in brackets, such as \[one,two\]"),
        (["data.crop_rule=centre"], "data.crop_rule is 'centre'"),
        (["data.flips=vertical"], "data.flips is 'vertical'"),
        (["nuts.l_diff_t=paper"], "nuts.l_diff_t is 'paper'"),
        (["deft.perceptual=features"], "deft.perceptual is 'features'"),
        (["model.residual=0.5"], "unknown key 'model.residual'"),
        (["stage=nano_tala", "model.residual=-1"], "model.residual is -1.0"),
        (["model.position_embedding=-3"], "model.position_embedding is -3: use a side, or 0"),
        (["stage=prior", "data.enlarge=[cubic]"], "data.enlarge is 'cubic'"),
        (["data.shrink=0.5"], "unknown key 'data.shrink'"),
        (["stage=prior", "prior.widths=[8,16]"], "prior.widths has 2 resolutions, prior.attention 3"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(None, overrides)


def test_a_base_named_from_here_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model folder './x' would be a base beside its other files."""
    monkeypatch.chdir(tmp_path)
    assert run_config(None, ["model.base=./runs/prior"]).model.base == str(tmp_path / "runs" / "prior")
    assert load_config(FolderConfig, None, ["model.base=./base"]).model.base == "./base"


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is no file"):
        run_config(tmp_path)
    (tmp_path / "tab.yaml").write_text("stage: nuts\n\tsteps: 3\n")
    with pytest.raises(UserError, match=r"tab.yaml, line 2: found a tab"):
        run_config(tmp_path / "tab.yaml")


def test_saving_and_loading_keep_everything(tmp_path: Path) -> None:
    config = load_config(FolderConfig, None, ["model.hint=stack", "sampler.steps=50", "sampler.plan=ddpm"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(FolderConfig, tmp_path / "config.yaml") == config


ADAM = {"optimizer.kind": "adamw", "optimizer.weight_decay": 0.0, "optimizer.decay": "constant"}
NUTS = ADAM | {
    "optimizer.lr": 5e-5, "optimizer.betas": [0.9, 0.999], "optimizer.clip": 1.0, "batch": 96, "data.crop": 512,
    "data.flips": "horizontal", "nuts.losses": ["l_diff", "l_T", "l_tmax"], "sampler.steps": 6,
}  # fmt: skip
TALA = {
    "data.crop": 512, "data.crop_rule": "center", "data.degradation": "consissr", "optimizer.clip": 0.0,
    "sampler.plan": "ddpm", "sampler.steps": 50, "sampler.guidance": 5.0, "sampler.start": "noise",
    "model.hint": "stack", "model.position_embedding": 64, "model.transposed_attention": True,
    "model.image_prompt": "hpa", "tala.gamma": 10.0,
}  # fmt: skip
RCLIP = ADAM | {
    "steps": 100_000, "batch": 16, "optimizer.lr": 1e-5, "optimizer.betas": [0.9, 0.99], "optimizer.clip": 0.0,
    "data.crop": 224, "data.crop_rule": "center", "data.flips": "both", "data.degradation": "consissr",
}  # fmt: skip
DEFT = {
    "steps": 2000, "batch": 64, "deft.adversarial_start": 100, "data.crop": 512, "optimizer.lr": 1e-5,
    "optimizer.betas": [0.5, 0.9], "deft.optimizer.lr": 1e-5, "deft.optimizer.betas": [0.5, 0.9],
    "deft.reconstruction": "l1", "deft.perceptual": "lpips", "deft.perceptual_weight": 1.0, "deft.adaptive": True,
    "deft.adversarial_weight": 0.5, "deft.discriminator": "patchgan",
}  # fmt: skip
RECIPES = {
    # Sec. IV-A, CCSR: 25K and 2K iterations, Adam, 5e-5 and 1e-5, batches of 96 and 64, 512 pixels.
    "ccsr/nuts": NUTS | {"steps": 25_000, "nuts.l_diff_t": "interval", "nuts.start": "lq", "sampler.start": "lq"},
    "ccsr/deft": DEFT,
    # The release's scripts, whatever they do (the files' heads tell).
    "ccsr/pretrain": NUTS | {
        "optimizer.weight_decay": 0.01, "nuts.losses": ["l_diff"], "steps": 40_000, "nuts.posterior": "sample"},
    "ccsr/nuts_as_released": NUTS | {
        "optimizer.weight_decay": 0.01, "steps": 20_000, "nuts.t_max_step": 667, "nuts.start": "hq",
        "nuts.l_diff_t": "as_released", "nuts.posterior": "sample", "sampler.grid": "leading", "sampler.guidance": 4.5},
    "ccsr/deft_as_released": {
        "steps": 2000, "batch": 64, "optimizer.lr": 5e-6, "deft.reconstruction": "l2", "deft.perceptual": "none",
        "deft.discriminator": "dino", "deft.adversarial_weight": 0.05, "deft.adaptive": False,
        "deft.adversarial_start": 100, "deft.optimizer.lr": 5e-6, "deft.clamp": True},
    # Sec. 4.1, ConsisSR: 100K and 200K iterations, Adam (0.9, 0.99), 1e-5 and 5e-5 fixed, 8 x 2 and 2 x 4 images.
    "consissr/rclip": RCLIP,
    "consissr/tala": ADAM | TALA | {
        "steps": 200_000, "batch": 8, "optimizer.lr": 5e-5, "optimizer.betas": [0.9, 0.99], "data.flips": "both",
        "tala.probability": "default", "tala.shared_draw": False, "data.draws": "per_image", "data.pair_pool": 0},
    "consissr/tala_as_released": TALA | {
        "steps": 200_001, "batch": 1, "optimizer.lr": 1e-4, "optimizer.weight_decay": 0.01, "data.flips": "none",
        "tala.probability": "as_released", "tala.shared_draw": True, "tala.encoder_gradients": False,
        "tala.posterior": "sample", "data.draws": "per_batch", "data.pair_pool": 192, "model.image_kv": "separate"},
    # Ours, of the papers' parts.
    "hybrid/nuts_hpa_tala": NUTS | {
        "steps": 25_000, "nuts.l_diff_t": "all", "tala.probability": "power", "model.image_tokens": "patches",
        "data.flips": "both"},
    "hybrid/consissr_few_steps": {"nuts.l_diff_t": "all", "tala.probability": "power", "init": "runs/consissr/tala"},
    "hybrid/rclip_patches": RCLIP | {"model.image_tokens": "patches"},
    "hybrid/deft_consissr": DEFT | {"data.degradation": "consissr"},
}  # fmt: skip
"""What the papers and releases say of each recipe."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_papers_and_releases(root: Path, name: str) -> None:
    config = run_config(root / "configs" / f"{name}.yaml")
    assert {field: attrgetter(field)(config) for field in RECIPES[name]} == RECIPES[name]


def test_sampling_files_are_those_of_papers(root: Path) -> None:
    """CCSR from z_lq by (6, 2/3, 1/2), ConsisSR in 50 guided steps from noise: as their recipes state it."""
    for name, recipe in (("ccsr/infer", "ccsr/nuts"), ("consissr/infer", "consissr/tala")):
        stated = load_config(SamplerConfig, root / "configs" / f"{name}.yaml")
        assert stated == run_config(root / "configs" / f"{recipe}.yaml").sampler
    assert stated.guidance == 5 and stated.steps == 50


def test_studies_compare_what_they_say(root: Path) -> None:
    """V1 with three times the crops sees three times V2's; expectations are those of the tables that are kept."""
    folder = root / "configs" / "nano"
    study = load_study("ccsr", folder / "studies")
    batch = {}
    for name in ("v1", "v1_three", "v2"):
        one = study.variants[name]
        batch[name] = run_config(folder / one.parent, [*study.lines, *one.lines]).batch
    assert batch == {"v1": batch["v2"], "v1_three": 3 * batch["v2"], "v2": batch["v2"]}
    for name in ("ccsr", "consissr"):
        study = load_study(name, folder / "studies")
        with (root / "configs" / "tables" / "nano" / name / "comparisons.csv").open() as file:
            kept = {(row["first"], row["second"], row["metric"]): row["expected"] for row in csv.DictReader(file)}
        said = {(*c.rows, metric): side for c in study.comparisons for metric, side in c.expect.items()}
        assert kept.items() <= said.items()


def test_text_stays_as_it_is_written(tmp_path: Path) -> None:
    """YAML reads 20261101_1530 as a number, 007 as 7 and off as false: no names for folders, words or runs."""
    for text in ("20261101_1530", "007", "1e3", "yes", "off", "1:30"):
        assert run_config(None, [f"output_dir={text}"]).output_dir == text
        (tmp_path / "run.yaml").write_text(f"output_dir: {text}\ndata: {{validation: {text}}}\n")
        read = run_config(tmp_path / "run.yaml")
        assert read.output_dir == read.data.validation == text
    assert run_config(None, ["data.paths=[20261101_1530,b,007]"]).data.paths == ["20261101_1530", "b", "007"]
    config = run_config(
        None, ["output_dir='a b'", "data.validation=", "steps=1_000", "tala.probability=off", "ema=0.5"]
    )
    assert (config.output_dir, config.data.validation, config.steps, config.ema) == ("a b", "", 1000, 0.5)
    assert config.tala.probability == "off"


def test_a_word_that_is_no_yaml_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    for path in (None, tmp_path / "run.yaml"):
        with pytest.raises(UserError, match=r"^bad configuration: 'data\.paths=\[/a,/b', line"):
            run_config(path, ["steps=2", "data.paths=[/a,/b"])
