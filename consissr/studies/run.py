"""A study's work in child processes, in stages: trainings, test images, restorations.

Everything stands in a folder whose name ends in the hash of what it is made of (see evaluation/provenance.py), with the
record beside it: what is there is not made again, and nothing is taken for what was made of something else.
"""

import json
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

from consissr.config.machine import cores
from consissr.errors import UserError
from consissr.evaluation import provenance
from consissr.evaluation.folders import list_images, list_runs, pair
from consissr.evaluation.progress import EVERY, duration
from consissr.evaluation.workers import end_with_parent
from consissr.images import codec
from consissr.studies.spec import Study
from consissr.weights.base import BUNDLED_BASES
from consissr.weights.files import BUNDLED

SETS = ("realsr", "photos")
PHOTOS = {"crop": 256, "preset": "ccsr", "seed": 0}
"""How photographs are degraded: one HR crop of 256 pixels each."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A study and what the command line gives it. The methods name folders, which may not be there yet."""

    study: Study
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
        """Hashes of the photographs to train on, of the sources of the test sets, of the bundled base and towers."""
        base = BUNDLED_BASES["nano"]
        parts = [path for path in base.iterdir() if path.is_dir() and path.name not in BUNDLED]
        parts += base.glob("*/image_encoder")
        return {
            "train": provenance.fingerprint(self.photos / "train"),
            "photos": provenance.fingerprint(self.photos / "val"),
            "realsr": "-".join(provenance.fingerprint(self.realsr / folder) for folder in ("LR", "HR")),
            "bundled": "-".join(provenance.fingerprint(part, provenance.MODEL_FILES) for part in sorted(parts)),
        }

    def test_set(self, name: str) -> Path:
        """LR/ and HR/ of at most `study.images` pairs, evenly chosen."""
        made_of = {"source": self.contents[name], "images": self.study.images, **(PHOTOS if name == "photos" else {})}
        return provenance.folder_of(self.out / "data", name, **made_of)

    def model(self, variant: str, seed: int) -> Path:
        """A variant's model of one training seed."""
        one, start = self.study.variants[variant], self.start(variant, seed)
        made_of = {"parent": yaml.safe_load((self.parents / one.parent).read_text(encoding="utf-8")), "seed": seed}
        made_of |= {"lines": [*self.study.lines, *one.lines, *self.lines], "init": start.name if start else ""}
        made_of |= {"photos": self.contents["train"], "bundled weights": self.contents["bundled"]}
        return provenance.folder_of(self.out / "models", f"{self.study.name}-{variant}-seed{seed}", **made_of)

    def start(self, variant: str, seed: int) -> Path | None:
        """The model that a training starts from: its `init`'s of the same seed, or that one's only seed."""
        init = self.study.variants[variant].init
        if not init:
            return None
        seeds = self.study.seeds_of(init)
        if seed not in seeds and len(seeds) > 1:
            study = self.study.name
            raise UserError(f"study {study}: {variant} has seed {seed}, and {init}, which it starts from, has not")
        return self.model(init, seed if seed in seeds else seeds[0])

    def results(self, row: str, seed: int, name: str) -> Path:
        """A row's results of one training seed and test set."""
        one = self.study.rows[row]
        made_of = {"model": self.model(one.variant, seed).name, "flags": list(one.flags)}
        images, parent = self.test_set(name).name, self.out / "results"
        return provenance.folder_of(parent, f"{self.study.name}-{row}-seed{seed}-{name}", **made_of, images=images)


def is_trained(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and "seconds" in provenance.record(folder)


def is_restored(folder: Path, images: set[str], repeats: int) -> bool:
    """Whether every image stands there in (at least) so many repeats."""
    runs = list_runs(folder)[:repeats] if folder.is_dir() else []
    return len(runs) == repeats and all(images <= {path.stem for path in run.glob("*.png")} for run in runs)


# --- commands ---


@dataclass(frozen=True)
class Command:
    """A command that makes `folder`, whose output goes to a log beside it."""

    name: str
    folder: Path
    words: list[str] = field(compare=False)

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def last_line(self) -> str:
        """What its log ends with: how far it is, or why it failed."""
        text = self.log.read_text(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(text) if line.strip()), "no output")


