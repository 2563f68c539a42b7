"""Odd pictures, flags, configurations and model folders for scripts/infer.py and scripts/train.py, from fixed seeds.

  python tests/fuzz.py                  1,000 mutated pictures, 300 odd calls, 60 hostile model folders
  python tests/fuzz.py calls --cases 40 --only 17

Each case calls `main` in this process. It must end by itself within its time, with an exit status and without a
traceback, and leave inputs, earlier results and everything else that was there as it was; what it writes must be
whole. A case that hangs ends the program with the stack of where it hung. Prints one line per fault, and figures.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.util
import io
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import make_tiny_model  # noqa: E402
from PIL import Image  # noqa: E402

from consissr.images import png  # noqa: E402
from consissr.images.formats import output_size  # noqa: E402
from consissr.images.resize import resize  # noqa: E402
from consissr.images.rows import rows_of  # noqa: E402
from consissr.restorer import Restorer  # noqa: E402

SECONDS, MEMORY = 60, 6 * 2**30
"""What a case may take, and bytes of this process."""
LARGEST = 2**19
"""Pixels of a result up to which the tiny model computes it; larger ones are enlarged only."""
NUMBERS = ("nan", "inf", "-1", "0", "1e308", "", " ", "\0", "٣", "0x10", "1e3", "99999999999999999999", "-0.0", "1,5")
WORDS = ("", " ", "\0", "a b/c d", "..", "~", "http://x/y", "\udcff", "x" * 300, "a\nb", "--", "${oc.env:HOME}", "*[")
YAMLS = (
    b"", b"\t", b"a: b: c", b"- 1\n- 2\n", b"\xff\xfe\x00a", b"steps: [1", b"steps: 0\n", b"steps: 1e999\n",
    b"t_max: .nan\n", b"guidance: {}\n", b"unknown: 1\n", b"plan: 7\n", b"steps: '${oc.env:HOME}'\n", b"&a [*a]\n",
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n",
    b"timesteps: [[1, 2]]\n", b"timesteps: [[999, -1, x0, 4]]\n", b"timesteps: [['a', 'b', 'c']]\n", b"\x89PNG\r\n",
    b"!!python/object/apply:os.system ['true']\n", b"tile: 99999999999999999999\n", b"fidelity: 2\n",
    b"steps: 2\nsteps: 3\n", b"stage: nuts\n", b"stage: [nuts]\n", b"stage: nuts\nbatch: -1\n",
    b"stage: tala\noptimizer: 3\n", b"null\n", b"x" * 10**5,
)  # fmt: skip
VALUES = (None, 0, -1, 10**9, 1e308, float("nan"), "x", "", [], {}, [0], [10**9] * 3, True, [[]], {"a": 1}, "\0", 3.5)


class FaultError(Exception):
    """What a case did and must not do."""


def script(name: str) -> ModuleType:
    """One of scripts/."""
    spec = importlib.util.spec_from_file_location(f"fuzzed_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Restores:
    """The tiny model for small pictures of every tenth case, else enlargement: the files are what is odd."""

    def __init__(self, restorer) -> None:
        self.restorer, self.sampler, self.precision = restorer, restorer.sampler, restorer.precision
        self.device, self.calls = restorer.device, 0

    def __call__(self, photos, *, scale, longest, **settings):
        size = output_size(*photos[0].pixels.shape[-2:], scale, longest)
        self.calls += 1
        if self.calls % 30 <= 2 and size[0] * size[1] <= LARGEST:
            return self.restorer(photos, scale=scale, longest=longest, **settings)
        return [photo.restored(resize(rows_of(photo.image, 0, photo.image.shape[2]), size)[0]) for photo in photos]


class Bench:
    """A folder to run cases in, with the tiny model and some pictures."""

    def __init__(self, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        self.folder, self.model = folder, make_tiny_model(folder / "models")
        self.infer, self.train = script("infer"), script("train")
        self.load = self.infer.load
        self.restorer = Restores(Restorer.load(str(self.model), device="cpu"))
        self.pictures = list(pictures(folder / "pictures"))

    def call(self, main: Callable, arguments: list[str]) -> tuple[int, str]:
        """Exit status and what was said; FaultError for an exception, or words of one."""
        said, how = io.BytesIO(), {"encoding": "utf-8", "write_through": True}  # as strict as a terminal
        out, err = io.TextIOWrapper(said, **how), io.TextIOWrapper(said, errors="backslashreplace", **how)
        logging.root.handlers.clear()  # the next one writes to `said`
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(arguments)
        except SystemExit as end:
            status = end.code or 0
            if not isinstance(status, int):
                err.write(str(status))
                status = 1
        except Exception as error:  # noqa: BLE001 - that there is none is what is asked
            where = error.__traceback__
            while where.tb_next:
                where = where.tb_next
            place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            raise FaultError(f"{type(error).__name__} at {place}: {str(error)[:200]!r}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        if "Traceback (most recent" in said.getvalue().decode():
            raise FaultError(f"a traceback was printed: {said.getvalue().decode()[-300:]!r}")
        return status, said.getvalue().decode()


def pictures(folder: Path) -> Iterator[Path]:
    """Small pictures of every format, depth and mode that Pillow writes, some with metadata."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(24)[:, None, None] / 5 + np.arange(4) + np.arange(32)[:, None] / 7)
    values = (waves * 90 + 128 + rng.normal(0, 3, waves.shape)).clip(0, 255).astype(np.uint8)
    colour, exif = Image.fromarray(values[..., :3]), Image.Exif()
    exif[274], exif[315] = 6, "A. Photographer"
    ways = {
        "rgb.png": (colour, {"exif": exif}), "rgba.png": (Image.fromarray(values), {}),
        "grey.png": (colour.convert("L"), {}), "palette.png": (colour.quantize(60), {}),
        "rgb.jpg": (colour, {"exif": exif, "xmp": b"<x:xmpmeta/>"}),
        "progressive.jpg": (colour, {"progressive": True}), "cmyk.jpg": (colour.convert("CMYK"), {}),
        "lossy.webp": (colour, {"exif": exif}), "lossless.webp": (colour, {"lossless": True}),
        "a.gif": (colour.quantize(60), {}), "raw.tif": (colour, {"exif": exif}),
        "lzw.tif": (colour, {"compression": "tiff_lzw"}), "a.bmp": (colour, {}),
        "deflate.tif": (Image.fromarray(values), {"compression": "tiff_deflate"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}), "a.ppm": (colour, {}),
        "a.tga": (colour, {"compression": "tga_rle"}), "a.jp2": (colour, {}), "a.avif": (colour, {}),
        "bits.tif": (colour.convert("1"), {"compression": "group4"}), "lab.tif": (colour.convert("LAB"), {}),
    }  # fmt: skip
    for name, (image, options) in ways.items():
        with contextlib.suppress(OSError, KeyError):  # a format that is not here
            image.save(folder / name, **options)
            yield folder / name
    colour.save(folder / "two.jpg", format="MPO", save_all=True, append_images=[colour])
    yield folder / "two.jpg"
    with open(folder / "deep.png", "wb") as file:
        png.write(file, values[..., :3].astype(np.uint16) * 257)
    yield folder / "deep.png"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with one to four things wrong with it."""
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(len(data), 1)))
        near = int(rng.integers(0, min(len(data), 200) + 1))  # headers are where it hurts
        span = int(rng.integers(1, 64))
        kind = rng.integers(0, 7)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:near] + bytes(rng.integers(0, 256, span % 5 + 1, np.uint8)) + data[near + span % 5 + 1 :]
        elif kind == 2:
            data = data[:at] + bytes(span) + data[at + span :]
        elif kind == 3:
            data = data[:at] + data[max(at - span, 0) :]
        elif kind == 4:
            data = data[:near] + bytes([255] * 4) + data[near + 4 :]
        elif kind == 5:
            data = data[:near] + data[near + span :]
        else:
            data = data[:at] + bytes(rng.integers(0, 256, span, np.uint8)) + data[at + span :]
    return data


def state(*folders: Path) -> dict[str, str]:
    """Every file below, with a digest."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def image_case(bench: Bench, place: Path, rng: np.random.Generator) -> int:
    """A mutated picture between two good ones, which must be restored whatever the other does."""
    source = bench.pictures[rng.integers(len(bench.pictures))]
    (place / "in").mkdir()
    (place / "in" / f"m{source.suffix}").write_bytes(mutated(source.read_bytes(), rng))
    for name in ("a.png", "z.png"):
        shutil.copy(bench.folder / "pictures" / "rgb.png", place / "in" / name)
    before = state(place / "in")
    bench.infer.load = lambda *_, **__: bench.restorer
    status, said = bench.call(bench.infer.main, ["-i", str(place / "in"), "-o", str(place / "out"), "-s", "2"])
    if state(place / "in") != before:
        raise FaultError("an input changed")
    results = sorted(path.name for path in (place / "out").iterdir())
    if not {"a.png", "z.png"} <= set(results) or len(results) != (3 if status == 0 else 2):
        raise FaultError(f"status {status}, results {results}: {said[-200:]!r}")
    if status not in (0, 1) or ("failed:" in said) != bool(status):
        raise FaultError(f"status {status}: {said[-200:]!r}")
    for name in results:
        with Image.open(place / "out" / name) as image:
            image.load()
    return status


