"""Compare this project with the authors' code: python tests/conformance/check.py DIR...

Each DIR holds weights, inputs and recorded results (what is in it is found out, not assumed). Prints one line per
quantity: name, largest absolute error, relative L2 error, tolerance, pass or FAIL; then what the folder lacks, and
recorded quantities that nothing here checks. Exit status 1 if any quantity fails or a folder holds none.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

PLAIN_ARITHMETIC = {"OMP_NUM_THREADS": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""Before torch loads: one thread, as the fixtures were made, and sums in plain order. The small CCSR networks have
GroupNorm groups whose mean is far larger than their spread; in channels-last maps torch computes those from squares, so
rounding of the convolution before them is amplified to 3e-5 of the result, whichever way a processor likes to sum."""
if __name__ == "__main__":
    os.environ.update({name: os.environ.get(name, value) for name, value in PLAIN_ARITHMETIC.items()})

import ccsr_networks  # noqa: E402
import ccsr_training  # noqa: E402
import consissr_networks  # noqa: E402
import consissr_training  # noqa: E402
import degradation_cases  # noqa: E402
import sampler_cases  # noqa: E402
import tables  # noqa: E402
from fixtures import Check, Fixture, Lack, lacking  # noqa: E402

Cases = Callable[[Fixture], Iterator[Check | Lack]]

CASES: tuple[Cases, ...] = (
    consissr_networks.cases,
    ccsr_networks.cases,
    consissr_training.cases,
    sampler_cases.cases,
    ccsr_training.cases,
    tables.cases,
    degradation_cases.cases,
)
"""Every group of quantities; each yields nothing for a folder that is not of its kind."""

RECORDED = (
    "outputs.safetensors",
    "networks.safetensors",
    "run_*.safetensors",
    "*_outputs.safetensors",
    "rclip_distill.safetensors",
    "tiled_vae.safetensors",
    "*.npz",
    "schedule50.json",
    "stability_outputs.json",
)
"""Files of recorded results."""

GIVEN = re.compile(
    r"networks\.safetensors:(x|cond_latent)|rclip_distill\.safetensors:(hq|lq|student\..*|teacher\..*)"
    r"|tiled_vae\.safetensors:.*latent.*|.*_inputs\.npz:.*|colorfix\.npz:(content|style)|color_fix\.npz:(target|source)"
    r"|image_ops\.npz:(cc_)?src|geometry\.npz:lq\d+|degradation_seeded\.npz:gt_uint8"
)
"""Inputs that stand in such files."""


def line(check: Check) -> str:
    """One quantity's row."""
    largest, relative = check.errors()
    rule = f"{check.kind[:3]} {check.tolerance:.0e}" if check.kind in ("relative", "absolute") else check.kind
    return f"{check.name:<62} {largest:9.2e} {relative:9.2e}  {rule:<9} {'pass' if check.passed() else 'FAIL'}"


def run(folder: str, write: Callable[[str], None] = print) -> tuple[int, int]:
    """Check one folder; (quantities compared, quantities failed)."""
    fixture = Fixture(folder)
    write(f"# {folder} ({', '.join(sorted(fixture.kinds)) or 'of no known kind'})")
    compared, failed, seen = 0, 0, set()
    lacks: dict[str, None] = {}
    for cases in CASES:
        try:
            for found in lacking(cases)(fixture):
                if isinstance(found, Lack):
                    lacks[found.name] = None
                    continue
                compared, failed = compared + 1, failed + (not found.passed())
                seen.add(found.name)
                write(line(found))
        except Exception as error:  # noqa: BLE001 - one broken group must not hide the others; it counts as failed
            failed += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            write(f"{cases.__module__}: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno}) FAIL")
    for name in lacks:
        write(f"lacks    {name}")
    rest = unchecked(fixture, seen)
    for name in rest:
        write(f"unchecked {name}")
    write(f"# {compared} compared, {failed} failed, {len(lacks)} lacking, {len(rest)} unchecked")
    return compared, failed


def unchecked(fixture: Fixture, seen: set[str]) -> list[str]:
    """Recorded results that no check has compared."""
    files = sorted({path for pattern in RECORDED for path in fixture.folder.glob(pattern)})
    readers = {".npz": fixture.arrays, ".json": fixture.json, ".safetensors": fixture.tensors}
    names = [f"{path.name}:{key}" for path in files for key in readers[path.suffix](path.name)]
    known = seen | {name.split(" ")[0] for name in seen}  # one key may hold several quantities: "file:key part"
    return [name for name in names if name not in known and not GIVEN.fullmatch(name)]


def main(folders: list[str]) -> int:
    """Check every folder; the exit status."""
    bad = [folder for folder in folders if not Path(folder).is_dir()]
    if bad or not folders:
        print(f"not a folder: {', '.join(bad)}" if bad else "usage: check.py DIR...", file=sys.stderr)
        return 2
    results = [run(folder) for folder in folders]
    return int(any(failed or not compared for compared, failed in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
