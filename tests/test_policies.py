"""Rules of the repository that reviewers would otherwise have to remember."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path for name in ("consissr", "ccsr") for path in (ROOT / name).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TEXTS = [
    path
    for folder in ("consissr", "ccsr", "scripts", "configs", "tests", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file()
    and path.suffix in (".py", ".yaml", ".md", ".json", ".html", "")
    and "__pycache__" not in path.parts
] + [ROOT / "README.md", ROOT / "pyproject.toml"]
TOP_LEVEL = {"configs", "consissr", "ccsr", "scripts", "tests", "pyproject.toml", "README.md", "LICENSE"}
MADE_BY_TOOLS = {"build", "results", "evaluation", "runs", "consissr.egg-info", "__pycache__"}  # ignored by git

GIT = (ROOT / ".git").exists() and shutil.which("git")

LAYERS = (
    ("errors", "config", "stage_config", "train_config", "formats", "images", "png16", "color", "checkpoint", "memory"),
    ("data",),
    ("models", "ldm"),
    ("diffusion",),
    ("restorer", "inputs", "loading", "released", "geometry", "jobs", "batch", "footprint", "reporting", "commandline"),
    ("training",),
    ("bench",),
)
"""Rooms of consissr; each may import itself and what stands before it."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("consissr", "ccsr", "scripts")}


def room(module: str) -> str:
    """ "models" of "consissr.models.latents"; "" for the package itself."""
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("path", PACKAGES, ids=relative)
def test_import_directions(path):
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    modules = imports(path)
    assert not {name for name in modules if name.startswith("scripts")}
    if package == "ccsr" or rest == ["__init__"]:
        return
    assert not {name for name in modules if name.split(".")[0] == "ccsr"}
    order = {name: place for place, layer in enumerate(LAYERS) for name in layer}
    used = {room(name) for name in modules} - {"", "__version__"}
    if rest[0] == "evaluation":
        if rest[-1] != "complexity":
            assert used <= {"evaluation", *LAYERS[0]}
        return
    assert rest[0] in order, f"name the room of {relative(path)} in LAYERS"
    allowed = {name for name, place in order.items() if place <= order[rest[0]]}
    if rest[0] in ("training", "bench"):
        allowed.add("evaluation")
    assert used <= allowed


@pytest.mark.parametrize("path", PACKAGES + SCRIPTS, ids=relative)
def test_files_stay_small(path):
    limit = 110 if path.parent.name == "scripts" else 350
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_no_paths_of_a_machine(path):
    places = "|".join(("home", "Users", "work", "opt", "tmp", "root", "mnt", "var"))
    found = re.findall(rf"(?<![\w.~/-])/(?:{places})/\S*", path.read_text())
    assert not found


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_nothing_is_left_to_do(path):
    assert not re.findall("TO" + "DO|FIX" + "ME|X" + "XX", path.read_text())


def test_no_drawer_for_everything():
    names = {path.stem for path in PACKAGES}
    assert not names & {"utils", "util", "misc", "helpers", "common", "registry"}


def test_top_level():
    """Of what git tracks, as a clone holds its user's files, too; without git, of everything."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True) if GIT else None
    if listed and listed.returncode == 0:
        names = {path.split("/")[0] for path in listed.stdout.splitlines()}
    else:
        names = {path.name for path in ROOT.iterdir()} - MADE_BY_TOOLS
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_ruff():
    """Style, unused code, prints in packages, bare excepts: the rules stand in pyproject.toml."""
    call = [sys.executable, "-m", "ruff", "check", "."]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_importing_the_packages_is_cheap():
    code = "import sys, consissr, ccsr; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=relative)
def test_configs_say_what_they_are(path):
    assert path.read_text().startswith("# ")


# --- README and continuous integration ---


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_true(command):
    """The scripts exist, know the flags, and the files of the repository that are named exist."""
    words = shlex.split(command, comments=True)
    places = [i for i, word in enumerate(words) if word.startswith("scripts/")]
    for i in places:
        assert (ROOT / words[i]).is_file()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        call = [sys.executable, words[i], "--help"]
        done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        for flag in (word.split("=")[0] for word in words[i + 1 :] if re.match("-+[a-z]", word)):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", done.stdout), f"{words[i]} has no {flag}"
    for word in words:
        if word.split("/")[0] in ("configs", "consissr", "scripts", "tests"):
            assert (ROOT / word).exists()


def test_continuous_integration_runs_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    matching = [c for c in readme_commands() if re.match(r"python3 -m venv .*pytest", c)]
    assert len(matching) == 1 and "&&" in matching[0]
