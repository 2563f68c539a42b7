"""A fixed synthetic test set: crops of photographs, their degraded partners, and a record of how they were made."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from consissr.config.data import DataConfig
from consissr.data.datasets import PhotoDataset
from consissr.data.degradation import check_size, degrade
from consissr.data.settings import preset
from consissr.errors import UserError
from consissr.images.rgb8 import to_pil

LONGEST = 200
"""Bytes of a source's name that its crops keep: file systems take 255."""


def write_testset(
    paths: Sequence[str],
    output: Path,
    count: int = 0,
    crop: int = 512,
    name: str = "ccsr",
    seed: int = 0,
    progress: Callable[[Sequence], Sequence] = lambda numbers: numbers,
) -> dict:
    """Write HR/*.png [crop x crop], LR/*.png [crop/scale x crop/scale] and testset.json below `output`.

    count: number of crops, 0 for one of each image; name: the degradation's preset. Crop number n and its degradation
    depend on (seed, n) and on the list of images alone; images that cannot be used are replaced and recorded.
    Returns the record. Raises UserError for an output that exists, and for settings that cannot be.
    """
    config = preset(name)
    check_size((crop, crop), config)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists and is not empty: name another, a test set is never changed")
    dataset = PhotoDataset(DataConfig(paths=list(paths), crop=crop, flips="none", cache_mb=0), seed)
    for folder in ("HR", "LR"):
        (output / folder).mkdir(parents=True, exist_ok=True)

    entries = []
    for n in progress(range(count or len(dataset))):
        sample = dataset[n]
        stem = os.fsencode(Path(sample["name"]).stem)[:LONGEST].decode(errors="ignore")
        file = f"{n:04}_{stem}.png"
        lq, _ = degrade(sample["hq"][None], config, [sample["seed"]])
        to_pil(sample["hq"][None]).save(output / "HR" / file)
        to_pil(lq).save(output / "LR" / file)
        entries.append({"file": file, "source": sample["name"], "degradation_seed": sample["seed"]})
    record = {
        "seed": seed,
        "crop": crop,
        "preset": name,
        "degradation": dataclasses.asdict(config),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "unusable": {Path(label).name: reason for label, reason in dataset.skipped.items()},
        "images": entries,
    }
    (output / "testset.json").write_text(json.dumps(record, indent=1) + "\n")
    return record
