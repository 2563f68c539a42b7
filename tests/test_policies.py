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

ROOMS = {
    "errors": (),
    "config": ("errors",),
    "images": ("errors", "config"),
    "diffusion": ("errors", "config", "images"),
    "models": ("errors", "config", "images"),
    "data": ("errors", "config", "images"),
    "weights": ("errors", "config", "images", "models", "diffusion"),
    "restorer": ("errors", "config", "images", "models", "diffusion", "weights"),
    "evaluation": ("errors", "config", "images"),
    "inference": ("errors", "config", "images", "models", "diffusion", "weights", "restorer"),
    "training": ("errors", "config", "images", "models", "diffusion", "data", "weights", "restorer", "evaluation"),
}
"""Rooms of consissr, and the rooms that each may import beside itself. Those named below may import all of these."""

OUTER = ("nano", "studies", "bench")
EXCEPTIONS = {"consissr/evaluation/complexity.py": ("models", "weights")}  # counts networks, so it builds them
OPEN = {  # known breaks, to be mended: what is not listed may not break the rule, and a mended one must go from here
}


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
    """ "models" of "consissr.models.vae.latents"; "" for the package itself."""
    return (module.split(".") + [""])[1]


def test_import_directions():
    """Rooms import what stands below them; ccsr imports consissr, never the reverse; nothing imports scripts."""
    wrong = set()
    for path in PACKAGES:
        package, *rest = path.relative_to(ROOT).with_suffix("").parts
        modules = imports(path)
        wrong |= {(relative(path), name) for name in modules if name.startswith("scripts")}
        if package == "ccsr" or rest == ["__init__"]:
            continue
        wrong |= {(relative(path), name) for name in modules if name.split(".")[0] == "ccsr"}
        here = rest[0]
        allowed = {here, "", "__version__"} | ({*ROOMS, *OUTER} if here in OUTER else set(ROOMS[here]))
        allowed |= set(EXCEPTIONS.get(relative(path), ()))
        wrong |= {(relative(path), used) for used in {room(name) for name in modules} - allowed}
    assert wrong == {(path, used) for path, rooms in OPEN.items() for used in rooms}


def test_the_root_has_no_loose_modules():
    assert {path.name for path in (ROOT / "consissr").glob("*.py")} == {"__init__.py", "errors.py", "restorer.py"}


def test_no_circles():
    """No two files import each other, at the top or inside functions, directly or through others."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGES
    }
    arrows = {name: (imports(path) & names.keys()) - {name, "consissr", "ccsr"} for name, path in names.items()}
    while ends := {name for name in arrows if not arrows[name] or not any(name in used for used in arrows.values())}:
        arrows = {name: used - ends for name, used in arrows.items() if name not in ends}
    assert arrows == {}


def test_files_stay_small():
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGES + SCRIPTS}
    limits = {path: 110 if path.parent.name == "scripts" else 350 for path in lengths}
    assert {relative(path): n for path, n in lengths.items() if n > limits[path]} == {}


def test_no_paths_of_a_machine():
    places = "|".join(("home", "Users", "work", "opt", "tmp", "root", "mnt", "var"))
    found = {relative(path): re.findall(rf"(?<![\w.~/-])/(?:{places})/\S*", path.read_text()) for path in TEXTS}
    assert {path: places for path, places in found.items() if places} == {}


def test_nothing_is_left_to_do():
    assert [relative(path) for path in TEXTS if re.search("TO" + "DO|FIX" + "ME|X" + "XX", path.read_text())] == []


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


def test_configs_say_what_they_are():
    assert [relative(p) for p in (ROOT / "configs").rglob("*.yaml") if not p.read_text().startswith("# ")] == []


# --- README and continuous integration ---


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_readme_commands_are_true(script, capsys):
    """The scripts exist, know the flags, and the files of the repository that are named exist."""
    told = {}
    for command in readme_commands():
        words = shlex.split(command, comments=True)
        for word in words:
            if word.split("/")[0] in ("configs", "consissr", "scripts", "tests"):
                assert (ROOT / word).exists(), command
        for i in (i for i, word in enumerate(words) if word.startswith("scripts/")):
            if words[i] not in told:
                with pytest.raises(SystemExit, match="^0$"):
                    script(Path(words[i]).stem).main(["--help"])
                told[words[i]] = capsys.readouterr().out
            for flag in (word.split("=")[0] for word in words[i + 1 :] if re.match("-+[a-z]", word)):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", told[words[i]]), f"{words[i]} has no {flag}"


def test_continuous_integration_runs_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    matching = [c for c in readme_commands() if re.match(r"python3 -m venv .*pytest", c)]
    assert len(matching) == 1 and "&&" in matching[0]
