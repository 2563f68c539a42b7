"""What a run over image files will do: which files, under which names. No torch here: mistakes must show at once.

A plan depends on the inputs and flags only, not on what exists in the output folder, so that every process of a
distributed run makes the same plan and takes its share of it.
"""

import glob
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from consissr.config.machine import check_place
from consissr.errors import UserError
from consissr.images import formats
from consissr.images.tree import tree

BYTES_PER_PIXEL, BYTES_IN_ONE_PIECE, ONE_PIECE = 24, 350, 2**22
"""What a pixel of a result takes (its input, latents, float values and samples), what the networks of nano take for it
in float32 where they see an image as a whole, and up to how many pixels they do. Estimates: in bfloat16, 48.8
megapixels took 18 bytes each above a small picture's peak."""

ONE_NAME = str.casefold if sys.platform in ("win32", "darwin") else str
"""Names of which this makes the same are one file's on this system."""

_LISTS = (".txt", ".lst")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to restore."""

    source: Path
    key: str  # path below the input folder, with "/": names the image's noise
    repeat: int = 0
    height: int = 0
    width: int = 0
    out_height: int = 0
    out_width: int = 0
    ext: str = ""  # of the target
    target: Path | None = None  # None: nothing will be written
    error: str = ""  # why this file cannot be restored, where its header already says so
    note: str = ""  # what of this file is not restored


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Where results go and how large they are."""

    output: Path
    scale: float = 4.0
    longest: int | None = None  # pixels of the longest side; replaces the scale
    suffix: str | None = None  # between stem and extension; None: only where input and output share a folder
    ext: str = "auto"  # "auto": the input's where it can be written, else png
    repeat: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 64:
            raise UserError(f"--scale {self.scale:g} is out of range: use a number above 0, up to 64")
        if self.longest is not None and self.longest < 1:
            raise UserError(f"--longest-side {self.longest} is out of range: use at least 1")
        if not 1 <= self.repeat <= 1000:
            raise UserError(f"--repeat {self.repeat} is out of range: use 1 to 1000")
        if self.ext != "auto" and f".{self.ext}" not in formats.WRITABLE:
            raise UserError(f"--ext {self.ext} cannot be written here: {formats.how_to_get(f'.{self.ext}')}")
        if self.suffix and ({"/", os.sep, "\0"} & set(self.suffix)):
            raise UserError(f"--suffix {self.suffix!r} has a path separator or NUL: use plain characters such as _x4")
        check_place(self.output, "--output")

    @property
    def label(self) -> str:
        """Suffix of results that stand beside their inputs."""
        return f"_{self.longest}px" if self.longest else f"_x{self.scale:g}"


def plan(inputs: Sequence[str], naming: Naming, recursive: bool = False, skip_results: bool = False) -> list[Job]:
    """Every job of a run, in a fixed order; jobs whose file cannot be read carry the reason.

    skip_results: what would be another input's result is taken for it, and is no input. Where results go beside their
    inputs, those of earlier runs are found with the inputs and left out, unless the user named them.

    Raises:
        UserError: no images; an input that does not exist; an output that would replace an input, or another output.
    """
    single = len(inputs) == 1 and os.path.isfile(inputs[0]) and Path(inputs[0]).suffix.lower() not in _LISTS
    to_file = naming.output.suffix.lower() in formats.WRITABLE and not os.path.isdir(naming.output)
    if to_file and (not single or naming.repeat > 1):
        raise UserError(f"--output {naming.output} names one file, but there are several results: give a folder")
    if to_file and (naming.suffix or naming.ext not in ("auto", naming.output.suffix.lower()[1:])):
        raise UserError(f"--output {naming.output} is the result's whole name: leave out --suffix and --ext")
    if not os.path.isdir(naming.output) and not to_file:
        if os.path.exists(naming.output) or naming.output.suffix.lower() in (*formats.READABLE, *formats.PLUGINS):
            known = " ".join(formats.WRITABLE)
            raise UserError(f"--output {naming.output} is neither a folder nor an image file that is written ({known})")

    formats.quiet()
    found, named = {}, set()  # absolute path -> job; a file named twice is restored once
    for text in inputs:
        for job in _find(text, recursive, naming.output):
            path = os.path.abspath(job.source)
            found.setdefault(path, job)
            if os.path.isfile(text):  # an image, or a list
                named.add(path)
    fresh = without_earlier_results(found, named, naming)
    kept = {job.source for job in fresh}  # a film has 100,000 frames: jobs are not compared with each other
    earlier = [] if skip_results else [job for job in found.values() if job.source not in kept]
    if left := len(found) - len(fresh):
        log.warning("%d left out as results of earlier runs, by their names (such as a_x4 beside a)", left)
    jobs = [_measured(job, naming) for job in fresh]
    if not jobs:
        hint = "" if recursive else " (sub-folders are searched with --recursive)"
        raise UserError(
            f"no images in {', '.join(inputs)}{hint}; image files end in {' '.join(sorted(formats.READABLE))}"
        )
    jobs = [_to_file(job, naming.output) for job in jobs] if to_file else _named(jobs, naming)
    jobs = [
        replace(job, repeat=r, target=job.target and _in_sample(job.target, naming, r))
        for r in range(naming.repeat)
        for job in jobs
    ]
    if skip_results:
        jobs = _without_results(jobs)
    _check_targets(jobs, earlier)
    return jobs


