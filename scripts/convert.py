"""Turn a model that the papers' authors published into a model folder that scripts/infer.py runs.

  python scripts/convert.py ConsisSR.ckpt models/consissr       ConsisSR's file
  python scripts/convert.py preset/models models/ccsr           CCSR v2: a folder with controlnet/ and vae/
  python scripts/convert.py real-world_ccsr.ckpt models/ccsr1   CCSR v1's file

Which of them SRC is, is read from its keys; every key is accounted for. Nothing stored in a file is executed. The base
model is referred to by name; --base own writes the checkpoint's own beside the result instead.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from consissr.errors import UserError


def read(source: Path, clip: Path | None) -> tuple[str, Any]:
    """What the source is, and its parts through the reader that knows it. `clip`: open_clip's model config."""
    from ccsr import released as ccsr
    from consissr import ldm
    from consissr import released as consissr

    if source.is_dir():
        return "CCSR v2", ccsr.read_v2(source)
    state = ldm.read_state(source)
    if consissr.is_released(state):
        found = consissr.read(state, None if clip is None else json.loads(clip.read_text()))
        return ("ConsisSR" if found.stage == "tala" else "ConsisSR's first stage (RCLIP)"), found
    if ccsr.is_v1(state):
        return "CCSR v1", ccsr.read_v1(state)
    raise UserError(
        f"{source} is neither ConsisSR's nor CCSR's: its first key is '{next(iter(state))}'; give a file of theirs"
    )


def write(kind: str, found: Any, target: Path, base: str, half: bool) -> None:
    """The model folder: parts, configuration with its plan, prompts that only this model's text encoder knows."""
    import torch

    from ccsr.timesteps import with_plan
    from consissr.config import FolderConfig
    from consissr.models.folder import save_base, save_model, save_prompts
    from consissr.models.image_prompt import prompt_config
    from consissr.models.latents import save_latents

    dtype = torch.float16 if half else None
    if base == "own":
        if found.unet is None or found.latents is None:
            raise UserError("--base own: the source has no UNet or autoencoder of its own; name a base instead")
        base = str((target / "base").resolve())
        save_base(target / "base", found.unet, found.latents, dtype)
    prompt = getattr(found, "image_prompt", None)
    config = FolderConfig(model=replace(found.model, base=base), sampler=with_plan(found.sampler))
    save_model(
        target,
        config,
        found.controlnet,
        unet=found.unet,
        latents=found.latents,
        image_prompt=prompt,
        image_settings=None if prompt is None else prompt_config(prompt),
        card=f"# {target.name}\n\nConverted from {kind} as its authors published it; weights under their licence.\n",
        dtype=dtype,
    )
    if found.hint_latents is not None and found.hint_latents is not found.latents:
        save_latents(target / "hint_vae", found.hint_latents, dtype)
    if found.text is not None:
        save_prompts(target, found.text, [found.sampler.positive, found.sampler.negative, ""])


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the authors' checkpoint file, or CCSR v2's folder")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base", default="sd21-base", help="name, folder or hub id, or 'own' (%(default)s)")
    parser.add_argument("--clip", type=Path, help="ConsisSR: open_clip's model config (JSON), if it is not ViT-H-14")
    parser.add_argument("--half", action="store_true", help="store weights in 16 bits")
    args = parser.parse_args(arguments)
    try:
        if args.target.exists():
            raise UserError(f"{args.target} exists: remove it or name another folder")
        if not args.source.exists():
            raise UserError(f"{args.source} does not exist: give the authors' checkpoint file or folder")
        if args.clip is not None and not args.clip.is_file():
            raise UserError(f"--clip {args.clip} does not exist: give open_clip's JSON, or leave it out for ViT-H-14")
        kind, found = read(args.source, args.clip)
        write(kind, found, args.target, args.base, args.half)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.source} is {kind}")
    print("\n".join(found.report.lines()))
    print(f"written to {args.target}; base model: {args.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
