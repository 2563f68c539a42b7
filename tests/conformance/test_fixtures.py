"""The conformance command's verdict on the fixtures beside the repository: everything in them is reproduced."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

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

FAST = {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "DEFAULT"}
"""For folders that pass as the processor likes best to sum: half the time. What fails is tried again in plain order."""


def test_what_the_repository_holds_is_reproduced(root):
    """Networks, samplings, training steps, tables: always. (What they lack, the large ones have: small/README.md.)"""
    least = {"ccsr": 210, "consissr": 440}
    told = verdicts(root, [root / "tests/conformance/small" / f"{name}.tar.xz" for name in least], FAST)
    for (count, rest), (name, compared) in zip(told, least.items(), strict=True):
        unchecked = [line for line in rest if line.startswith("unchecked")]
        assert unchecked == [line for line in CCSR_REST if "stability" in line and name == "ccsr"]
        assert count >= compared, name


@pytest.mark.parametrize(
    ("least", "rest", "environment"),
    [
        ({"consissr_A": 83, "consissr_train_A": 304, "consissr_common": 95}, [], FAST),
        ({"ccsr_A": 307}, CCSR_REST, {}),
    ],
)
def test_the_authors_results_are_reproduced(root, shared, least, rest, environment):
    """The large folders, where they are beside the repository."""
    told = verdicts(root, [shared / "conformance" / name for name in least], environment)
    for (count, found), (name, compared) in zip(told, least.items(), strict=True):
        assert found == rest and count >= compared, name


def verdicts(root, folders, environment):
    """Per folder: quantities compared, and lines on what is lacking or unchecked. The command must succeed.

    In a process of its own: it sets how the processor computes before torch loads.
    """
    call = [sys.executable, str(root / "tests/conformance/check.py"), *map(str, folders)]
    done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, timeout=1800)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if line.endswith("FAIL")) or done.stderr
    told, rest = [], []
    for line in lines:
        if line.startswith(("lacks", "unchecked")):
            rest.append(line)
        if count := re.fullmatch(r"# (\d+) compared, 0 failed, \d+ lacking, \d unchecked(; lacking: .*)?", line):
            told.append((int(count[1]), sorted(rest)))
            rest = []
    return told