def reason(error: Exception, job: Job) -> str:
    """One line about a job's file, without the path that is named anyway."""
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{job.source}: ").removeprefix(f"{job.target}: ")
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def drop_existing(jobs: Iterable[Job], skip: bool, overwrite: bool) -> tuple[list[Job], list[Job]]:
    """(jobs to do, jobs whose result exists and is kept).

    Raises:
        UserError: results exist, and neither `skip` nor `overwrite` says what to do with them.
    """
    jobs = list(jobs)
    if overwrite:
        return jobs, []
    existing = [job for job in jobs if job.target is not None and os.path.exists(job.target)]
    if existing and not skip:
        which = f"{existing[0].target} exists"
        if len(existing) > 1:
            which = f"{existing[0].target} and {len(existing) - 1} more exist"
        raise UserError(f"{which}: use --overwrite, --skip-existing or another --output")
    kept = {job.target for job in existing}
    return [job for job in jobs if job.target not in kept], existing


# --- finding ---


def _find(text: str, recursive: bool, output: Path) -> list[Job]:
    """The images that one --input word names: a file, a list of files, a folder, or a pattern."""
    if not text:
        raise UserError("--input has an empty word: name a file, a folder or a list")
    path = Path(text)
    try:
        if path.is_dir():
            return _in_folder(path, recursive, output)
        if path.is_file():
            return _in_list(path) if path.suffix.lower() in _LISTS else [Job(source=path, key=path.name)]
    except OSError as error:
        raise UserError(f"{text}: cannot be read ({error.strerror})") from None
    if glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        fixed = Path(text)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        return [Job(source=p, key=p.relative_to(fixed).as_posix()) for p in matches if _is_image(p)]
    raise UserError(f"{text}: no such file or folder")


def _in_folder(folder: Path, recursive: bool, output: Path) -> list[Job]:
    """Image files of `folder`, by name; hidden and other files are passed over, and what `folders` passes over."""
    jobs, errors = [], []
    for here, names in folders(folder, recursive, output, errors.append):
        paths = [here / name for name in names if _is_image(Path(name))]
        jobs += [Job(source=path, key=path.relative_to(folder).as_posix()) for path in paths]
    for error in errors:
        if Path(error.filename) == folder:
            raise error
        key = Path(error.filename).relative_to(folder).as_posix()
        jobs.append(Job(source=Path(error.filename), key=key, error=f"cannot be read ({error.strerror})"))
    return sorted(jobs, key=lambda job: job.key)


def folders(
    top: Path, recursive: bool, output: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str]]]:
    """`top` and, if `recursive`, what lies or is linked below it, without `output` and by-products: see `tree`."""
    return tree(top, leave=[output], enter=lambda folder: recursive and not _is_by_product(folder), onerror=onerror)


def _is_by_product(folder: Path) -> bool:
    """Whether it holds an earlier run's pictures of sampling steps, beside their result, or the frames of a film."""
    result = folder.name.removesuffix("_steps")
    steps = result != folder.name and os.path.isfile(folder.parent / result)  # Path's raises where nothing may be read
    return steps or os.path.isfile(folder / "film.json")


