"""The flags of `scripts/infer.py`. Nothing heavy is imported here: --help and mistakes must show at once.

Names follow the habits of the field (Real-ESRGAN's short flags), with the names of CCSR's and SeeSR's scripts beside
them.
"""

import argparse
from pathlib import Path
from typing import Any

from consissr.config.loading import find_config, load_config
from consissr.config.machine import check_place
from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError

SAMPLER_FLAGS = (
    "guidance", "positive", "negative", "start", "color_fix", "fidelity", "color_strength", "tile", "tile_overlap",
    "vae_tile",
)  # fmt: skip
SETTINGS = ("seed", "batch_size", "quality", "save_steps", "frames", "metadata")
"""Of batch.Settings."""
MADE_WITH = ("model", "base", "scale", "longest_side", "precision", *SAMPLER_FLAGS, "plan", "steps", "t_max", "t_min")
"""What --metadata settings writes down, where it was given."""
PLAN_FLAGS = ("plan", "steps", "t_max", "t_min")


def tile_size(text: str) -> int:
    """Pixels of a tile, or "auto" (-1 in the configuration)."""
    value = -1 if text == "auto" else int(text)
    if value < -1:
        raise argparse.ArgumentTypeError(f"{value} is negative: use pixels, 0 (off) or auto")
    return value


def parser(description: str) -> argparse.ArgumentParser:
    """All flags; those of the sampler default to None, which means: as the model says."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = p.add_argument_group("files")
    add = files.add_argument
    add("-i", "--input", nargs="+", required=True, help="files, folders, patterns, .txt lists of files; or one film")
    add(
        "-o",
        "--output",
        "--output_dir",
        type=Path,
        default=Path("results"),
        help="folder, or a file for one input (%(default)s)",
    )
    add("--recursive", action="store_true", help="search sub-folders, and keep them")
    add("--skip-existing", "--skip_if_exist", action="store_true", help="keep results, also those beside inputs")
    add("--overwrite", action="store_true", help="replace results that exist (inputs never)")
    add("--suffix", help="added to names (default: none, or _x4 and the like beside the inputs)")
    add(
        "--ext",
        default="auto",
        choices=("auto", "png", "jpg", "webp", "tif", "avif", "jxl"),
        help="format of results (%(default)s: the input's; png where that format cannot hold them)",
    )
    add("--quality", type=int, default=95, help="of JPEG, WebP, AVIF and JPEG XL results (%(default)s)")
    add(
        "--metadata",
        default="keep",
        choices=("keep", "strip", "settings"),
        help="EXIF and XMP: keep, strip, or keep and add how the picture was restored (%(default)s); profiles stay",
    )
    add(
        "--repeat",
        "--sample_times",
        type=int,
        default=1,
        metavar="N",
        help="restore N times with different noise, to sample0 ...",
    )
    add("--json", type=Path, metavar="LOG", help="append one JSON object per image to this file")
    add("--dry-run", action="store_true", help="print settings and what would be written; load nothing")
    add("-q", "--quiet", action="store_true", help="print failures only")
    model = p.add_argument_group("model and result")
    add = model.add_argument
    add(
        "-m",
        "-n",
        "--model",
        "--model_path",
        default="nano-ccsr",
        help="nano-ccsr, nano-consissr, ccsr-v2, ccsr-v1, consissr, a folder, checkpoint or hub id (%(default)s)",
    )
    add("--base", help="where the model's base is: name, folder, file or hub id (default: as the model says)")
    add("-s", "--scale", "--outscale", "--upscale", type=float, default=4.0, help="any factor (%(default)g)")
    add("--longest-side", type=int, metavar="PX", help="size of results instead of --scale")
    add("--seed", type=int, default=0, help="of the noise; each image has its own (%(default)s)")
    add(
        "--frames",
        action="store_true",
        help="the inputs are frames of a film: the same noise for all, less flicker (a film's always)",
    )
    add("--color-fix", "--color_fix_type", choices=("adain", "wavelet", "none"), help="colours from the input")
    add("--fidelity", type=float, metavar="F", help="0 to 1: how closely results keep to their inputs (1: as trained)")
    add("--color-strength", type=float, metavar="F", help="0 to 1, of the colour transfer (default: as --fidelity)")
    add("--save-steps", action="store_true", help="also write the picture that each sampling step expects")
    sampler = p.add_argument_group("sampling (default: as the model says)")
    add = sampler.add_argument
    add("--config", type=Path, metavar="YAML", help="settings in place of the model's (configs/*/infer*.yaml)")
    add("--plan", choices=("nuts", "ddpm"), help="CCSR's non-uniform timesteps, or evenly spaced ones")
    add(
        "--steps",
        "--num_inference_steps",
        type=int,
        metavar="T",
        help="how many evaluations; with --plan, --t-max or --t-min: how many steps nuts' grid has",
    )
    add("--t-max", "--t_max", type=float, help="nuts: where uniform steps begin, 0 to 1")
    add("--t-min", "--t_min", type=float, help="nuts: where sampling ends, 0 to 1")
    add("--start", "--start_point", choices=("lq", "noise"), help="first latent: the noised input, or noise")
    add("--guidance", "--guidance_scale", type=float, help="scale of the text guidance; 1 is off")
    add("--positive", "--prompt", metavar="TEXT", help="positive prompt")
    add("--negative", "--negative_prompt", metavar="TEXT", help="negative prompt")
    machine = p.add_argument_group("machine")
    add = machine.add_argument
    add(
        "-t",
        "--tile",
        "--tile_size",
        type=tile_size,
        metavar="PX",
        help="diffusion tiles, pixels of the result; 0 off, auto",
    )
    add("--tile-overlap", type=tile_size, metavar="PX", help="how far they overlap")
    add("--vae-tile", type=tile_size, metavar="PX", help="autoencoder tiles; 0 off, auto")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="auto: bf16 where computed fast")
    add("--batch-size", type=int, default=1, metavar="N", help="images of equal size restored together (%(default)s)")
    add("--compile", action="store_true", help="torch.compile the networks: slow start, then faster")
    return p


def check(args: argparse.Namespace) -> None:
    """What is wrong with the flags whatever the files and the model. Raises UserError."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} is out of range: use at least 1")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality} is out of range: use 1 to 100")
    if args.json:
        check_place(args.json, "--json")
        if args.json.is_file():
            with args.json.open("rb") as earlier:
                if earlier.read(1) not in (b"", b"{"):
                    raise UserError(f"--json {args.json}: exists and is no log of earlier runs; name another file")
    SamplerConfig(**sampler_settings(args) | given(args, PLAN_FLAGS))  # checks its values


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict:
    """The flags among `names` that were set."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampler's fields that stand in the file of --config, and over them the flags; the rest is the model's.

    Raises UserError for a file that is no sampler's.
    """
    settings = {}
    if args.config:
        from omegaconf import OmegaConf

        config = load_config(SamplerConfig, args.config)
        settings = {name: getattr(config, name) for name in OmegaConf.load(find_config(args.config))}
    return settings | given(args, SAMPLER_FLAGS)
