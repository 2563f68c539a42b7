"""What a wheel holds: every package of the tree, the scripts as commands, the configurations and the data files."""

import tomllib


def test_every_package_and_command_is_named(root):
    """setuptools is told by name, because scripts/ and configs/ move into the package: none may be forgotten."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    told = project["tool"]["setuptools"]
    here = {
        ".".join(path.parent.relative_to(root).parts)
        for name in ("consissr", "ccsr")
        for path in (root / name).rglob("*.py")
    }
    assert set(told["packages"]) == here | {"consissr.scripts", "consissr.configs"}
    assert told["package-dir"] == {"consissr.scripts": "scripts", "consissr.configs": "configs"}
    commands = project["project"]["scripts"]
    assert set(commands) >= {"consissr-infer", "consissr-train", "consissr-eval"}
    for name, target in commands.items():
        script = root / "scripts" / f"{name.removeprefix('consissr-')}.py"
        assert target == f"consissr.scripts.{script.stem}:main" and "\ndef main(" in script.read_text()


def test_data_files_are_named(root):
    """Files beside the code that are no code: each pattern that the wheel takes, and nothing that no pattern takes."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["consissr"]
    taken = {path for pattern in patterns for path in (root / "consissr").glob(pattern)}
    data = {p for p in (root / "consissr").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", "")}
    assert {path.relative_to(root).as_posix() for path in data - taken} == set()
