"""A page in the browser that restores photographs: drop them, compare before and after, download.

  python scripts/demo.py                                       for this machine only
  python scripts/demo.py --model runs/mine                     offers a model of yours, too
  python scripts/demo.py --host 0.0.0.0 --max-upload 50        for everyone who reaches this machine

Needs the extra `demo`. Nothing is loaded from outside but a full-size model that is chosen and not here yet. Uploads
and results are removed when their page is closed, and all when the server ends (Ctrl-C).
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from threading import Event
from typing import Any

from consissr.errors import UserError

ASSETS = files("consissr") / "assets"


def loader(args: argparse.Namespace) -> Callable:
    """load(model, seed, steps, fidelity): the model, one at a time in memory, and the settings of a run."""
    import consissr
    from ccsr.timesteps import plan_of
    from consissr.inference import batch, processes
    from consissr.models.memory import set_heap

    set_heap()
    device, loaded = processes.choose_device(args.device), {}

    def load(model: str, seed: int, steps: int, fidelity: float) -> tuple:
        if model not in loaded:
            loaded.clear()
            loaded[model] = consissr.Restorer.load(model, device, args.precision)
        restorer = loaded[model]
        restorer.sampler = replace(restorer.sampler, fidelity=fidelity)
        return restorer, batch.Settings(seed=seed, plan=plan_of(restorer.sampler, steps) if steps else None)

    return load


def launch(load: Callable, args: argparse.Namespace, root: Path, runs: dict) -> Any:
    """The page, being served. Everything that visitors bring and get lies in `root`; runs: see inference.page."""
    os.environ |= {"GRADIO_TEMP_DIR": str(root), "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs gradio: pip install '.[demo]'") from None
    from consissr.inference.page import page

    demo = page(load, root, runs, args.model)
    theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # its own would be loaded from elsewhere
    script, css = ((ASSETS / name).read_text("utf-8") for name in ("compare.js", "page.css"))
    looks = {"head": f"<script>{script}</script>", "css": css, "theme": theme, "footer_links": []}
    closed = {"share": False, "run_history": False, "enable_monitoring": False, "mcp_server": False, "ssr_mode": False}
    limits = {"max_file_size": args.max_upload * 2**20, "server_name": args.host, "server_port": args.port}
    try:
        demo.launch(prevent_thread_lock=True, quiet=True, **limits, **looks, **closed)
    except OSError:
        raise UserError(
            f"--host {args.host}, --port {args.port or 7860}: not free, or none of this machine's"
        ) from None
    return demo


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a folder, checkpoint or hub id to offer beside the models with names")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--max-upload", type=int, default=100, metavar="MB", help="of one photograph (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, serve until Ctrl-C or SIGTERM; one line and exit status 2 for a mistake in the call."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="consissr-page-", ignore_cleanup_errors=True) as root:
            runs: dict = {}
            demo = launch(loader(args), args, Path(root), runs)
            print(f"{demo.local_url} (Ctrl-C ends it)", flush=True)
            try:
                Event().wait()
            finally:
                demo.close(verbose=False)
                for run in filter(None, runs.values()):
                    run.close(patience=10)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
