"""Compare this project with recorded results: python tests/conformance/check.py DIR...

Each DIR (or .tar.xz of one) holds weights, inputs and recorded results; what is in it is found out, not assumed. Prints
one line per quantity: name, largest absolute error, relative L2 error, tolerance, pass or FAIL; then what the folder
lacks, and recorded quantities that nothing here checks. The last line counts, and names the files that are lacking.
What fails is tried once more under the other way of summing ("again", then its verdict). Exit status 1 if any quantity
fails both times, if a folder holds none, or if it holds none of a kind that its inputs promise.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

USUAL = {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ONEDNN_MAX_CPU_ISA": "DEFAULT"}
"""Sums as the processor likes best. Torch's libraries ask for this at their first sum, not when they are loaded."""
PLAIN = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""Sums in plain order, about half as fast.

Recorded float32 results are rounded themselves, and CCSR's networks on random weights amplify that: against float64 the
recorded x0_T of a fixture is off by 2.4e-5, a gradient by 2.5e-3, more than the tolerances. They agree with what is
rounded alike, and how that was differs from quantity to quantity: one that fails under USUAL is tried under PLAIN."""

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

PROMISES = {
    "networks of CCSR": (r"networks\.safetensors:x", r"networks\.safetensors:t\d+_"),
    "samplings of CCSR": (r"inputs\.safetensors:init_noise", r"run_(?!tile).*:final_latent"),
    "tiled samplings of CCSR": (r"tile_inputs\.safetensors:init_noise", r"run_tile.*:final_latent"),
    "steps of CCSR's stage 1": (r"stage1_inputs\.safetensors:noise1", r"stage1_outputs\.safetensors:.*_loss"),
    "steps of CCSR's stage 2": (r"stage2_inputs\.safetensors:noise_T", r"stage2_outputs\.safetensors:.*_loss"),
    "stability": (r"stability_inputs\.npz:.*", r"stability_outputs\.json:"),
    "colour transfer on 8 bits": (r"color_fix\.npz:target", r"color_fix\.npz:"),
    "texts of ConsisSR": (r"inputs\.safetensors:tokens_.*", r"outputs\.safetensors:text_"),
    "networks of ConsisSR": (r"inputs\.safetensors:x_t\d+", r"outputs\.safetensors:eps_"),
    "samplings of ConsisSR": (r"inputs\.safetensors:x_T", r"outputs\.safetensors:final_latent"),
    "latent augmentation": (r"inputs\.safetensors:tala_hq", r"outputs\.safetensors:tala_"),
    "steps of ConsisSR's stage 2": (r"train_inputs\.safetensors:eps", r"train_outputs\.safetensors:loss"),
    "gradients of ConsisSR's stage 2": (r"train_inputs\.safetensors:eps", r"train_step\.json:\|grad "),
    "steps of RCLIP": (r"rclip_distill\.safetensors:hq", r"rclip_distill\.safetensors:loss"),
    "colour transfer": (r"colorfix\.npz:content", r"colorfix\.npz:"),
    "image operations": (r"image_ops\.npz:(cc_)?src", r"image_ops\.npz:"),
    "degradation": (r"degradation_seeded\.npz:gt_uint8", r"degradation_seeded\.npz:"),
    "tiled decoding": (r"tiled_vae\.safetensors:.*latent.*", r"tiled_vae\.safetensors:"),
}
"""By kind: inputs that promise it, and the quantities of which one at least must then have been compared."""

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
    """Check one folder, or an archive of one; (quantities compared, quantities or promised kinds failed)."""
    if not Path(folder).is_file():
        return run_folder(Path(folder), write)
    with tempfile.TemporaryDirectory() as unpacked, tarfile.open(folder) as archive:
        archive.extractall(unpacked, filter="data")
        return run_folder(next(Path(unpacked).iterdir()), write)


def run_folder(folder: Path, write: Callable[[str], None]) -> tuple[int, int]:
    """Check one folder."""
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
    broken = broken_promises(fixture, seen)
    for kind in broken:
        write(f"{kind}: none compared, though the inputs are there FAIL")
    absent = dict.fromkeys([*broken, *(name.split(":")[0] for name in lacks)])
    counts = f"# {compared} compared, {failed + len(broken)} failed, {len(lacks)} lacking, {len(rest)} unchecked"
    write(f"{counts}; lacking: {', '.join(absent)}" if absent else counts)
    return compared, failed + len(broken)


def broken_promises(fixture: Fixture, seen: set[str]) -> list[str]:
    """Kinds of quantities that the folder's inputs promise and of which none was compared."""
    names = stored_names(fixture, [*RECORDED, "*inputs.safetensors", "*inputs.npz"])
    promised = {kind for kind, (given, _) in PROMISES.items() if any(re.fullmatch(given, name) for name in names)}
    return [kind for kind in PROMISES if kind in promised and not any(re.match(PROMISES[kind][1], n) for n in seen)]


