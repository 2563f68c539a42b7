"""A study's work in child processes, in stages: test images, trainings, restorations.

Everything stands in a folder whose name ends in the hash of what it is made of (see evaluation/origin.py), with the
record beside it: what is there is not made again, and nothing is taken for what was made of something else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import origin
from consissr.evaluation.folders import list_images, list_runs, pair
from consissr.evaluation.progress import duration
from consissr.evaluation.workers import cores
from consissr.studies.spec import Study
from consissr.weights.base import BUNDLED_BASES

SETS = ("realsr", "photos")
PHOTOS = {"crop": 256, "preset": "ccsr", "seed": 0}
"""How photographs are degraded: one HR crop of 256 pixels each."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the command line gives to every study."""

    out: Path
    parents: Path
    """Folder of the variants' parent configurations."""
    scripts: Path
    photos: Path
    """Holds train/ to train on and val/ to degrade and restore."""
    realsr: Path
    """Real pairs: LR/ and HR/."""
    jobs: int = 2
    lines: tuple[str, ...] = ()
    """key=value for every training (trials)."""

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of the photographs to train on, of what the test sets are made of, and of the bundled weights."""
        sources = {"train": self.photos / "train", "photos": self.photos / "val"}
        found = {name: origin.fingerprint(source) for name, source in sources.items()}
        found["realsr"] = "-".join(origin.fingerprint(self.realsr / part) for part in ("LR", "HR"))
        return found | {"bundled": origin.fingerprint(BUNDLED_BASES["nano"], origin.MODEL_FILES)}


@dataclass(frozen=True)
class Job:
    """A command that makes `folder`, whose output goes to a log beside it."""

    name: str
    folder: Path
    command: list[str] = field(compare=False)


# --- places: what everything is made of ---


def test_set(setting: Setting, study: Study, name: str) -> Path:
    """Folder with LR/ and HR/ of at most `study.images` pairs, evenly chosen; it may not be there yet."""
    settings = PHOTOS if name == "photos" else {}
    return origin.place(
        setting.out / "data", name, source=setting.contents[name], images=study.images, **settings
    )  # fmt: skip


def model(setting: Setting, study: Study, variant: str, seed: int) -> Path:
    """Folder of a variant's model of one training seed; it may not be there yet."""
    one = study.variants[variant]
    start = _start(setting, study, variant, seed)
    made_of = {"parent": yaml.safe_load((setting.parents / one.parent).read_text(encoding="utf-8")), "seed": seed}
    made_of |= {"lines": [*study.lines, *one.lines, *setting.lines], "init": start.name if start else ""}
    made_of |= {"photos": setting.contents["train"], "bundled weights": setting.contents["bundled"]}
    return origin.place(setting.out / "models", f"{study.name}-{variant}-seed{seed}", **made_of)


def _start(setting: Setting, study: Study, variant: str, seed: int) -> Path | None:
    """Folder of the model that a training starts from: its `init`'s of the same seed, or that one's only seed."""
    init = study.variants[variant].init
    if not init:
        return None
    seeds = study.seeds_of(init)
    if seed not in seeds and len(seeds) > 1:
        raise UserError(f"study {study.name}: {variant} has seed {seed}, and {init}, which it starts from, has not")
    return model(setting, study, init, seed if seed in seeds else seeds[0])


def results(setting: Setting, study: Study, row: str, seed: int, name: str) -> Path:
    """Folder of a row's results of one training seed and test set; it may not be there yet."""
    one = study.rows[row]
    made_of = {"model": model(setting, study, one.variant, seed).name, "flags": list(one.flags)}
    images = test_set(setting, study, name).name
    return origin.place(setting.out / "results", f"{study.name}-{row}-seed{seed}-{name}", **made_of, images=images)


