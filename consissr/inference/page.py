"""The page of scripts/demo.py: runs over uploads that tell how far they are, their results as HTML, and its layout.

The restoring itself is that of files on the command line (inference.batch). Gradio, which only `page` imports, looks at
annotations: they may not be text here.
"""

import logging
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from consissr.errors import UserError
from consissr.images import codec, formats
from consissr.inference import batch, jobs
from consissr.inference.batch import Outcome
from consissr.weights.base import SD21
from consissr.weights.files import BUNDLED
from consissr.weights.find import here
from consissr.weights.names import published

if TYPE_CHECKING:
    from consissr.restorer import Restorer

MOST = 32
"""Photographs in one run."""
SHOWN = frozenset((".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".webp"))
"""Files that browsers show; of others they get a JPEG copy."""
ZIP = "restored.zip"
SAMPLES = files("consissr") / "assets" / "samples"
FILES = "gradio_api/file="
"""What a file's path is appended to for its address."""
CHOOSE = (
    "element.onclick = e => { const b = e.target.closest('button'); if (b) trigger('select', {number: +b.value}); }"
)

_turn = Lock()  # one run at a time: several would only make each other slow

Load = Callable[[], tuple["Restorer", batch.Settings]]
"""Gives the model, and the settings of a run with it but for the scale."""


def models() -> list[tuple[str, str]]:
    """(label, name) of the models with names: the bundled ones, then the published ones with what they download."""
    choices = [(f"{name} (part of this package)", name) for name in BUNDLED]
    for entry in published().values():
        if entry.name != SD21:
            size = f"about {entry.gigabytes['full']:g} GB, {'once' if entry.sources else 'to be put there by hand'}"
            choices.append((f"{entry.name} ({'on this machine' if here(entry) else size})", entry.name))
    return choices


class StoppedError(Exception):
    """Nobody waits for the results any more."""


@dataclass(frozen=True)
class Told:
    """Where a run is: words, a detail for the eye, the share done (0 to 1; None: it has ended), the outcomes so far."""

    words: str
    detail: str = ""
    share: float | None = None
    outcomes: tuple[Outcome, ...] = ()


class Run:
    """The restoring of uploads in a folder of its own: photographs in in/, results in out/, copies to show in shown/.

    Iterate over it, once: it tells where it is until it has ended, and whatever goes wrong comes as words. Who stops
    iterating stops it. root: where the folder is made; `close` removes it.
    """

    def __init__(self, root: Path, uploads: Sequence[str], scale: float, load: Load) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root, prefix="run-"))
        self.files, self.scale, self.load = [Path(file) for file in uploads], scale, load
        self.stop, self.told, self.outcomes = Event(), SimpleQueue(), []
        self.thread = Thread(target=self._work, daemon=True)

    def __iter__(self) -> Iterator[Told]:
        self.thread.start()
        try:
            yield from iter(self.told.get, None)
        finally:
            self.stop.set()

    def close(self, patience: float | None = None) -> None:
        """End it, which takes until a tile is done (at most `patience` seconds), and remove its files."""
        self.stop.set()
        if self.thread.ident:
            self.thread.join(patience)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _work(self) -> None:
        try:
            self._restore()
        except StoppedError:
            self._end("Stopped.")
        except UserError as error:
            self._say(self._readable(str(error)))
        except Exception as error:  # noqa: BLE001 - a defect: the others' pages go on
            logging.getLogger(__name__).exception("restoring for the page")
            self._say(f"{type(error).__name__}: {error}")
        finally:
            self.told.put(None)

    def _restore(self) -> None:
        if not 0 < len(self.files) <= MOST:
            raise UserError(f"{len(self.files) or 'No'} photographs: add 1 to {MOST}, or choose an example")
        planned = self._planned()
        while not _turn.acquire(timeout=0.5):
            self._say("Waiting for another visitor's photographs ...", share=0)
        try:
            self._say("Loading the model ...", share=0)
            restorer, settings = self.load()
            begin, good = time.monotonic(), [job for job in planned if not job.error]
            at = 0.0  # photographs restored, and the share of the next

            def now(number: float, detail: str = "") -> None:
                nonlocal at
                at, spent = max(at, number), time.monotonic() - begin  # results are written behind, so not in order
                if at > 0.03 * len(planned) and spent > 3:
                    left = spent * len(planned) / at - spent
                    detail += f" (about {left:.0f} s left)" if left < 100 else f" (about {left / 60:.0f} min left)"
                words = f"Restoring photograph {min(int(at) + 1, len(planned))} of {len(planned)}"
                self._say(words, detail, at / len(planned))

            def tell(outcome: Outcome) -> None:
                self._add(outcome)
                if not self.stop.is_set():  # a stopped run ends at the next tile, and what is restored comes after
                    now(len(self.outcomes))

            def on_tile(job: jobs.Job, done: int, number: int, share: float) -> None:
                before = len(planned) - len(good) + good.index(job)
                now(before + share, f"{job.source.name}: tile {done} of {number}")

            now(0)
            settings = replace(settings, scale=self.scale)
            batch.run(restorer, planned, settings, batch.Report(tell=tell, on_tile=on_tile))
        finally:
            _turn.release()
        self._end(f"Done in {time.monotonic() - begin:.0f} s.")

    def _planned(self) -> list[jobs.Job]:
        """A job per upload. What is no image by name is refused here: a .txt would be read as a list of files."""
        (self.folder / "in").mkdir()
        images, others = [], []
        for upload in self.files:
            path, number = self.folder / "in" / upload.name, 1
            while path.exists():
                path, number = path.with_stem(f"{upload.stem} ({number + 1})"), number + 1
            if upload.suffix.lower() not in formats.READABLE:
                others.append(jobs.Job(source=path, key=path.name, error="not a kind of image that is read"))
                continue
            try:
                shutil.copyfile(upload, path)
            except OSError as error:
                raise UserError(f"{upload.name} cannot be read ({error.strerror}): add it again") from None
            images.append(str(path))
        naming = jobs.Naming(output=self.folder / "out", scale=self.scale)
        return (jobs.plan(images, naming) if images else []) + others

    def _add(self, outcome: Outcome) -> None:
        for path in (outcome.job.source, outcome.job.target) if outcome.status == "done" else ():
            if (copy := shown(self.folder, path)) != path:
                with suppress(UserError):  # without it the page shows less, and the result is there all the same
                    codec.write(copy, codec.Photo(codec.read(path).pixels, None, formats.Form()))
        self.outcomes.append(replace(outcome, error=self._readable(outcome.error)))

    def _readable(self, message: str) -> str:
        """A message of the project without this machine's folders and the command line's dashes."""
        return re.sub(r"--(?=[a-z])", "", message.replace(f"{self.folder / 'in'}{os.sep}", ""))

    def _end(self, words: str) -> None:
        """What is restored can be had in one piece, also after a stop."""
        done = [outcome.job.target for outcome in self.outcomes if outcome.status == "done"]
        if len(done) > 1:
            with zipfile.ZipFile(self.folder / ZIP, "w") as file:
                for path in done:
                    file.write(path, path.name)
        self._say(f"{words} {len(done)} of {len(self.files)} restored.")

    def _say(self, words: str, detail: str = "", share: float | None = None) -> None:
        if share is not None and self.stop.is_set():
            raise StoppedError
        self.told.put(Told(words, detail, share, tuple(self.outcomes)))


