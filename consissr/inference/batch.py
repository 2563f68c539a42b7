"""Restore many files: read ahead, restore, write behind; one bad file never stops the others.

Files are decoded and encoded in threads while the model computes. Images of equal size share a forward pass when
`batch_size` allows. What each image looks like depends on none of this: its noise is named by (seed, key, repeat).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from consissr import __version__
from consissr.errors import UserError
from consissr.images import codec
from consissr.images.codec import Photo, Samples
from consissr.images.geometry import least_side
from consissr.images.inputs import equal_sizes
from consissr.images.metadata import with_settings
from consissr.inference.jobs import Job, memory_checked, reason
from consissr.models.memory import is_out_of_memory, peak_memory_mb

if TYPE_CHECKING:
    from consissr.config.sampler import SamplerConfig
    from consissr.restorer import Restorer

READERS = 2
WRITERS = 2

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Settings:
    """What every image of a run has in common."""

    scale: float = 4.0
    longest: int | None = None
    seed: int = 0
    batch_size: int = 1
    quality: int = 95
    metadata: str = "keep"  # of inputs: keep, strip, or keep and add `made_with` ("settings")
    made_with: dict[str, Any] = field(default_factory=dict)  # what results say of how they were restored
    save_steps: bool = False
    frames: bool = False  # of a film: every image has the same noise
    plan: Sequence[Any] | None = None  # timesteps other than the model's own


@dataclass
class Outcome:
    """What became of one job."""

    job: Job
    status: str  # "done", "skipped" or "failed"
    error: str = ""
    seconds: float = 0.0  # of the model, shared equally within a batch


@dataclass
class Report:
    """Counts the outcomes, and passes each on: to a log (one JSON object per line) and to `tell`."""

    tell: Callable[[Outcome], None] = lambda outcome: None
    on_tile: Callable[[Job, int, int, float], None] = lambda *now: None
    """How far the image under way is: see models.tiles.OnTile."""
    log: TextIO | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What every line of the log has: the seed, and what the model runs on."""
    counts: dict[str, int] = field(default_factory=lambda: {"done": 0, "skipped": 0, "failed": 0})

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.status] += 1
        if self.log:
            try:
                self.log.write(json.dumps(_logged(outcome) | self.about) + "\n")
                self.log.flush()
            except OSError as error:  # results matter more than their log
                log.warning("--json: the log ends here (%s)", error.strerror)
                self.log = None
        self.tell(outcome)


def memory_checked_again(jobs: Iterable[Job], sampler: SamplerConfig) -> list[Job]:
    """Jobs as `memory_checked` leaves them now that is known what the model raises short sides to."""
    side = least_side(sampler.geometry, sampler.short_side)
    return [memory_checked(job, side) if side else job for job in jobs]


def run(restorer: Restorer, jobs: Iterable[Job], settings: Settings, report: Report) -> None:
    """Restore and write every job; each one ends in `report` exactly once."""
    jobs = [replace(job, key="frame") if settings.frames else job for job in jobs]
    for job in jobs:
        if job.error:
            report.add(Outcome(job, "failed", job.error))
    batch_size = 1 if settings.save_steps or settings.frames else settings.batch_size  # a batch's keys must differ
    groups = _groups([job for job in jobs if not job.error], batch_size)
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
        writing: deque[tuple[Outcome, Future]] = deque()
        try:
            for group, futures in _read_ahead(readers, groups, restorer and restorer.device):
                for outcome, samples in _restore_group(restorer, group, futures, settings, report):
                    target, quality = outcome.job.target, settings.quality
                    writing.append((outcome, writers.submit(codec.write_samples, target, samples, quality)))
                while writing and (writing[0][1].done() or len(writing) > 2 * WRITERS * batch_size):
                    _finish(*writing.popleft(), report)
        finally:  # after an interrupt, too, what is restored is written
            readers.shutdown(cancel_futures=True)
            while writing:
                _finish(*writing.popleft(), report)