def is_trained(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and "seconds" in origin.record(folder)


def is_restored(folder: Path, images: set[str], repeats: int) -> bool:
    """Whether every image stands there in (at least) so many repeats."""
    runs = list_runs(folder)[:repeats] if folder.is_dir() else []
    return len(runs) == repeats and all(images <= {path.stem for path in run.glob("*.png")} for run in runs)


# --- stages ---


def stages(setting: Setting, study: Study, rows: list[str], restoring: bool = True) -> Iterator[list[Job]]:
    """Lists of jobs to run one list after the other; a training that was stopped goes on from its checkpoint."""
    call = [sys.executable]
    for trainings in study.trainings(rows):
        jobs = []
        for variant, seed in trainings:
            folder, start = model(setting, study, variant, seed), _start(setting, study, variant, seed)
            if is_trained(folder) or (start and not is_trained(start)):
                continue
            one = study.variants[variant]
            lines = [*study.lines, *one.lines, *setting.lines, f"seed={seed}", f"init={start or ''}"]
            lines += [f"output_dir={folder}", f"data.paths=[{setting.photos / 'train'}]"]
            resume = ["--resume", "latest"] if any(folder.glob("checkpoint-*/state.json")) else []
            config = ["--config", str(setting.parents / one.parent)]
            jobs.append(Job(f"train {variant}, seed {seed}", folder,
                            [*call, str(setting.scripts / "train.py"), *config, *resume, *lines]))  # fmt: skip
        yield jobs
    if not restoring:
        return
    for name in SETS:
        write_test_set(setting, study, name)
    jobs = {}
    for row in rows:
        for seed in study.seeds_of(study.rows[row].variant):
            weights = model(setting, study, study.rows[row].variant, seed)
            for name in SETS if is_trained(weights) else ():
                lr, folder = test_set(setting, study, name) / "LR", results(setting, study, row, seed, name)
                if is_restored(folder, {path.stem for path in lr.glob("*.png")}, study.repeats):
                    continue
                words = ["-i", lr, "-o", folder, "-m", weights, "--repeat", study.repeats, "--ext", "png"]
                words += ["--skip-existing", "--quiet", *study.rows[row].flags]
                jobs[folder] = Job(f"restore {row}, seed {seed}, {name}", folder,
                                   [*call, str(setting.scripts / "infer.py"), *map(str, words)])  # fmt: skip
    yield list(jobs.values())


def write_test_set(setting: Setting, study: Study, name: str) -> None:
    """Make the test set `name` unless it is there."""
    from consissr.data.testset import write_testset

    folder = test_set(setting, study, name)
    if folder.is_dir():
        return
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    if name == "photos":
        write_testset([str(setting.photos / "val")], scratch, study.images, *PHOTOS.values())
    else:
        lr, hr = (list_images(setting.realsr / part) for part in ("LR", "HR"))
        names = pair({"HR": setting.realsr / "HR"}, setting.realsr / "HR", setting.realsr / "LR").images
        for part, files in (("LR", lr), ("HR", hr)):
            (scratch / part).mkdir(parents=True)
            for image in names[:: -(-len(names) // study.images)]:
                with Image.open(files[image]) as picture:
                    picture.convert("RGB").save(scratch / part / f"{image.replace('/', '-')}.png")
    scratch.rename(folder)


def run_jobs(jobs: list[Job], count: int) -> dict[str, str]:
    """Run jobs, `count` at a time, telling each one's end; returns the last line of the log of those that failed.

    An interrupt ends the children (SIGTERM: a training saves its step); so does the end of this process, on Linux.
    """
    waiting, failed = list(reversed(jobs)), {}
    running: list[tuple[Job, subprocess.Popen, float]] = []
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // count))}
    try:
        while waiting or running:
            while waiting and len(running) < count:
                job = waiting.pop()
                with _log(job).open("w") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                               start_new_session=True, preexec_fn=_end_with_parent)  # fmt: skip
                running.append((job, process, time.monotonic()))
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                job, process, began = entry
                running.remove(entry)
                seconds = time.monotonic() - began
                if process.returncode == 0:
                    origin.note(job.folder, seconds=round(origin.record(job.folder).get("seconds", 0) + seconds, 1))
                else:
                    text = _log(job).read_text(errors="replace").replace("\r", "\n").split("\n")
                    failed[job.name] = next((line for line in reversed(text) if line.strip()), "no output")
                ended = "failed" if job.name in failed else "done"
                sys.stderr.write(f"{ended}: {job.name} ({duration(seconds)}); {len(waiting) + len(running)} left\n")
            time.sleep(0.1)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
    return failed


def _log(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.log")


def _end_with_parent() -> None:
    """In a child that is about to start: SIGTERM when the parent ends, however it does (Linux)."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