def odd_call(bench: Bench, place: Path, rng: np.random.Generator) -> int:
    """One to three odd flags of infer.py, or an odd configuration for it or for train.py."""

    def one(of):
        return of[rng.integers(len(of))]

    shutil.copytree(bench.folder / "pictures", place / "in", ignore=lambda folder, names: sorted(names)[3:])
    (place / "out").mkdir()
    (place / "out" / "kept.png").write_bytes((bench.folder / "pictures" / "rgb.png").read_bytes())
    (place / "odd.yaml").write_bytes(one(YAMLS))
    names = ("in", "odd.yaml", "out/kept.png", "no/x.png", "/dev/null", "/dev/full", "/proc/self/mem")
    paths = (*WORDS, *(str(place / name) for name in names))
    if rng.random() < 0.2:
        arguments = ["--config", one((str(place / "odd.yaml"), *paths)), "--dry-run", f"output_dir={place / 'run'}"]
        before = state(place / "in", place / "out")
        if rng.random() < 0.5:
            arguments[1] = str(ROOT / "configs" / one(("ccsr/nuts.yaml", "consissr/tala.yaml", "nano/deft.yaml")))
            key = one(("batch", "steps", "stage", "optimizer.lr", "data.paths", "model.base", "seed", "a.b", ""))
            arguments.append(f"{key}={one((*NUMBERS, *WORDS))}")
        main = bench.train.main
    else:
        flags = {
            "-s": NUMBERS, "--longest-side": NUMBERS, "--seed": NUMBERS, "--quality": NUMBERS,
            "--repeat": ("0", "-1", "x", "2"), "--batch-size": NUMBERS[:10], "--steps": ("0", "-1", "nan", "1", "x"),
            "--t-max": NUMBERS, "--t-min": NUMBERS, "--guidance": NUMBERS, "--tile": (*NUMBERS[:10], "1", "17"),
            "--tile-overlap": (*NUMBERS[:10], "512"), "--vae-tile": (*NUMBERS[:10], "1", "17"), "--fidelity": NUMBERS,
            "--color-strength": NUMBERS, "--suffix": WORDS, "--ext": ("gif", "jxl", "avif", "", "png"), "-m": paths,
            "--base": paths, "--config": (str(place / "odd.yaml"), *paths), "--json": paths, "-o": paths, "-i": paths,
            "--positive": WORDS, "--negative": WORDS, "--device": (*WORDS, "cuda", "mps", "cuda:9"),
            "--precision": ("fp8", "bf16", "fp16"), "--plan": ("ddpm", "x"), "--metadata": ("settings", "all"),
            "--color-fix": ("wavelet", "x"), "--recursive": (), "--overwrite": (), "--skip-existing": (),
            "--frames": (), "--save-steps": (), "--dry-run": (), "-q": (),
        }  # fmt: skip
        usual = {"-i": str(place / "in"), "-o": str(place / "out"), "-m": str(bench.model), "-s": "1.5"}
        names = [one(list(flags)) for _ in range(rng.integers(1, 4))]
        chosen = {name: one(flags[name]) if flags[name] else None for name in names}
        arguments = [word for pair in (usual | chosen).items() for word in pair if word is not None]
        before, main, bench.infer.load = state(place / "in", place / "out"), bench.infer.main, bench.load
    here = os.getcwd()
    os.chdir(place)  # names that are not absolute mean places here
    try:
        status, said = bench.call(main, arguments)
    finally:
        os.chdir(here)
    after = state(place)
    if any(after.get(path) != digest for path, digest in before.items()):
        raise FaultError(f"a file was lost: {arguments}")
    if status not in (0, 1, 2) or (status == 2 and not said.strip()):
        raise FaultError(f"status {status} of {arguments}: {said[-200:]!r}")
    if leftovers := [path for path in after if ".part" in path]:
        raise FaultError(f"left behind: {leftovers}")
    return status


