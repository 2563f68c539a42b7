"""The test sets of both papers: what they must hold, and where they come from."""

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation.folders import list_images

STABLESR = "https://huggingface.co/datasets/Iceclear/StableSR-TestSets"
OSEDIFF = "https://github.com/cswry/OSEDiff, folder preset/datasets (LR, HR and OSEDiff's results)"


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """A test set as the papers used it: 128x128 crops and their 512x512 references."""

    __test__ = False  # the name is not pytest's

    name: str
    count: int
    pattern: str
    """Regular expression of the image names without extension; '' where any name does."""
    source: str
    about: str
    lr_side: int = 128
    hr_side: int = 512


TEST_SETS = {
    test_set.name: test_set
    for test_set in (
        TestSet(name="RealSR", count=100, pattern=r"(Canon|Nikon)_0\d\d_LR4", source=f"{OSEDIFF}; {STABLESR}",
                about="real photographs, centre crops (Canon 50, Nikon 50)"),
        TestSet(name="DrealSR", count=93, pattern="", source=f"{OSEDIFF}; {STABLESR}",
                about="real photographs, crops"),
        TestSet(name="DIV2K", count=3000, pattern="", source=STABLESR,
                about="crops of DIV2K's validation images, degraded as Real-ESRGAN does"),
    )
}  # fmt: skip


def check_test_set(name: str, hr: Path | None, lr: Path | None) -> list[str]:
    """What differs from the papers' test set `name`; empty when nothing does."""
    if name not in TEST_SETS:
        raise UserError(f"unknown test set '{name}'{nearest(name, list(TEST_SETS))}")
    if hr is None and lr is None:
        raise UserError(f"--check-dataset {name} checks folders: give --hr, --lr or both")
    test_set = TEST_SETS[name]
    problems, files = [], {}
    for label, folder, side in (("HR", hr, test_set.hr_side), ("LR", lr, test_set.lr_side)):
        if folder is not None:
            files[label] = list_images(folder)
            problems += [f"{label} {folder}: {problem}" for problem in _problems(files[label], test_set, side)]
    if len(files) == 2 and (odd := sorted(files["HR"].keys() ^ files["LR"].keys())):
        problems.append(f"{len(odd)} images are in only one of the folders, for instance {odd[0]}")
    return problems


def _problems(files: dict[str, Path], test_set: TestSet, side: int) -> list[str]:
    problems = []
    if len(files) != test_set.count:
        problems.append(f"{len(files)} images, the papers used {test_set.count}")
    if odd := [name for name in files if not re.fullmatch(test_set.pattern or ".*", name)]:
        problems.append(f"{len(odd)} unexpected names, for instance {odd[0]}")
    wrong = []
    for path in files.values():
        try:
            with Image.open(path) as image:
                if image.size != (side, side):
                    wrong.append(f"{path.name} is {image.width}x{image.height}")
        except OSError as error:
            wrong.append(f"{path.name} cannot be read ({type(error).__name__})")
    if wrong:
        problems.append(f"{len(wrong)} images are not {side}x{side}, for instance {wrong[0]}")
    return problems
