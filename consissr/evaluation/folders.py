"""From folders to pairs of images. Anything that does not pair is an error that names the files; nothing is skipped."""

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consissr.errors import UserError
from consissr.evaluation.provenance import files_below
from consissr.images import formats

if TYPE_CHECKING:
    import torch

EXTENSIONS = tuple(sorted(formats.READABLE))
STEPS = "_steps"  # ending of the folders NAME.png_steps that `infer.py --save-steps` writes beside its results
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
    """Image files below `folder`, by path without extension; what is hidden and step pictures are left out."""
    if not (files := _image_files(folder)):
        raise UserError(f"{folder} holds no image that can be read, such as .png or .jpg")
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    twins = [stem for stem, count in Counter(stems).items() if count > 1]
    if twins:
        raise UserError(f"{folder} holds {some(twins)} in more than one format; keep one file per image")
    return dict(zip(stems, files, strict=True))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    endings = tuple(f"{ending}{STEPS}" for ending in EXTENSIONS)
    return [
        path for path in files_below(folder)
        if path.suffix.lower() in EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(part.lower().endswith(endings) for part in path.relative_to(folder).parts[:-1])
    ]  # fmt: skip


def list_runs(folder: Path) -> list[Path]:
    """`folder` itself, or its sub-folders sample0, sample1, ... when it has them (repeated runs, in order).

    Raises UserError where a number is left out, and where images lie beside these sub-folders.
    """
    files = [path.relative_to(folder) for path in _image_files(folder)]
    numbered = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := re.fullmatch(r"sample(\d+)", path.name))
    }
    if numbered and sorted(numbered) != list(range(len(numbered))):
        raise UserError(f"{folder} has runs {sorted(numbered)}; they must count sample0, sample1, ... without a gap")
    strays = [str(file) for file in files if not re.fullmatch(r"sample\d+", file.parts[0])]
    if numbered and strays:
        raise UserError(f"{folder} has images beside its runs sample0, ...: {some(strays)}; move them elsewhere")
    return [numbered[index] for index in sorted(numbered)] or [folder]


def named(argument: str) -> tuple[str, str]:
    """`NAME=PLACE` or `PLACE` -> name ("" for none) and place.

    Both may hold more signs, as TALA(gamma=10) and epoch=3.ckpt do: the place is the longest end that exists.
    """
    ends = [i + 1 for i, sign in enumerate(argument) if sign == "="]
    start = next((end for end in (0, *ends) if os.path.exists(argument[end:])), ends[-1] if ends else 0)
    return argument[: max(start - 1, 0)], argument[start:]


def parse_methods(arguments: list[str]) -> dict[str, Path]:
    """`FOLDER` or `NAME=FOLDER` -> folders by name; the name of a bare folder is its last part."""
    methods: dict[str, Path] = {}
    for argument in arguments:
        name, folder = named(argument)
        name = name or Path(folder).resolve().name
        if name in methods:
            raise UserError(f"two result folders are called '{name}': write NAME=FOLDER")
        methods[name] = Path(folder)
    return methods


def pair(folders: dict[str, Path], hr: Path | None, lr: Path | None, unranked: Collection[str] = ()) -> Pairs:
    """Check every folder against HR (or against the first result folder) and return the pairs.

    unranked: names of folders whose methods are left out of ranks.

    Raises UserError with one line per problem: missing and surplus names, files that cannot be read, a format that
    differs from its folder's other files, sizes that differ from HR's.
    """
    check_unranked(unranked, folders)
    runs = {name: [Listing(run) for run in list_runs(folder)] for name, folder in folders.items()}
    reference = Listing(hr, f"HR {hr}") if hr else next(iter(runs.values()))[0]
    inputs = Listing(lr, f"LR {lr}") if lr else None
    results = [listing for own in runs.values() for listing in own]
    problems = [*reference.problems(), *(p for result in results for p in result.problems(reference))]
    problems += inputs.problems(reference, results=False) if inputs else []
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    methods = []
    for name, own in runs.items():
        jpeg = any("JPEG" in listing.formats.values() for listing in own)
        note = "results are JPEG files: every value includes the loss of that format" if jpeg else ""
        methods.append(Method(name, [listing.files for listing in own], note, name not in unranked))
    files = reference.files if hr else None
    return Pairs(methods, sorted(reference.files), files, inputs.files if inputs else None, reference.sizes)


