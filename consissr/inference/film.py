"""Films: ffmpeg takes them apart into frames, these are restored like any folder, and get the film's sound again."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from consissr.config.machine import check_place, whole
from consissr.errors import UserError
from consissr.images import formats
from consissr.inference.flags import check
from consissr.inference.jobs import Naming
from consissr.inference.processes import numbers

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_VIDEO = {".webm": ("-c:v", "libvpx-vp9", "-b:v", "0", "-crf", "20")}
"""Encoders by suffix; x264 for the others."""
_COLOURS = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")
_SQUARE = "scale=round(iw*max(sar\\,1)):round(ih/min(sar\\,1)),setsar=1"
"""Pixels that are not square (DVD, DV) made so, by the side that grows: frames do not keep their shape."""
_FILTERS = "crop=trunc(iw/2)*2:trunc(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv"
"""Sides that are even, and the matrix that players expect: ffmpeg's own is that of small pictures."""
_SAME_FRAMES = ("output", "skip_existing", "overwrite", "quiet", "json", "dry_run", "frames", "batch_size")
"""Flags with which frames are what they would be without."""


def is_film(inputs: Sequence[str]) -> bool:
    """Whether the input is a film, or several."""
    return all(Path(text).suffix.lower() in SUFFIXES and not os.path.isdir(text) for text in inputs)


def restored(args: Namespace, restore: Callable[[Namespace], int]) -> int:
    """Restore the film that is args.input with `restore`, which does so with a folder of frames; the exit status.

    Frames stand in a folder beside the result until that is whole: the same command with --skip-existing goes on with
    them.

    Raises:
        UserError: several films, no ffmpeg, a film that it does not read, HDR, a result that exists or cannot be.
    """
    check(args)  # and what a Naming checks, before the film is taken apart
    Naming(output=args.output, scale=args.scale, longest=args.longest_side, suffix=args.suffix, repeat=args.repeat)
    if len(args.input) > 1:
        raise UserError(f"{' '.join(args.input)}: films are restored one at a time; name one")
    source = Path(args.input[0])
    target = args.output if args.output.suffix.lower() in SUFFIXES else args.output / source.name
    picture = args.output.suffix.lower() in (*formats.READABLE, *formats.PLUGINS)
    if target != args.output and not args.output.is_dir() and picture:
        raise UserError(f"--output {args.output} is neither a folder nor a film that is written ({' '.join(SUFFIXES)})")
    if args.suffix and target == args.output:
        raise UserError(f"--output {target} is the result's whole name: leave out --suffix")
    target = target.with_stem(target.stem + (args.suffix or ""))
    check_place(target, "--output")
    if os.path.realpath(target) == os.path.realpath(source):
        raise UserError(f"{target} would replace an input: use another --output or --suffix")
    if numbers()[2] > 1 or args.repeat > 1:
        raise UserError(f"{source}: a film is restored once, by one process; give its frames as a folder with --frames")
    if args.save_steps:  # they would go with the frames
        raise UserError(f"{source}: --save-steps is for pictures; give the film's frames as a folder with --frames")
    if target.exists() and not args.overwrite:
        if args.skip_existing:
            return 0
        raise UserError(f"{target} exists: use --overwrite, --skip-existing or another --output")
    rate = frame_rate(source)
    if args.dry_run:
        sys.stdout.write(f"{source} -> {target}, {float(rate):g} frames per second\n")
        return 0

    def say(words: str) -> None:
        if not args.quiet:
            sys.stderr.write(f"{words}\n")

    frames = target.with_name(f"{target.name}_frames")
    begin(frames, source, args)
    made, results = frames / "in", frames / "out"
    if not made.is_dir():
        say(f"{source}: taking it apart into {made} ...")
        part = frames / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        ffmpeg("-i", source, "-map", "0:v:0", "-vf", f"fps={rate},{_SQUARE}", numbered(part))
        part.rename(made)
    of_frames = {"input": [str(made)], "output": results, "ext": "png", "suffix": "", "frames": True}
    if status := restore(Namespace(**vars(args) | of_frames)):
        say(f"{source}: not put together; its frames are in {frames}")
        return status
    say(f"{target}: putting it together ...")
    sound = ("-c:a", "copy") if target.suffix.lower() == source.suffix.lower() else ()
    video = _VIDEO.get(target.suffix.lower(), ("-c:v", "libx264", "-crf", "16"))
    pictures = ("-framerate", str(rate), "-i", numbered(results), "-i", source, "-map", "0:v", "-map", "1:a?")
    with whole(target) as part:
        ffmpeg(*pictures, "-vf", _FILTERS, "-pix_fmt", "yuv420p", *_COLOURS, *video, *sound, part)
    shutil.rmtree(frames)
    return 0


def begin(frames: Path, film: Path, args: Namespace) -> None:
    """Make the folder of frames, with a record of whose they are.

    UserError where it has frames of another film or of other settings, or is none of ours.
    """
    state = film.stat()
    told = {name: value for name, value in vars(args).items() if name not in _SAME_FRAMES}
    told |= {"input": os.path.abspath(film), "bytes": state.st_size, "changed": state.st_mtime_ns}
    text, record = json.dumps(told, default=str, sort_keys=True), frames / "film.json"
    if frames.is_dir() and any(frames.iterdir()) and not record.is_file():
        raise UserError(f"{frames} was not made here: move it away, or use another --output")
    if record.is_file() and record.read_bytes() != text.encode():
        if not args.overwrite:
            raise UserError(f"{frames} has frames of another film or of other settings: remove it, or use --overwrite")
        shutil.rmtree(frames)
    frames.mkdir(parents=True, exist_ok=True)
    record.write_text(text)


def frame_rate(film: Path) -> Fraction:
    """Frames per second, of which ffmpeg rounds television's (30000/1001) to two digits. UserError for no film."""
    said = ffmpeg("-i", film, fails=True)
    video = re.search(r"Stream .* Video: .*?([\d.]+)(k? fps| tbr)", said)
    if not video:
        raise UserError(f"{film}: {'holds no film' if 'Input #0' in said or not said else said.splitlines()[-1]}")
    if "smpte2084" in video[0] or "arib-std-b67" in video[0]:
        raise UserError(f"{film}: its colours are HDR, which frames do not keep; convert it to SDR first")
    rate = Fraction(video[1]) * (1000 if "k" in video[2] else 1)
    television = round(rate * 1001 / 1000) * Fraction(1000, 1001)
    return television if rate.denominator > 1 and abs(rate - television) < Fraction(1, 150) else rate


def numbered(folder: Path) -> Path:
    """The frames of a folder, for ffmpeg: 000001.png, ...; it takes any % of a path for a number's place."""
    return Path(str(folder).replace("%", "%%"), "%06d.png")


def ffmpeg(*arguments: str | Path, fails: bool = False) -> str:
    """Run it; what it says. UserError, with its last line, where it fails, unless that is what is wanted."""
    program = shutil.which("ffmpeg")
    if not program:
        raise UserError("films need ffmpeg: install it, or give a folder of frames with --frames")
    quiet = ("-hide_banner", "-nostdin", "-y") if fails else ("-hide_banner", "-nostdin", "-y", "-v", "error")
    words = [f"file:{word}" if isinstance(word, Path) else word for word in arguments]  # 10:30.mp4 is no protocol
    done = subprocess.run([program, *quiet, *words], capture_output=True, text=True, errors="replace")
    if done.returncode and not fails:
        raise UserError(f"ffmpeg: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stderr.strip()
