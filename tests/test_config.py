"""Configuration: every field documented and read, mistakes named, shipped files valid."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from consissr.config.folder import FolderConfig
from consissr.config.loading import load_config, save_config
from consissr.errors import UserError
from consissr.nano.config import run_config

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