def _in_list(path: Path) -> list[Job]:
    """One image per line, relative to the list's folder; empty lines and lines that begin with # do not count."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: a list of images must be UTF-8 text, one path per line")
    jobs = []
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            source = path.parent / line
            key = Path(os.path.normpath(line))
            if key.is_absolute() or ".." in key.parts:  # which would lead out of the output folder: links resolved
                folder, top = (Path(os.path.realpath(place)) for place in (source.parent, path.parent))
                key = (folder.relative_to(top) if folder.is_relative_to(top) else Path()) / source.name
            jobs.append(Job(source=source, key=key.as_posix()))
    return jobs


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in formats.READABLE and not path.name.startswith(".")


# --- measuring and naming ---


def _measured(job: Job, naming: Naming) -> Job:
    """`job` with the sizes of its image and result and the suffix of its target, or with the reason against it."""
    if job.error:
        return job
    try:
        height, width, form, note = formats.probe(job.source)
    except Exception as error:  # noqa: BLE001 - whatever a file makes a reader raise concerns this file alone
        return replace(job, error=reason(error, job))
    rows, columns = formats.output_size(height, width, naming.scale, naming.longest)
    job = replace(job, height=height, width=width, out_height=rows, out_width=columns, note=note)
    wanted = job.source.suffix if naming.ext == "auto" else f".{naming.ext.removeprefix('.')}"
    return memory_checked(replace(job, ext=formats.suffix_for(wanted, form, max(rows, columns))))


def memory_checked(job: Job, short_side: int = 0) -> Job:
    """`job`, or, where what is free is too little for it, with the reason against it.

    short_side: what the model raises the short side of smaller results to (`geometry.least_side`), once it is known.
    """
    least = min(job.out_height, job.out_width)
    if job.error or 0 < short_side <= least:
        return job
    larger = max(short_side / least, 1.0)
    area, free = job.out_height * job.out_width * larger**2, psutil.virtual_memory().available / 2**30
    needed = (area * BYTES_PER_PIXEL + min(area, ONE_PIECE) * BYTES_IN_ONE_PIECE) / 2**30
    if needed <= free:
        return job
    size = f"{job.width}x{job.height} to {job.out_width}x{job.out_height}"
    size += f", for the networks {larger:.3g} times as large," if larger > 1 else ""
    return replace(job, error=f"{size} needs about {needed:.0f} GB, {free:.0f} are free; make it smaller or crop it")


def _named(jobs: list[Job], naming: Naming) -> list[Job]:
    """Jobs with their full targets: the key's folders and stem below the output folder."""

    def target(job: Job, with_old_suffix: bool) -> Path:
        mark = naming.suffix if naming.suffix is not None else naming.label if _is_beside(job, naming) else ""
        old = f"_{job.source.suffix.removeprefix('.')}" if with_old_suffix else ""
        return naming.output / Path(job.key).parent / f"{job.source.stem}{old}{mark}{job.ext}"

    def alike(job: Job) -> str:
        return ONE_NAME(str(target(job, False)))

    taken = Counter(alike(job) for job in jobs if job.ext)
    return [replace(job, target=target(job, taken[alike(job)] > 1)) if job.ext else job for job in jobs]


def _is_beside(job: Job, naming: Naming) -> bool:
    """Whether the result goes to the folder that its input is in."""
    folder = naming.output / Path(job.key).parent
    return os.path.realpath(folder) == os.path.realpath(job.source.parent) and naming.repeat == 1


def without_earlier_results(found: Mapping[str, Job], named: Collection[str], naming: Naming) -> list[Job]:
    """The jobs found, by absolute path, less files like a_x2.png beside a.png: what an earlier run put there.

    Only where results go beside their inputs; files that the user named are no such.
    """
    names = [(path, job.source.stem, f"{job.source.stem}_{job.source.suffix[1:]}") for path, job in found.items()]
    stems = {(os.path.dirname(path), stem) for path, *both in names for stem in both}
    kept = []
    for path, job in found.items():
        mark = re.fullmatch(r"(.+)_(?:x[\d.]+|\d+px)", job.source.stem)
        earlier = mark and (os.path.dirname(path), mark[1]) in stems and _is_beside(job, naming)
        if not earlier or path in named:
            kept.append(job)
    return kept


def _to_file(job: Job, output: Path) -> Job:
    """`job` with the target that the user named."""
    if job.error:
        return job
    form, side = formats.probe(job.source)[2], max(job.out_height, job.out_width)
    if not formats.WRITABLE[output.suffix.lower()].holds(form, side):
        return replace(
            job, error=f"{output.suffix} cannot hold its transparency, 16 bits, colours or {side} px; use .png"
        )
    return replace(job, target=output)


def _in_sample(target: Path, naming: Naming, repeat: int) -> Path:
    """`target` moved to the folder of one repeat: output/sample0/..., output/sample1/..."""
    in_sample = naming.output / f"sample{repeat}"
    return in_sample / target.relative_to(naming.output) if naming.repeat > 1 else target


def _without_results(jobs: list[Job]) -> list[Job]:
    """`jobs` less those whose image is what another one writes."""
    makers = {os.path.realpath(job.target): job.source for job in jobs if job.target is not None}
    return [job for job in jobs if makers.get(os.path.realpath(job.source), job.source) == job.source]


def _check_targets(jobs: list[Job], others: list[Job]) -> None:
    """Refuse results that would replace an input or one of the `others`, or each other."""
    sources = {os.path.realpath(job.source) for job in [*jobs, *others]}
    seen: dict[str, Job] = {}
    for job in jobs:
        if job.target is None:
            continue
        if os.path.realpath(job.target) in sources:
            own = os.path.realpath(job.target) == os.path.realpath(job.source)
            kept = "" if own else ", or --skip-existing if it is the result of an earlier run"
            raise UserError(f"{job.target} would replace an input: use another --output or --suffix{kept}")
        other = seen.setdefault(ONE_NAME(str(job.target)), job)
        if other is not job:
            raise UserError(f"{other.source} and {job.source} would both become {job.target}: restore them separately")
