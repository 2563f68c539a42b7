"""A study's work in child processes: test images, trainings, restorations. What is done is not done again.

OUT/data/{realsr,photos}/{LR,HR}                the test images, shared by all studies; source.txt: of which folder
OUT/<study>/models/<variant>[-seed2]/           model folders, with study.json once they are complete
OUT/<study>/results/<row>[-seed2]/<data set>/   sample0 ... ; beside them <data set>.json: how they were made
OUT/<study>/logs/, times.jsonl                  each child's output, and its seconds
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from consissr.config.loading import changed_fields
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.children import Job, threads_each
from consissr.evaluation.folders import list_images, list_runs, pair
from consissr.evaluation.workers import cores
from consissr.nano.config import run_config
from consissr.studies.spec import DATASETS, PLACES, Plan, Results, Training

REALSR = {"count": 12, "crop": 72, "scale": 4}
"""Every eighth of the 100 real pairs, LQ centre crops of 72x72 pixels."""
PHOTOS = {"count": 6, "crop": 288, "preset": "ccsr", "seed": 0}
"""Degraded photographs: HR crops of 288 pixels."""
DONE = "study.json"
SOURCE = "source.txt"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the command line gives to every study."""

    plan: Plan
    scripts: Path
    """Folder of train.py, infer.py and make_testset.py."""
    jobs: int = 2
    photos: Path | None = None
    realsr: Path | None = None
    fast_bf16: bool = False
    """Whether this machine computes bfloat16 fast."""
    overrides: list[str] = field(default_factory=list)
    """key=value for every training (trials)."""

    def precision(self, word: str) -> str:
        """A study's word for the precision of restoring, decided for this machine."""
        return "bf16" if word == "bf16" and self.fast_bf16 else "fp32"

    def command(self, script: str, *words: object) -> list[str]:
        """A call of one of the scripts."""
        return [sys.executable, str(self.scripts / script), *map(str, words)]


# --- test images ---


def data_jobs(setting: Setting) -> list[Job]:
    """Write what is missing of the test images; returns the jobs that are left to run.

    Raises UserError if they are there, but of other folders than those given (where it was recorded).
    """
    data = setting.plan.out / "data"
    for folder, given in ((data / "realsr", setting.realsr), (data / "photos", setting.photos)):
        told = folder / SOURCE
        if given and told.is_file() and (source := told.read_text().strip()) != str(given.resolve()):
            raise UserError(f"{folder} was made of {source}, not of {given}: give that folder, or use another -o")
    if not (data / "realsr").is_dir():
        if setting.realsr is None:
            raise UserError("the study restores real pairs: give their folder (LR/ and HR/) with --realsr")
        centre_crops(setting.realsr, data / "realsr")
    if (data / "photos").is_dir():
        return []
    source, scratch = part_of(setting.photos, "val"), data / ".photos"
    shutil.rmtree(scratch, ignore_errors=True)
    words = [word for name, value in PHOTOS.items() for word in (f"--{name}", value)]
    command = setting.command("make_testset.py", "-i", source, "-o", scratch, *words)

    def keep(_: float) -> None:
        (scratch / SOURCE).write_text(f"{setting.photos.resolve()}\n")
        scratch.rename(data / "photos")

    return [Job("test photographs", command, data / "photos.log", done=keep)]


def part_of(photos: Path | None, name: str) -> Path:
    """photos/train or photos/val."""
    if photos is None:
        raise UserError("studies train on photographs and test on others: give --photos, a folder with train/ and val/")
    if not (photos / name).is_dir():
        raise UserError(f"--photos {photos} has no folder {name}/: it needs train/ and val/")
    return photos / name