def stored_names(fixture: Fixture, patterns: Iterable[str]) -> list[str]:
    """ "file:key" of everything in the folder's files of these patterns."""
    files = sorted({path for pattern in patterns for path in fixture.folder.glob(pattern)})
    readers = {".npz": fixture.arrays, ".json": fixture.json, ".safetensors": fixture.tensors}
    return [f"{path.name}:{key}" for path in files for key in readers[path.suffix](path.name)]


def unchecked(fixture: Fixture, seen: set[str]) -> list[str]:
    """Recorded results that no check has compared."""
    names = stored_names(fixture, RECORDED)
    known = seen | {name.split(" ")[0] for name in seen}  # one key may hold several quantities: "file:key part"
    return [name for name in names if name not in known and not GIVEN.fullmatch(name)]


def main(folders: list[str]) -> int:
    """Check every folder; the exit status."""
    bad = [folder for folder in folders if not Path(folder).exists()]
    if bad or not folders:
        print(f"no such folder: {', '.join(bad)}" if bad else "usage: check.py DIR...", file=sys.stderr)
        return 2
    results = [twice(folder) for folder in folders]
    return int(any(failed or not compared for compared, failed in results))


def twice(folder: str) -> tuple[int, int]:
    """Check one folder, what fails under both arithmetics; (quantities compared, failed)."""
    first: list[str] = []

    def write(text: str) -> None:
        first.append(text)
        text = re.sub("FAIL$", "again", text)
        print(re.sub(", ([1-9][0-9]*) failed", r", \1 to try again", text), flush=True)

    compared, failed = apart(folder, USUAL, write)
    if not failed:
        return compared, 0
    lines: list[str] = []
    apart(folder, PLAIN, lines.append)
    second, known = verdicts(lines), verdicts(first)
    again = {key: second.get(key, text) for key, text in known.items() if text.endswith("FAIL")}
    for text in again.values():
        print(text)
    failed = sum(text.endswith("FAIL") for text in again.values())
    print(re.sub(r", \d+ failed", f", {failed} failed", first[-1]))
    return compared, failed


def apart(folder: str, arithmetic: dict[str, str], write: Callable[[str], None]) -> tuple[int, int]:
    """`run` in a process of its own, which sums in this way, in one thread, as the fixtures were made."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(folder, arithmetic, writer))
    process.start()
    writer.close()
    try:
        while isinstance(told := reader.recv(), str):
            write(told)
    except EOFError:
        told = 0, 1
        write(f"{folder}: the process that checked it ended FAIL")
        write("# 0 compared, 1 failed, 0 lacking, 0 unchecked")
    process.join()
    return told


def tell(folder: str, arithmetic: dict[str, str], writer: Connection) -> None:
    """In that process: send `run`'s lines, then what it returns."""
    os.environ.update(arithmetic)
    torch.set_num_threads(1)
    writer.send(run(folder, writer.send))


def verdicts(lines: Iterable[str]) -> dict[tuple[str, int], str]:
    """Lines with a verdict by their quantity and its how-manieth line it is."""
    found: dict[tuple[str, int], str] = {}
    count: Counter[str] = Counter()
    for text in lines:
        if text.endswith((" pass", " FAIL")):
            name = text.split()[0]
            found[name, count[name]] = text
            count[name] += 1
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