def shown(folder: Path, path: Path) -> Path:
    """What a browser is given of an image file of a run: itself, or a copy."""
    return path if path.suffix.lower() in SHOWN else folder / "shown" / path.parent.name / f"{path.name}.jpg"


def example_buttons(paths: Sequence[str]) -> str:
    """HTML: a button per picture, whose value is its place in `paths`."""
    names = [Path(path).stem for path in paths]
    return '<p class="examples"><span>Examples</span>' + "".join(
        f'<button value="{number}" aria-label="example: {name}"><img src="{FILES}{quote(path)}" alt=""></button>'
        for number, (path, name) in enumerate(zip(paths, names, strict=True))
    )


def status(told: Told) -> str:
    """HTML: a bar and words. Screen readers are told the words, not each tile."""
    bar = "" if told.share is None else f'<progress max="1" value="{told.share:.3f}" aria-label="done"></progress>'
    return f'<p role="status">{escape(told.words)}</p>{bar}<small>{escape(told.detail)}</small>'


def results(told: Told, folder: Path) -> str:
    """HTML: for every outcome the reason, or the picture to choose, to see beside its original and to download.

    Outcomes only append, so that the page keeps what is being looked at.
    """
    elements, first = [], True
    for outcome in told.outcomes:
        job, name = outcome.job, escape(outcome.job.source.name)
        if outcome.status != "done":
            elements.append(f'<p class="failed" role="alert"><b>{name}</b>: {escape(outcome.error)}</p>')
            continue
        paths = (shown(folder, job.source), shown(folder, job.target), job.target)
        before, after, result = (FILES + quote(path.as_posix()) for path in paths)
        elements.append(
            f'<div class="result"><label><input type="radio" name="shown"{" checked" * first}> {name}</label>'
            f"<small>{job.width}x{job.height} to {job.out_width}x{job.out_height}, {outcome.seconds:.1f} s</small>"
            f'<a href="{result}" download="{escape(job.target.name)}">Download</a><small>{escape(job.note)}</small>'
            f'<compare-images left="{before}" right="{after}" left-label="before" right-label="after"'
            f' width="{job.out_width}" height="{job.out_height}"></compare-images></div>'
        )
        first = False
    if (folder / ZIP).exists():
        elements.append(
            f'<a class="all" href="{FILES}{quote((folder / ZIP).as_posix())}" download>Download all (zip)</a>'
        )
    return "".join(elements)


