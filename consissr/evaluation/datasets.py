"""The test sets of both papers: what they must hold, and where they come from."""

import re
from dataclasses import dataclass
from pathlib import Path

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation.folders import Listing

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
    problems, listings = [], {}
    for label, folder, side in (("HR", hr, test_set.hr_side), ("LR", lr, test_set.lr_side)):
        if folder is not None:
            listings[label] = Listing(folder)
            problems += [f"{label} {folder}: {problem}" for problem in _problems(listings[label], test_set, side)]
    if len(listings) == 2 and (odd := sorted(listings["HR"].files.keys() ^ listings["LR"].files.keys())):
        problems.append(f"{len(odd)} images are in only one of the folders, for instance {odd[0]}")
    return problems


def _problems(listing: Listing, test_set: TestSet, side: int) -> list[str]:
    problems, files = [], listing.files
    if len(files) != test_set.count:
        problems.append(f"{len(files)} images, the papers used {test_set.count}")
    if odd := [name for name in files if not re.fullmatch(test_set.pattern or ".*", name)]:
        problems.append(f"{len(odd)} unexpected names, for instance {odd[0]}")
    sizes = {files[name].name: size for name, size in listing.sizes.items() if size != (side, side)}
    if wrong := [f"{name} is {width}x{height}" for name, (width, height) in sizes.items()] + listing.unreadable:
        problems.append(f"{len(wrong)} images are not {side}x{side}, for instance {wrong[0]}")
    return problems
