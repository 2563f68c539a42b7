"""The conformance command's verdict on the fixtures beside the repository: everything in them is reproduced."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.training.children import finish, forkserver, say_into

CCSR_REST = [
    "lacks    tiled_vae.safetensors",
    "unchecked run_S1_g1.safetensors:add_noise_1_t1",
    "unchecked run_S1_g45.safetensors:add_noise_1_t1",
    "unchecked run_tile_S1_g1.safetensors:add_noise_1_t1",
    "unchecked stability_outputs.json:G_STD_if_sample_std",
    "unchecked stability_outputs.json:G_STD_mean_metric",
    "unchecked stability_outputs.json:L_STD_if_Y_channel_nocrop",
]
"""What ccsr_A holds beside what is compared: samples that the release discards, other definitions of its measures."""

SMALL = {"ccsr": 210, "consissr": 440}
LARGE = {"ccsr_A": 307, "consissr_A": 83, "consissr_train_A": 304, "consissr_common": 95}
"""Folders, and how many quantities each has at least."""


def check_apart(folders: list[Path], log: Path) -> None:
    """tests/conformance/check.py as this process, which has not summed anything yet."""
    say_into(log)
    sys.path.insert(0, str(Path(__file__).parent))
    import check

    sys.exit(check.main([str(folder) for folder in folders]))


@pytest.fixture(scope="module")
def told(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """The command on all folders that are there: quantities compared, and lines on what is lacking or unchecked."""
    folders = [root / "tests/conformance/small" / f"{name}.tar.xz" for name in SMALL]
    folders += [folder for name in LARGE if (folder := root.parent / "shared" / "conformance" / name).is_dir()]
    log = tmp_path_factory.mktemp("told") / "log.txt"
    process = forkserver().Process(target=check_apart, args=(folders, log))
    process.start()
    status, lines = finish(process, seconds=1800), log.read_text().splitlines()
    assert status == [0], "\n".join(line for line in lines if line.endswith("FAIL")) or "\n".join(lines[-20:])
    counts, rest = [], []
    for line in lines:
        if line.startswith(("lacks", "unchecked")):
            rest.append(line)
        if count := re.fullmatch(r"# (\d+) compared, 0 failed, \d+ lacking, \d unchecked(; lacking: .*)?", line):
            counts.append((int(count[1]), sorted(rest)))
            rest = []
    return {folder.name.split(".")[0]: count for folder, count in zip(folders, counts, strict=True)}


def test_what_the_repository_holds_is_reproduced(told):
    """Networks, samplings, training steps, tables: always. (What they lack, the large ones have: small/README.md.)"""
    for name, least in SMALL.items():
        count, rest = told[name]
        unchecked = [line for line in rest if line.startswith("unchecked")]
        assert unchecked == [line for line in CCSR_REST if "stability" in line and name == "ccsr"]
        assert count >= least, name


def test_the_authors_results_are_reproduced(told, shared):
    """The large folders, where they are beside the repository."""
    for name, least in LARGE.items():
        count, rest = told[name]
        assert rest == (CCSR_REST if name == "ccsr_A" else []) and count >= least, name
