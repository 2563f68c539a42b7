"""Train one stage.  accelerate launch scripts/train.py --config configs/ccsr/nuts.yaml [key=value ...]

Writes checkpoints, log.jsonl, validation pictures and the result to the config's output_dir.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training.checks import check_changes, check_run, depends_on_micro_batch, launched, shared_out
from consissr.training.lock import claimed


def stage_builder(name: str) -> Callable:
    """The class of a stage. Imported here, late, so that --help stays fast and a stage loads only its own needs."""
    if name in ("rclip", "nano_rclip"):
        from consissr.training.rclip import Rclip as Built
    elif name == "tala":
        from consissr.training.tala import Tala as Built
    elif name == "nuts":
        from ccsr.nuts import Nuts as Built
    elif name == "deft":
        from ccsr.deft import Deft as Built
    elif name == "nano_tala":
        from consissr.nano.stages import NanoTala as Built
    elif name == "nano_nuts":
        from ccsr.nano import NanoNuts as Built
    elif name == "nano_deft":
        from ccsr.nano import NanoDeft as Built
    elif name == "autoencoder":
        from consissr.nano.autoencoder import Autoencoder as Built
    elif name == "clip":
        from consissr.nano.clip import Clip as Built
    elif name == "prior":
        from consissr.nano.prior import Prior as Built
    else:
        raise ValueError(f"stage {name} has no class")
    return Built


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run (see configs/)")
    parser.add_argument("--resume", default="", metavar="latest|PATH", help="continue from a checkpoint")
    parser.add_argument("--allow-changes", action="store_true", help="resume although data, model or losses differ")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, in what memory, from where")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if os.environ.get("RANK", "0") != "0":  # what all processes would say the first one says
        logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("consissr.data").setLevel(logging.WARNING)
    # 1x1 convolutions have two names for one layout
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        config = run_config(options.config, options.overrides)
        if options.dry_run:
            from consissr.training.dry_run import describe

            if os.environ.get("RANK", "0") == "0":
                print("\n".join(describe(config, stage_builder(config.stage))))
            return 0
        shared = shared_out(config, launched())
        if shared.micro_batch < config.micro_batch:
            told = f"{launched()} processes share a batch of {config.batch}"
            told += "; what is learned changes with it" if depends_on_micro_batch(config) else ""
            logging.info("micro_batch=%d in place of %d: %s", shared.micro_batch, config.micro_batch, told)
        config = shared
        check_run(config, options.resume)  # again in Loop, but here before torch is imported
        if options.resume:
            check_changes(config, options.resume, options.allow_changes)
        with claimed(config.output_dir):
            builder = stage_builder(config.stage)

            from consissr.models.fast import set_kernels
            from consissr.training.loop import Loop

            set_kernels(one_size=True)
            folder = Loop(config, builder, options.resume).run()
        if os.environ.get("RANK", "0") == "0":
            logging.info("done: %s", folder)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0" and "torch" not in sys.modules:
            time.sleep(5)  # the first process tells of the same mistake, and the launcher then ends this one
        several = os.environ.get("WORLD_SIZE", "1") != "1"  # another process's bar may stand in the line
        logging.error("%serror: %s", "\n" if several else "", error)
        return 2
    except KeyboardInterrupt:
        logging.error("interrupted: --resume latest goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