def _groups(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Jobs that can share a forward pass: equal size, same repeat, at most `batch_size`."""
    alike = [(job.repeat, job.height, job.width) for job in jobs]
    return [[jobs[i] for i in group] for group in equal_sizes(alike, batch_size)]


def _read_ahead(
    readers: ThreadPoolExecutor, groups: list[list[Job]], device: torch.device
) -> Iterator[tuple[list[Job], list[Future]]]:
    """Each group with the futures of its photos; the next group is being read while this one is worked on.

    A GPU that works on pixels gets them as soon as they are read.
    """
    ahead: deque = deque()
    for group in groups:
        ahead.append((group, [readers.submit(codec.read, job.source, device, whole=False) for job in group]))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _restore_group(
    restorer: Restorer, group: list[Job], futures: list[Future], settings: Settings, report: Report
) -> list[tuple[Outcome, Samples]]:
    """What to write of a group; files that turn out damaged, or for which memory runs out, are reported."""
    read: list[tuple[Job, Photo]] = []
    for job, future in zip(group, futures, strict=True):
        try:
            photo = _photo(job, future)
        except Exception as error:  # noqa: BLE001 - whatever a file makes a reader raise concerns this file alone
            report.add(Outcome(job, "failed", _reason(error, job)))
            continue
        if tuple(photo.image.shape[2:]) != (job.height, job.width):
            report.add(Outcome(job, "failed", "changed while the run was going on"))
            continue
        read.append((job, photo))
    return _restore_read(restorer, read, settings, report) if read else []


def _photo(job: Job, future: Future) -> Photo:
    """What was read ahead; once more, for the CPU to hold, where the image before had taken the memory."""
    try:
        return future.result()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return codec.read(job.source, whole=False)


def _restore_read(
    restorer: Restorer, read: list[tuple[Job, Photo]], settings: Settings, report: Report
) -> list[tuple[Outcome, Samples]]:
    """What to write of images of one size; those that fail together are tried alone, and reported if they fail then."""
    begin = time.perf_counter()
    try:
        results = _restore(restorer, read, settings, report)
    except (UserError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise  # a defect of the program
        if len(read) == 1:
            report.add(Outcome(read[0][0], "failed", _reason(error, read[0][0])))
            return []
    else:
        seconds = (time.perf_counter() - begin) / len(read)
        outcomes = [Outcome(job, "done", seconds=seconds) for job, _ in read]
        return list(zip(outcomes, results, strict=True))
    return [done for one in read for done in _restore_read(restorer, [one], settings, report)]


def _restore(restorer: Restorer, read: list[tuple[Job, Photo]], settings: Settings, report: Report) -> list[Samples]:
    """The model on photos of one size; transparency is enlarged beside it."""
    jobs = [job for job, _ in read]
    photos = restorer(
        [photo for _, photo in read],
        scale=settings.scale,
        longest=settings.longest,
        seed=settings.seed,
        keys=[job.key for job in jobs],
        repeat=jobs[0].repeat,
        plan=settings.plan,
        batch_size=len(jobs),
        on_step=_step_writer(restorer, *read[0], settings) if settings.save_steps else None,
        on_tile=lambda *now: report.on_tile(jobs[0], *now),
    )
    # As samples, a fourth of the size: a large result may wait for its predecessor to be written.
    results = []
    for job, photo in zip(jobs, photos, strict=True):
        tagged = replace(photo, form=_with_metadata(photo.form, job, settings))
        results.append(codec.samples_for(job.target, tagged))
    return results


def _with_metadata(form: codec.Form, job: Job, settings: Settings) -> codec.Form:
    """A form with the metadata that its result is to have."""
    if settings.metadata == "strip":
        return replace(form, exif=None, xmp=None)
    if settings.metadata == "settings":
        made_with = settings.made_with | {"seed": settings.seed, "key": job.key, "repeat": job.repeat}
        return replace(form, exif=with_settings(form.exif, made_with, __version__))
    return form


def _step_writer(restorer: Restorer, job: Job, photo: Photo, settings: Settings) -> Callable:
    """Writes what each sampling step expects the result to be, as RGB: <target>_steps/00_t999.png, ...

    One that cannot be made or written is told, and costs neither the result nor its second attempt.
    """
    folder = job.target.with_name(f"{job.target.name}_steps")

    def write(index: int, step: Any, eps: Tensor, x0: Tensor) -> None:
        try:
            for earlier in folder.glob("[0-9]*_t[0-9]*.png") if index == 0 else ():  # of another plan or attempt
                earlier.unlink()
            pixels = restorer.step_picture(x0, photo.image, settings.scale, settings.longest)[0]
            codec.write(folder / f"{index:02d}_t{step.t:03d}.png", Photo(pixels, None, codec.Form()))
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise  # a defect of the program
            log.warning("%s: no picture of step %d (%s)", job.source, index, _reason(error, job))

    return write


def _finish(outcome: Outcome, future: Future, report: Report) -> None:
    try:
        future.result()
    except Exception as error:  # noqa: BLE001 - the others' results must not be lost
        outcome = replace(outcome, status="failed", error=_reason(error, outcome.job))
    report.add(outcome)


def _reason(error: Exception, job: Job) -> str:
    """One line about this file."""
    if isinstance(error, UserError) or not is_out_of_memory(error):
        return reason(error, job)
    size = f"{job.width}x{job.height} to {job.out_width}x{job.out_height}"
    return f"{size}: memory ran out; use --tile or make it smaller"


def _logged(outcome: Outcome) -> dict:
    job = outcome.job
    return {
        "event": "image",
        "status": outcome.status,
        "error": outcome.error,
        "source": os.path.abspath(job.source),
        "target": os.path.abspath(job.target) if job.target else None,
        "size": [job.width, job.height],
        "result_size": [job.out_width, job.out_height],
        "key": job.key,
        "repeat": job.repeat,
        "seconds": round(outcome.seconds, 4),
        "peak_mb": peak_memory_mb(),
    }


def open_log(path: Path, settings: dict[str, Any], jobs: Iterable[Job]) -> TextIO:
    """A log to append to, so that several processes can share it; begins with the settings of the run.

    Raises:
        UserError: the file cannot be written, or is the result of one of the jobs.
    """
    if os.path.abspath(path) in {os.path.abspath(job.target) for job in jobs if job.target}:
        raise UserError(f"--json {path} is a result's name, too: name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); name another file") from None
    try:
        log.write(json.dumps({"event": "run", "version": __version__, "settings": settings}, default=str) + "\n")
        log.flush()
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); name another file") from None
    return log
