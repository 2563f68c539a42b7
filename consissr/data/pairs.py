"""Low-quality partners of photographs, by name."""

import os
from collections.abc import Sequence
from itertools import product

from consissr.data.listing import Photos, list_photos
from consissr.data.photo import PhotoFile
from consissr.errors import UserError

KNOWN = (
    ("NAME", "NAMEx4"),
    ("NAME", "NAMEx2"),
    ("NAME_HR", "NAME_LR4"),
    ("NAME_HR", "NAME_LR2"),
    ("NAME_HR", "NAME_LR"),
)
"""How data sets name pairs: DIV2K and LSDIR, RealSR version 3; what messages suggest."""


def check_names(names: Sequence[str]) -> None:
    """UserError unless `names` are the two patterns of an HQ and an LQ name, each with NAME."""
    if len(names) != 2 or any(name.count("NAME") != 1 for name in names):
        raise UserError(f"data.pair_names is {list(names)}: give an HQ and an LQ name, such as [NAME_HR,NAME_LR4]")


def relative(photos: Photos, shared: bool = False) -> dict[PhotoFile, str]:
    """Names; whole paths, which text lists may give, below the folder that all share; if `shared`, all names so."""
    names = {photo: photo.name for photo in photos}
    whole = sum(map(os.path.isabs, names.values()))
    if whole != len(names) and (whole or not shared):
        return names
    try:
        root = os.path.commonpath([os.path.dirname(name) for name in names.values()])
    except ValueError:  # two drives of Windows share no folder
        return names
    return {photo: os.path.relpath(name, root or ".") for photo, name in names.items()}


def keyed(photos: Photos, pattern: str, shared: bool) -> dict[PhotoFile, str]:
    """What NAME stands for in the name of each image that matches `pattern`."""
    return {
        photo: key for photo, name in relative(photos, shared).items() if (key := common(name, pattern)) is not None
    }


def common(path: str, pattern: str) -> str | None:
    """What NAME stands for in a file name without extension, with its folder; None where it does not match."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    before, after = pattern.split("NAME")
    if not name.startswith(before) or not name.endswith(after) or len(name) < len(before) + len(after):
        return None
    return os.path.join(folder, name[len(before) : len(name) - len(after)])


def pairs(
    photos: Photos, folder: str, names: Sequence[str] = ("NAME", "NAME")
) -> tuple[list[PhotoFile], list[PhotoFile]]:
    """The photographs that are HQ images by their name, and the LQ partner of each, below `folder`.

    names: the HQ and the LQ file name without extension; NAME stands for what both share, as do their sub-folders,
    below the folders that all of one side share if need be (text lists with hq/1.png and lq/1.png). Both may lie in one
    folder. Raises UserError for images without a partner, or with more than one.
    """
    check_names(names)
    theirs = list_photos(folder)
    for shared in (False, True):
        partners: dict[str, list[PhotoFile]] = {}
        for photo, key in keyed(theirs, names[1], shared).items():
            partners.setdefault(key, []).append(photo)
        keys = keyed(photos, names[0], shared)
        if partners.keys() & set(keys.values()):
            break
    if not keys:
        raise UserError(
            f"none of {len(photos)} images, first {photos[0].name}, is named {names[0]}: see data.pair_names"
        )
    wrong = [photo for photo, key in keys.items() if len(partners.get(key, ())) != 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(keys)} images have no single partner of their name in {folder}, first "
            f"{wrong[0].name}{hint(photos, folder, names)}"
        )
    return list(keys), [partners[key][0] for key in keys.values()]


def hint(photos: Photos, folder: str, names: Sequence[str]) -> str:
    """For a message: the known way of naming that fits these files, if one does."""
    theirs = list_photos(folder)
    for known, shared in product(KNOWN, (False, True)):
        keys = set(keyed(photos, known[0], shared).values())
        if known != tuple(names) and keys and keys <= set(keyed(theirs, known[1], shared).values()):
            return f": use data.pair_names=[{','.join(known)}]"
    first = next(iter(relative(theirs).values()))
    return f"; its first file is {first}: data.pair_names says how names differ"