class Listing:
    """The image files of a folder by name, their sizes (width and height, after EXIF rotation) and formats."""

    def __init__(self, folder: Path, label: str = "") -> None:
        self.label = label or str(folder)
        self.files = list_images(folder)
        self.sizes: dict[str, tuple[int, int]] = {}
        self.formats: dict[str, str] = {}
        self.unreadable: list[str] = []
        for name, path in self.files.items():
            try:
                with formats.opened(path) as image:
                    self.sizes[name], self.formats[name] = formats.size_as_seen(image, path), image.format
            except UserError as error:
                self.unreadable.append(str(error))

    def problems(self, reference: "Listing | None" = None, results: bool = True) -> list[str]:
        """What is wrong with these files, and what does not pair with `reference`: a line each.

        results: whether they must be of one format and of the reference's sizes.
        """
        problems, counts = list(self.unreadable), Counter(self.formats.values()).most_common()
        if results and len(counts) > 1:
            odd = [name for name, kind in self.formats.items() if kind != counts[0][0]]
            kinds = "/".join(kind for kind, _ in counts[1:])
            problems.append(f"{self.label}: {some(odd)} is {kinds} among {counts[0][0]} files; save all of them as PNG")
        if reference is None or reference is self:
            return problems
        theirs, wanted = reference.label, reference.files
        if missing := sorted(wanted.keys() - self.files.keys()):
            problems.append(
                f"{self.label} lacks {len(missing)} of the {len(wanted)} images of {theirs}: {some(missing)}"
            )
        if surplus := sorted(self.files.keys() - wanted.keys()):
            many = len(surplus)
            problems.append(f"{self.label} has {many} images without a partner in {theirs}: {some(surplus)}")
        common = sorted(self.sizes.keys() & reference.sizes.keys()) if results else []
        if wrong := [name for name in common if self.sizes[name] != reference.sizes[name]]:
            own, size = ("x".join(map(str, listing.sizes[wrong[0]])) for listing in (self, reference))
            told = f"{some(wrong)} has size {own}, but {size} in {theirs}; compare images of equal size"
            problems.append(f"{self.label}: {told}")
        return problems


def read_image(path: Path) -> "torch.Tensor":
    """An image file as RGB (1, 3, H, W) in [0, 1]; 8-bit samples come back as exactly k / 255."""
    from consissr.images import codec

    photo = codec.read(path)
    if photo.form.bits == 8:
        return codec.to_uint8(photo.pixels)[None].float() / 255
    return (photo.pixels[None] + 1) / 2


def check_unranked(unranked: Collection[str], names: Collection[str]) -> None:
    """Raises UserError where one of `unranked` is no method's name."""
    if unknown := [name for name in unranked if name not in names]:
        raise UserError(f"no result folder is called '{unknown[0]}', which is not to be ranked: {', '.join(names)}")


def check_images(chosen: Collection[str], images: Collection[str]) -> None:
    """Raises UserError where one of `chosen` is no image's name."""
    if unknown := [name for name in chosen if name not in images]:
        example = next(iter(images))
        raise UserError(f"there is no image '{unknown[0]}'; names come without extension, for instance {example}")


def check_exchanged(hr: Path, lr: Path, large: dict[str, tuple[int, int]], small: dict[str, tuple[int, int]]) -> None:
    """Raises UserError where HR's images (sizes `large` by name) are smaller than LR's (`small`)."""
    if all(max(large[name]) < max(small[name]) for name in large):
        raise UserError(f"HR {hr}: its images are smaller than those of LR {lr}: were the two folders exchanged?")


def some(names: list[str]) -> str:
    """The first of `names` and how many more there are, as text."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