def hostile_folder(bench: Bench, place: Path, rng: np.random.Generator) -> int:
    """A model folder, or its base, with one thing wrong: a file, a field of a configuration, weights."""
    shutil.copytree(bench.model.parent, place / "models")
    model = place / "models" / bench.model.name
    config = model / "config.yaml"
    config.write_text(config.read_text().replace(str(bench.model.parent), str(place / "models")))
    files = sorted(path for path in (place / "models").rglob("*") if path.is_file())
    file = files[rng.integers(len(files))]
    kind = rng.integers(0, 8)
    if kind < 4 and file.suffix == ".json":
        fields = json.loads(file.read_text())
        name = sorted(fields)[rng.integers(len(fields))]
        fields[name] = VALUES[rng.integers(len(VALUES))]
        file.write_text(json.dumps(fields))
        changed = f"{file.name}: {name} = {fields[name]!r}"
    elif kind < 4 and file.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        weights = load_file(file)
        name = sorted(weights)[rng.integers(len(weights))]
        whole = weights[name]
        odd = (whole[:0], whole.to(torch.int8), whole * float("nan"), whole.flatten()[:3].clone(), None)
        one = odd[rng.integers(len(odd))]
        rest = {key: value for key, value in weights.items() if key != name}
        save_file(rest if one is None else rest | {name: one.contiguous()}, file)
        changed = f"{file.name}: {name}"
    elif kind == 4:
        file.unlink()
        changed = f"{file.name} is missing"
    elif kind == 5:
        file.unlink()
        file.mkdir()
        changed = f"{file.name} is a folder"
    elif kind == 6:
        file.write_bytes(YAMLS[rng.integers(len(YAMLS))])
        changed = f"{file.name} is other text"
    else:
        file.write_bytes(mutated(file.read_bytes(), rng))
        changed = f"{file.name} is damaged"
    bench.infer.load = bench.load
    try:
        status, said = bench.call(
            bench.infer.main,
            ["-i", str(bench.folder / "pictures" / "rgb.png"), "-o", str(place / "out"), "-m", str(model)],
        )
    except FaultError as fault:
        raise FaultError(f"{changed}: {fault}") from fault
    if status not in (0, 1, 2) or (status and not said.strip()):
        raise FaultError(f"{changed}: status {status}: {said[-200:]!r}")
    if status == 2 and [line[:7] for line in said.splitlines()][-1:] != ["error: "]:
        raise FaultError(f"{changed}: not a line: {said[:300]!r}")
    return status


KINDS = {"images": (image_case, 1000), "calls": (odd_call, 300), "folders": (hostile_folder, 60)}


def run(kinds: list[str], cases: int | None = None, only: int | None = None, say: Callable = print) -> int:
    """The number of faults; a line about each, and one on each kind."""
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        for kind in kinds:
            case, usual = KINDS[kind]
            ended: Counter = Counter()
            for number in [only] if only is not None else range(cases or usual):
                place = Path(temporary) / "case"
                place.mkdir()
                print(f"\r{kind} {number} ", end="", file=sys.__stderr__)
                try:
                    ended[case(bench, place, np.random.default_rng([sum(map(ord, kind)), number]))] += 1
                except FaultError as fault:
                    faults += 1
                    say(f"{kind} {number}: {fault}")
                shutil.rmtree(place)
            words = ", ".join(f"{count} with status {status}" for status, count in sorted(ended.items()))
            say(f"{kind}: {sum(ended.values())} as wanted ({words}), {faults} faults so far")
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help="images, calls, folders (default: all)")
    parser.add_argument("--cases", type=int, help="how many of each")
    parser.add_argument("--only", type=int, help="this case alone")
    args = parser.parse_args()
    sys.exit(1 if run(args.kinds, args.cases, args.only) else 0)