def page(load: Callable, root: Path, runs: dict, extra: str | None = None) -> Any:
    """The page as gradio's Blocks.

    load: (model, seed, steps, fidelity) -> what a Run loads; root: where uploads lie and results go; runs: the last one
    of each session, kept here; extra: a model to offer beside those with names.
    """
    import gradio as gr

    def arrive(request: gr.Request):
        runs[request.session_hash] = None

    def restore(photographs, scale, model, seed, steps, fidelity, request: gr.Request):
        if last := runs.get(request.session_hash):
            last.close()
        run = runs[request.session_hash] = Run(
            root, photographs or [], scale, lambda: load(model, seed, steps, fidelity)
        )
        for told in run:
            yield status(told), results(told, run.folder)

    def example(chosen: gr.EventData):
        return [samples[chosen.number]]

    def halt(request: gr.Request):
        if run := runs.get(request.session_hash):
            run.stop.set()

    def leave(request: gr.Request):
        if run := runs.pop(request.session_hash, None):
            run.close()
        for upload in [] if runs else root.iterdir():  # several visitors' equal uploads are one file
            shutil.rmtree(upload, ignore_errors=True) if upload.is_dir() else upload.unlink()

    samples = sorted(str(path) for path in SAMPLES.iterdir() if path.suffix in formats.READABLE)
    gr.set_static_paths(samples)
    choices = ([(extra, extra)] if extra else []) + models()
    with gr.Blocks(title="Restore photographs", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown("# Restore photographs\nSmall, blurred, noisy or compressed ones become large and clear.")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                given = gr.File(
                    label="Photographs", file_count="multiple", file_types=sorted(formats.READABLE), height=150
                )
                examples = gr.HTML(example_buttons(samples), js_on_load=CHOOSE)
                model = gr.Dropdown(choices, value=choices[0][1], label="Model")
                scale = gr.Slider(1, 8, 4, step=0.5, label="Scale", info="times larger")
                with gr.Accordion("More settings", open=False):
                    fidelity = gr.Slider(0, 1, 1, step=0.05, label="Fidelity", info="less: more is made up")
                    seed = gr.Number(0, label="Seed", info="of the noise: another one, another result", precision=0)
                    steps = gr.Number(
                        0, label="Steps", info="0: as the model says", precision=0, minimum=0, maximum=1000
                    )
                with gr.Row():
                    start, stop = gr.Button("Restore", variant="primary", scale=3), gr.Button("Stop", min_width=80)
            with gr.Column(scale=2, min_width=320):
                shown = [gr.HTML("Results appear here."), gr.HTML()]
        settings = [given, scale, model, seed, steps, fidelity]
        start.click(restore, settings, shown, show_progress="hidden", concurrency_limit=8)
        stop.click(halt, queue=False)
        examples.select(example, None, given, show_progress="hidden", queue=False)
        demo.load(arrive, queue=False)
        demo.unload(leave)
    return demo.queue(max_size=32)
