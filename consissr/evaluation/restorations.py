"""Restorations that scripts/check_model.py compares: each model's results of each set of images in their own folder."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation import folders, provenance
from consissr.evaluation.progress import track
from consissr.images import codec


def results_folder(output: Path, name: str, weights: Sequence[Path], lr: Path, scale: int = 4) -> Path:
    """Below `output`, a folder for the results of these weights and these images, `scale` times as large.

    name: what the user called the model; weights: where its own and its base's lie.
    """
    told = "-".join(provenance.contents(place, provenance.MODEL_FILES) for place in weights)
    images = provenance.fingerprint(lr, folders.EXTENSIONS)
    made_of = {"model": name, "weights": told, "images": images, "scale": scale}
    return provenance.folder_of(output, Path(name).resolve().name, **made_of)


def testset_folder(output: Path, photos: str, write: Callable[[Path], object]) -> Path:
    """The test set of these photographs below `output`, made by `write(folder)` unless it is there, and whole."""
    folder = provenance.folder_of(output, "testset", photos=provenance.fingerprint(Path(photos)))
    if not (folder / "testset.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
        write(folder)
    return folder


def companions(lr: Path) -> list[list[str]]:
    """Names of the images below `lr` in groups of equal size, of two or three: each has another to take from."""
    by_size: dict[tuple[int, int], list[str]] = {}
    for name, size in folders.Listing(lr).sizes.items():
        by_size.setdefault(size, []).append(name)
    if lone := [names[0] for names in by_size.values() if len(names) == 1]:
        raise UserError(
            f"{lr}: no other image has the size of {folders.some(lone)}, so none can lend its condition: "
            "remove it, or add another"
        )
    groups = []
    for names in by_size.values():
        twos = [names[start : start + 2] for start in range(0, len(names), 2)]
        if len(twos[-1]) == 1:
            twos[-2:] = [twos[-2] + twos[-1]]
        groups += twos
    return groups


def restore(
    restorer: Callable,
    lr: Path,
    folder: Path,
    plan: Sequence | None,
    groups: Sequence[list[str]] = (),
    scale: int = 4,
) -> Path:
    """Every image of `lr` restored into `folder` by the given plan, `scale` times as large; what is there is kept.

    groups: names of images to restore together, for instance `companions`; without, each is restored alone.
    """
    import torch

    files = folders.list_images(lr)
    missing = [
        names for names in groups or [[name] for name in files]
        if not all((folder / f"{name}.png").is_file() for name in names)
    ]  # fmt: skip
    for names in track(f"restoring {folder.name}", missing, len(missing)):
        photos = [codec.read(files[name]) for name in names]
        x = torch.stack([photo.pixels for photo in photos])
        y = restorer(x, scale, keys=names, plan=plan, batch_size=len(names))
        for name, photo, result in zip(names, photos, y, strict=True):
            codec.write(folder / f"{name}.png", codec.opaque(result, photo.form))
    return folder


def told_otherwise(restorer, **changes: Callable) -> None:
    """Let the networks of a `Restorer` be told something else of each batch: `hint` or `image` (tokens), changed."""
    conditions = restorer.conditions

    def changed(condition):
        there = condition.tensors()
        return condition.changed(**{name: change(there[name]) for name, change in changes.items() if name in there})

    restorer.conditions = lambda *args: tuple(one and changed(one) for one in conditions(*args))
