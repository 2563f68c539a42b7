"""Child processes, several at a time, each with its log file; one that fails is named and the others go on."""

import os
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consissr.errors import UserError
from consissr.evaluation.workers import cores


@dataclass(frozen=True)
class Job:
    """A command to run. `after` names jobs that must have succeeded first."""

    name: str
    command: list[str]
    log: Path
    after: tuple[str, ...] = ()
    before: Callable[[], None] = lambda: None
    """Called just before the command starts; a UserError of it is the job's failure."""
    done: Callable[[float], None] = lambda seconds: None
    """Called with the command's seconds when it has succeeded."""
    ended: Callable[[float, float, bool], None] = lambda seconds, busy, succeeded: None
    """Called whenever it has ended: seconds, seconds of processor time, success."""


def threads_each(jobs: int) -> int:
    """Threads of each of `jobs` processes that run side by side: two of one thread are faster than one of two."""
    return max(1, cores() // jobs)


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def run_jobs(
    jobs: list[Job], count: int, tell: Callable[[str, Job, str], None] = lambda event, job, text: None
) -> dict[str, str]:
    """Run all jobs, `count` at a time; returns the failed ones' names with their log's last line.

    tell(event, job, text): 'started', 'done' or 'failed', as it happens. An interrupt ends the children (SIGTERM: a
    training saves its step) and is raised again.
    """
    waiting, failed = list(jobs), {}
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads_each(count))}
    try:
        while waiting or running:
            open_names = {job.name for job in waiting} | running.keys()
            for job in list(waiting):
                broken = [name for name in job.after if name in failed]
                if broken:
                    waiting.remove(job)
                    failed[job.name] = f"needs {broken[0]}, which failed"
                    tell("failed", job, failed[job.name])
                elif len(running) < count and not open_names & set(job.after):
                    waiting.remove(job)
                    try:
                        job.before()
                    except UserError as error:
                        failed[job.name] = str(error)
                        tell("failed", job, failed[job.name])
                        continue
                    running[job.name] = (job, _start(job, environment), time.perf_counter())
                    tell("started", job, "")
            for name, (job, process, started) in list(running.items()):
                before = processor_seconds()
                if process.poll() is None:
                    continue
                del running[name]
                seconds = time.perf_counter() - started
                job.ended(seconds, processor_seconds() - before, process.returncode == 0)
                if process.returncode == 0:
                    job.done(seconds)
                    tell("done", job, f"{seconds:.0f} s")
                else:
                    failed[name] = last_line(job.log)
                    tell("failed", job, failed[name])
            time.sleep(0.1)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed


def processor_seconds() -> float:
    """Processor time of all children that have been waited for; one child more adds its own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_with_progress(jobs: list[Job], count: int) -> dict[str, str]:
    """`run_jobs` with a bar on the terminal, or lines where there is none; failures are named as they happen."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, running = progress.add_task("", total=len(jobs)), []

        def tell(event: str, job: Job, text: str) -> None:
            if event == "started":
                running.append(job.name)
            elif job.name in running:
                running.remove(job.name)
            if event != "started" or not console.is_terminal:
                console.print(f"{event}: {job.name}" + (f": {text}" if text else ""), markup=False)
            progress.update(task, advance=event != "started", description=", ".join(running))

        return run_jobs(jobs, count, tell)


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:  # a session of its own: an interrupt at the keyboard reaches only the parent
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
