"""From folders to pairs of images. Anything that does not pair is an error that names the files; nothing is skipped."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from consissr.errors import UserError
from consissr.images import formats

if TYPE_CHECKING:
    import torch

EXTENSIONS = tuple(formats.WRITABLE)
STEPS = "_steps"  # ending of the folders that `infer.py --save-steps` writes beside its results
SHOWN = 3  # file names per message


@dataclass(frozen=True)
class Method:
    """One result folder: its name in tables and, for each run, the files by image name."""

    name: str
    runs: list[dict[str, Path]]
    note: str = ""
    ranked: bool = True
    """Whether it takes part in best, second best and rank (a model of another size does not)."""


@dataclass(frozen=True)
class Pairs:
    """Everything to evaluate. `images` are names without extension, sorted; `hr` and `lr` map them to files."""

    methods: list[Method]
    images: list[str]
    hr: dict[str, Path] | None
    lr: dict[str, Path] | None
    sizes: dict[str, tuple[int, int]]
    """Width and height of each image (HR's, which the results share)."""

    def smaller_than(self, short: int, long: int) -> str:
        """The images whose sides are below `short` and `long` pixels, as text; "" when there are none."""
        names = [name for name in self.images if min(self.sizes[name]) < short or max(self.sizes[name]) < long]
        return some(names) if names else ""


def list_images(folder: Path) -> dict[str, Path]:
    """Image files below `folder`, by path without extension; hidden files and step pictures are left out."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files = [
        path for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")
        and not any(part.endswith(STEPS) for part in path.relative_to(folder).parts[:-1])
    ]  # fmt: skip
    if not files:
        raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    twins = [stem for stem, count in Counter(stems).items() if count > 1]
    if twins:
        raise UserError(f"{folder} holds {some(twins)} in more than one format; keep one file per image")
    return dict(zip(stems, files, strict=True))


def list_runs(folder: Path) -> list[Path]:
    """`folder` itself, or its sub-folders sample0, sample1, ... when it has them (repeated runs, in order)."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    numbered = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := re.fullmatch(r"sample(\d+)", path.name))
    }
    if numbered and sorted(numbered) != list(range(len(numbered))):
        raise UserError(f"{folder} has runs {sorted(numbered)}; they must count sample0, sample1, ... without a gap")
    return [numbered[index] for index in sorted(numbered)] or [folder]


def parse_methods(arguments: list[str]) -> dict[str, Path]:
    """`FOLDER` or `NAME=FOLDER` -> folders by name; the name of a bare folder is its last part."""
    methods: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.rpartition("=")  # names such as TALA(gamma=10) hold one, too
        if not equals or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if name in methods:
            raise UserError(f"two result folders are called '{name}': write NAME=FOLDER")
        methods[name] = Path(folder)
    return methods


def image_sizes(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """Width and height of image files by name, from their headers; UserError for those that cannot be read."""
    problems: list[str] = []
    sizes, _ = _headers(files, problems)
    if problems:
        raise UserError("\n".join(problems))
    return sizes


def pair(folders: dict[str, Path], hr: Path | None, lr: Path | None, unranked: Collection[str] = ()) -> Pairs:
    """Check every folder against HR (or against the first result folder) and return the pairs.

    unranked: names of folders whose methods are left out of ranks.

    Raises UserError with one line per problem: missing and surplus names, files that cannot be read, a format that
    differs from its folder's other files, sizes that differ from HR's.
    """
    if unknown := [name for name in unranked if name not in folders]:
        raise UserError(f"no result folder is called '{unknown[0]}', which is not to be ranked: {', '.join(folders)}")
    runs = {name: [list_images(run) for run in list_runs(folder)] for name, folder in folders.items()}
    hr_files = list_images(hr) if hr else None
    lr_files = list_images(lr) if lr else None
    first = next(iter(folders))
    label, reference = (f"HR {hr}", hr_files) if hr_files else (f"{folders[first]}", runs[first][0])
    problems, notes = [], {}
    sizes, formats = _headers(reference, problems)
    _one_format(label, formats, problems)
    for name, folder in folders.items():
        for index, files in enumerate(runs[name]):
            where = f"{folder}" if len(runs[name]) == 1 else f"{folder}/sample{index}"
            problems += _name_problems(where, files, label, reference)
            own_sizes, own_formats = (sizes, formats) if files is reference else _headers(files, problems)
            _one_format(where, own_formats, problems)
            problems += _size_problems(where, own_sizes, label, sizes)
            if "JPEG" in own_formats.values():
                notes[name] = "results are JPEG files: every value includes the loss of that format"
    if lr_files is not None:
        problems += _name_problems(f"LR {lr}", lr_files, label, reference)
        _headers(lr_files, problems)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    methods = [Method(name, runs[name], notes.get(name, ""), name not in unranked) for name in folders]
    return Pairs(methods, sorted(reference), hr_files, lr_files, sizes)


def read_image(path: Path) -> "torch.Tensor":
    """An image file as RGB (1, 3, H, W) in [0, 1]; 8-bit samples come back as exactly k / 255."""
    from consissr.images import codec

    photo = codec.read(path)
    if photo.form.bits == 8:
        return codec.to_uint8(photo.pixels)[None].float() / 255
    return (photo.pixels[None] + 1) / 2


def _headers(files: dict[str, Path], problems: list[str]) -> tuple[dict[str, tuple], dict[str, str]]:
    """Sizes (after EXIF rotation) and formats by name, from the file headers; unreadable files join `problems`."""
    sizes, formats = {}, {}
    for name, path in files.items():
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                sizes[name], formats[name] = image.size[::-1] if turned else image.size, image.format
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            problems.append(f"{path} cannot be read as an image ({type(error).__name__})")
    return sizes, formats


def _one_format(where: str, formats: dict[str, str], problems: list[str]) -> None:
    counts = Counter(formats.values()).most_common()
    if len(counts) < 2:
        return
    common, odd = counts[0][0], [name for name, kind in formats.items() if kind != counts[0][0]]
    kinds = "/".join(kind for kind, _ in counts[1:])
    problems.append(f"{where}: {some(odd)} is {kinds} among {common} files; save all of them as PNG")


def _name_problems(where: str, files: dict, label: str, reference: dict) -> list[str]:
    missing, surplus = sorted(reference.keys() - files.keys()), sorted(files.keys() - reference.keys())
    problems = []
    if missing:
        problems.append(f"{where} lacks {len(missing)} of the {len(reference)} images of {label}: {some(missing)}")
    if surplus:
        problems.append(f"{where} has {len(surplus)} images without a partner in {label}: {some(surplus)}")
    return problems


def _size_problems(where: str, sizes: dict, label: str, reference: dict) -> list[str]:
    wrong = [name for name in sorted(sizes.keys() & reference.keys()) if sizes[name] != reference[name]]
    if not wrong:
        return []
    size, wanted = ("x".join(map(str, table[wrong[0]])) for table in (sizes, reference))
    return [f"{where}: {some(wrong)} has size {size}, but {wanted} in {label}; compare images of equal size"]


def some(names: list[str]) -> str:
    """The first of `names` and how many more there are, as text."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