def stages(work: Work, rows: list[str], restoring: bool = True) -> Iterator[list[Command]]:
    """Lists of commands, to run one list after the other; a training that was stopped goes on from its checkpoint."""
    for trainings in work.study.trainings(rows):
        commands = [training(work, variant, seed) for variant, seed in trainings]
        yield [command for command in commands if command]
    if not restoring:
        return
    for name in SETS:
        write_test_set(work, name)
    chosen = [(row, seed) for row in rows for seed in work.study.seeds_of(work.study.rows[row].variant)]
    commands = [restoration(work, row, seed, name) for row, seed in chosen for name in SETS]
    yield list({command.folder: command for command in commands if command}.values())


def training(work: Work, variant: str, seed: int) -> Command | None:
    """None where the model is there, or what it starts from is not."""
    one, folder, start = work.study.variants[variant], work.model(variant, seed), work.start(variant, seed)
    if is_trained(folder) or (start and not is_trained(start)):
        return None
    own = {"init": str(start or ""), "output_dir": str(folder), "data.paths": [str(work.photos / "train")]}
    lines = [*work.study.lines, *one.lines, *work.lines, f"seed={seed}"]  # names in quotes, as YAML takes them, too
    lines += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()]
    resume = ["--resume", "latest"] if any(folder.glob("checkpoint-*/state.json")) else []
    call = [sys.executable, str(work.scripts / "train.py"), "--config", str(work.parents / one.parent)]
    return Command(f"train {variant}, seed {seed}", folder, [*call, *resume, *lines])


def restoration(work: Work, row: str, seed: int, name: str) -> Command | None:
    """None where the results are there, or the model is not."""
    model, lr = work.model(work.study.rows[row].variant, seed), work.test_set(name) / "LR"
    folder, repeats = work.results(row, seed, name), work.study.repeats
    if not is_trained(model) or is_restored(folder, {path.stem for path in lr.glob("*.png")}, repeats):
        return None
    words = [work.scripts / "infer.py", "-i", lr, "-o", folder, "-m", model, "--repeat", repeats, "--ext", "png"]
    words += ["--skip-existing", "--quiet", *work.study.rows[row].flags]
    return Command(f"restore {row}, seed {seed}, {name}", folder, [sys.executable, *map(str, words)])


def write_test_set(work: Work, name: str) -> None:
    """Make the test set `name` unless it is there."""
    from consissr.data.testset import write_testset

    folder = work.test_set(name)
    if folder.is_dir():
        return
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    if name == "photos":
        write_testset([str(work.photos / "val")], scratch, work.study.images, *PHOTOS.values())
    else:
        images = pair({"HR": work.realsr / "HR"}, work.realsr / "HR", work.realsr / "LR").images
        for part in ("LR", "HR"):
            files = list_images(work.realsr / part)
            for image in images[:: -(-len(images) // work.study.images)]:
                photo = codec.read(files[image])
                codec.write(scratch / part / f"{image.replace('/', '-')}.png", codec.opaque(photo.pixels, photo.form))
    scratch.rename(folder)


def run_commands(commands: list[Command], count: int) -> dict[str, str]:
    """Run commands, `count` at a time, telling how far they are; returns the last line of the log of those that failed.

    An interrupt ends the children (SIGTERM: a training saves its step); so does the end of this process, on Linux.
    """
    waiting, failed = list(reversed(commands)), {}
    running: list[tuple[Command, subprocess.Popen, float]] = []
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // count))}
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                command = waiting.pop()
                with command.log.open("w") as log:
                    process = subprocess.Popen(command.words, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                               start_new_session=True, preexec_fn=end_with_parent)  # fmt: skip
                running.append((command, process, time.monotonic()))
                sys.stderr.write(f"begun: {command.name}; its log: {command.log}\n")
            for command, process, began in [entry for entry in running if entry[1].poll() is not None]:
                running.remove((command, process, began))
                seconds = note_time(command, began, done=process.returncode == 0)
                if process.returncode != 0:
                    failed[command.name] = command.last_line()
                ended = "failed" if command.name in failed else "done"
                sys.stderr.write(f"{ended}: {command.name} ({duration(seconds)}); {len(waiting) + len(running)} left\n")
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                sys.stderr.writelines(f"{command.name}: {command.last_line()}\n" for command, _, _ in running)
            time.sleep(0.1)
    finally:
        for _, process, _ in running:
            process.terminate()
        for command, process, began in running:
            process.wait()
            note_time(command, began, done=False)
    return failed


def note_time(command: Command, began: float, done: bool) -> float:
    """Record the seconds since `began`, added to those of interrupted runs; 'seconds' is there once it is done."""
    spent = round(provenance.record(command.folder).get("spent", 0) + time.monotonic() - began, 1)
    provenance.note(command.folder, spent=spent, **({"seconds": spent} if done else {}))
    return spent