def centre_crops(pairs: Path, output: Path) -> None:
    """Centre crops of evenly chosen real pairs, LQ and HR alike, below `output`/LR and /HR; a/b.png becomes a-b.png."""
    scratch, scale = output.with_name(f".{output.name}"), REALSR["scale"]
    shutil.rmtree(scratch, ignore_errors=True)
    lr, hr = list_images(pairs / "LR"), list_images(pairs / "HR")
    found = pair({"HR": pairs / "HR"}, pairs / "HR", pairs / "LR").images
    for name in found[:: max(1, len(found) // REALSR["count"])][: REALSR["count"]]:
        sizes = []
        for part, path, side in (("LR", lr[name], REALSR["crop"]), ("HR", hr[name], REALSR["crop"] * scale)):
            with Image.open(path) as image:
                left, top = (image.width - side) // 2, (image.height - side) // 2
                if min(left, top) < 0:
                    raise UserError(f"{path} is smaller than {side}x{side}: use RealSR's 128 -> 512 pairs")
                (scratch / part).mkdir(parents=True, exist_ok=True)
                target = scratch / part / f"{name.replace('/', '-')}.png"
                image.convert("RGB").crop((left, top, left + side, top + side)).save(target)
                sizes.append(image.size)
        if sizes[1] != (sizes[0][0] * scale, sizes[0][1] * scale):
            raise UserError(f"{hr[name]} is not {scale} times as large as {lr[name]}: use RealSR's 128 -> 512 pairs")
    (scratch / SOURCE).write_text(f"{pairs.resolve()}\n")
    scratch.rename(output)


# --- training ---


def planned(training: Training, overrides: Iterable[str]) -> TrainConfig:
    """The configuration that the training is to run."""
    return run_config(training.config, [*overrides, f"seed={training.seed}"])


def done_record(model: Path | str) -> dict:
    """What `mark` wrote beside a trained model; {} where it is not complete."""
    path = Path(model) / DONE
    return json.loads(path.read_text()) if path.is_file() else {}


def is_trained(training: Training, overrides: Iterable[str] = ()) -> bool:
    """Whether the model is complete.

    Raises UserError if its folder holds a run of another configuration, or one that started from another model than
    its source's (which has been trained anew, or removed to be trained anew).
    """
    told = training.folder / "train.yaml"
    if told.is_file():
        differ = changed_fields(run_config(told), planned(training, overrides), PLACES)
        if differ:
            raise UserError(
                f"{training.folder} was trained with other values of {', '.join(differ)}: remove it, or use another -o"
            )
    record = done_record(training.folder)
    if training.source and "source" in record and record["source"] != done_record(training.source).get("finished", ""):
        raise UserError(
            f"{training.folder} was trained from another {training.after} than the one there: remove it, or use "
            "another -o"
        )
    return bool(record) and (training.folder / "config.yaml").is_file()


def training_jobs(setting: Setting, trainings: dict[str, Training]) -> list[Job]:
    """A job for every training whose model is not complete; one that was stopped goes on from its checkpoint."""
    jobs = []
    for key, training in trainings.items():
        if is_trained(training, setting.overrides):
            continue
        words = [f"output_dir={training.folder}", f"data.paths=[{part_of(setting.photos, 'train')}]"]
        words += [f"seed={training.seed}"]
        after = trainings.get(training.after)
        words += [f"init={after.folder}"] if after else []
        begun = any(training.folder.glob("checkpoint-*/state.json"))
        resume = ["--resume", "latest"] if begun else []
        command = setting.command("train.py", "--config", training.config, *resume, *setting.overrides, *words)
        log = training.folder.parent.parent / "logs" / f"train-{training.folder.name}.log"
        needs = (f"train {after.key}",) if after and not is_trained(after, setting.overrides) else ()
        jobs.append(Job(f"train {key}", command, log, needs, done=partial(mark, training, setting),
                        ended=partial(note, setting, training.study, "train", key)))  # fmt: skip
    return jobs


def mark(training: Training, setting: Setting, seconds: float) -> None:
    """Say that a model is complete."""
    record = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S"), "seconds": round(seconds, 1), "cores": cores()}
    if training.source:
        record["source"] = done_record(training.source).get("finished", "")
    (training.folder / DONE).write_text(json.dumps(record | {"threads": threads_each(setting.jobs)}) + "\n")


def note(
    setting: Setting,
    study: str,
    kind: str,
    name: str,
    seconds: float,
    busy: float | None = None,
    succeeded: bool = True,
) -> None:
    """Add a child's seconds, and those of processor time, to the study's record of time spent."""
    entry = {"kind": kind, "name": name, "seconds": round(seconds, 1), "processor": busy and round(busy, 1),
             "ok": succeeded, "cores": cores(), "threads": threads_each(setting.jobs)}  # fmt: skip
    path = setting.plan.out / study / "times.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


# --- restoring ---


def recipe(results: Results, dataset: str, precision: str) -> dict:
    """How results are made: what must be the same for results that are kept (further repeats may join them)."""
    finished = done_record(results.model).get("finished", "") if results.training else ""
    made = {"model": results.training or results.model, "trained": finished, "flags": list(results.flags),
            "zero_tokens": results.zero_tokens, "precision": precision,
            "save_steps": results.save_steps and dataset == "realsr"}  # fmt: skip
    return made if results.training else made | {"weights": weights_digest(results.model)}


def weights_digest(model: str) -> str:
    """Digest of a model folder's weights and configuration, for models that another training may replace."""
    from consissr.weights.files import find_model

    folder, found = find_model(model), hashlib.sha256()
    for path in sorted([*folder.rglob("*.safetensors"), folder / "config.yaml"]):
        found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def otherwise(results: Results, dataset: str, precision: str = "") -> list[str]:
    """In which keys of `recipe` the record of results differs from what is wanted; [] without a record.

    A key that the record lacks counts as equal (it may be older than the key), and so do pictures of sampling steps
    that nobody asks for; not so lacking `weights`: the bundled model may have been another then. Without `precision`
    the record's own will do.
    """
    if not record_of(results, dataset).is_file():
        return []
    told = json.loads(record_of(results, dataset).read_text())
    wanted = recipe(results, dataset, precision or told["precision"])
    differ = [key for key in wanted if told.get(key, "" if key == "weights" else wanted[key]) != wanted[key]]
    return [key for key in differ if key != "save_steps" or wanted[key]]


def is_restored(results: Results, dataset: str, images: set[str], repeats: int) -> bool:
    """Whether every image stands there in (at least) so many repeats, and the record of how."""
    folder = results.folder / dataset
    if not record_of(results, dataset).is_file() or not folder.is_dir():
        return False
    runs = list_runs(folder)
    complete = [images <= {path.stem for path in run.glob("*.png")} for run in runs[:repeats]]
    return len(complete) == repeats and all(complete)


def record_of(results: Results, dataset: str) -> Path:
    """The file that says how results were made."""
    return results.folder / f"{dataset}.json"


def restoring_jobs(setting: Setting, study: str, rows: Iterable[str], training: list[str]) -> list[Job]:
    """A job for every row, training seed and data set that is not restored; after the `training` that it needs."""
    jobs: dict[str, Job] = {}
    found = setting.plan.study(study)
    repeats, precision = found.repeats, setting.precision(found.precision)
    for results in (r for row in rows for r in setting.plan.results(study, row)):
        for dataset in DATASETS:
            lr, folder = setting.plan.out / "data" / dataset / "LR", results.folder / dataset
            pending = f"train {results.training}" in training
            if results.training and not pending and not (Path(results.model) / DONE).is_file():
                continue  # its training has failed or was not asked for: the report names it
            record = record_of(results, dataset)
            if pending and record.is_file():
                differ = f"{results.training}, which is to be trained anew"
            else:
                differ = ", ".join(otherwise(results, dataset, precision))
            if differ:
                raise UserError(
                    f"{folder} was restored otherwise ({record}: {differ}): remove {results.folder}, or use another -o"
                )
            names = {path.stem for path in lr.glob("*.png")}
            if names and not pending and is_restored(results, dataset, names, repeats):
                continue
            place = Path(*results.folder.parts[-3:]) / dataset  # study/results/row/dataset
            owner = place.parts[0]
            model = str(results.folder / f"model-{dataset}") if results.zero_tokens else results.model
            words = ["-i", lr, "-o", folder, "-m", model, "--skip-existing", "--quiet"]
            words += ["--repeat", repeats, "--precision", precision, *results.flags]
            words += ["--save-steps"] if results.save_steps and dataset == "realsr" else []
            needs = tuple(n for n in (f"train {results.training}", "test photographs") if n in training)
            name = f"restore {owner}/{results.folder.name} {dataset}"
            log = setting.plan.out / owner / "logs" / f"restore-{results.folder.name}-{dataset}.log"
            jobs[name] = Job(name, setting.command("infer.py", *words), log, needs,
                             before=partial(begin, results, dataset, precision),
                             ended=partial(note, setting, owner, "restore", name))  # fmt: skip
    return list(jobs.values())


def begin(results: Results, dataset: str, precision: str) -> None:
    """Record how results are made; and make the model without image tokens where that is what restores."""
    record = record_of(results, dataset)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(recipe(results, dataset, precision)) + "\n")
    if results.zero_tokens:
        from consissr.weights.files import find_model

        without_tokens(find_model(results.model), results.folder / f"model-{dataset}")


def without_tokens(model: Path, copy: Path) -> None:
    """A copy of a model folder whose image adapter puts out zeros: its last layer is cleared."""
    from consissr.weights.files import read_weights, write_weights

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("checkpoint-*", "validation", DONE))
    weights = copy / "image_encoder" / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{model} has no image prompt, whose tokens could be set to zero")
    tensors = read_weights(weights)
    for name in [name for name in tensors if name.startswith("adapter.linear_3.")]:
        tensors[name] = tensors[name] * 0
    write_weights(weights, tensors)
