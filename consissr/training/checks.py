"""What can be wrong with a training run before a single weight is loaded. No torch here: mistakes must show at once."""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from consissr.config.loading import changed_fields, load_config, read_word
from consissr.config.training import TrainConfig
from consissr.data.patterns import matching
from consissr.data.settings import preset
from consissr.errors import UserError
from consissr.training.checkpoints import find_checkpoint, list_checkpoints, step_of

log = logging.getLogger(__name__)

FROM_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell each of several processes, beside their number: which one it is, and where they meet."""
FREE = (
    *("output_dir", "steps", "processes", "engine", "timeout", "skip_not_finite", "micro_batch", "precision", "ema"),
    *("frozen_precision", "export_precision", "gradient_checkpointing", "compile", "workers", "tracker", "log_every"),
    *("validate_every", "checkpoint_every", "checkpoint_limit", "data.cache_mb", "data.validation"),
    *("data.validation_lq", "data.validation_count"),
)
"""What may change in mid-run without the run being another one; beside the optimisers' numbers, which then count."""


def check_run(config: TrainConfig, resume: str = "") -> None:
    """Raise UserError for a launch, batch, folder or package that cannot be as `config` and `resume` have it."""
    for error in problems(config, resume):
        raise error


def problems(config: TrainConfig, resume: str = "") -> Iterator[UserError]:
    """Everything that would stop the run, at most one mistake of each kind."""
    checks = (check_launch, check_numbers, check_images, check_models, check_packages, check_degradation)
    for check in (*checks, partial(check_resuming, resume=resume)):
        try:
            check(config)
        except UserError as error:
            yield error


def check_launch(config: TrainConfig) -> None:
    """World size, kind of launch, and whether the global batch divides."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"stage '{config.stage}' does not run under {name}, as no stage does (each fits one GPU): launch with "
                "--config_file configs/accelerate/one_node.yaml or several_nodes.yaml, and engine=zero1 for less memory"
            )
    if min(config.steps, config.batch, config.micro_batch, config.log_every, config.checkpoint_every) < 1:
        raise UserError("steps, batch, micro_batch, log_every and checkpoint_every must be at least 1")
    if config.checkpoint_limit < 1:
        raise UserError(f"checkpoint_limit is {config.checkpoint_limit}: at least 1 checkpoint must be kept")
    accumulation(config, launched())
    if launched() > 1 and (lacking := [name for name in FROM_LAUNCHER if name not in os.environ]):
        raise UserError(
            f"WORLD_SIZE={launched()} is in the environment without {', '.join(lacking)}: unset it to train with one "
            "process, or use torchrun or accelerate launch"
        )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16") or (asked == "bf16" and config.precision == "fp32"):
        raise UserError(
            f"accelerate was asked for mixed_precision={asked}, but the run's config decides, with "
            f"precision={config.precision}: launch with --mixed_precision no"
        )


def check_numbers(config: TrainConfig) -> None:
    """Numbers that would train nonsense in silence, such as a negative clip, which turns gradients round."""
    data = config.data
    rules = [
        ("seed", config.seed, config.seed >= 0, "a whole number from 0 up"),
        ("ema", config.ema, 0 <= config.ema < 1, "a decay below 1, or 0 for no averaged weights"),
        ("timeout", config.timeout, config.timeout > 0, "a number of minutes above 0"),
        ("workers", config.workers, config.workers >= 0, "a number of threads, or 0 for one per core"),
        ("validate_every", config.validate_every, config.validate_every >= 0, "a number of steps, or 0 for never"),
        ("rclip.patch_weight", config.rclip.patch_weight, config.rclip.patch_weight >= 0, "0 or more"),
        ("data.crop", data.crop, data.crop >= 1, "a side in pixels"),
        ("data.pair_pool", data.pair_pool, data.pair_pool >= 0, "a number of pairs, or 0 for no pool"),
        ("deft.perceptual_weight", config.deft.perceptual_weight, config.deft.perceptual_weight >= 0, "0 or more"),
        ("deft.adversarial_weight", config.deft.adversarial_weight, config.deft.adversarial_weight >= 0, "0 or more"),
        ("data.validation_count", data.validation_count, data.validation_count >= 1, "at least 1 image"),
    ]
    for name, c in (("optimizer", config.optimizer), ("deft.optimizer", config.deft.optimizer)):
        rules += [
            (f"{name}.lr", c.lr, c.lr > 0, "a number above 0"),
            (f"{name}.betas", c.betas, [0 <= b < 1 for b in c.betas] == [True] * 2, "two numbers from 0 to below 1"),
            (f"{name}.weight_decay", c.weight_decay, c.weight_decay >= 0, "0 or more"),
            (f"{name}.warmup", c.warmup, c.warmup >= 0, "a number of steps, or 0"),
            (f"{name}.final", c.final, 0 <= c.final <= 1, "a share of lr from 0 to 1"),
            (f"{name}.clip", c.clip, c.clip >= 0, "a largest gradient norm, or 0 to turn clipping off"),
        ]
    for name, value, right, rule in rules:  # no comparison holds for NaN
        if not right:
            raise UserError(f"{name} is {value}: use {rule}")


def launched() -> int:
    """How many processes the launcher says it started."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdigit() or int(told) < 1:
        raise UserError(f"WORLD_SIZE={told} in the environment is no number of processes: unset it, or use torchrun")
    return int(told)


def shared_out(config: TrainConfig, processes: int) -> TrainConfig:
    """`config`; with several processes with the largest micro-batch, up to its own, that divides a process's share.

    And the pool of pairs, where there is one.
    """
    share, rest = divmod(config.batch, processes)
    if rest or share < 1 or processes == 1:
        return config
    whole = math.gcd(share, config.data.pair_pool)  # gcd(share, 0) is share
    micro_batch = next(n for n in range(min(config.micro_batch, whole), 0, -1) if whole % n == 0)
    return config if micro_batch == config.micro_batch else replace(config, micro_batch=micro_batch)


def depends_on_micro_batch(config: TrainConfig) -> bool:
    """Whether images of one micro-batch share more than the step: a contrastive loss, an adaptive weight, draws, a pool
    that pairs wait in."""
    one_draw = config.tala.shared_draw and config.stage.removeprefix("nano_") in ("tala", "nuts")
    shared = config.data.draws == "per_batch" or config.data.pair_pool > 0
    return config.stage in ("clip", "deft", "nano_deft") or shared or one_draw


def accumulation(config: TrainConfig, processes: int) -> int:
    """Micro-batches per optimiser step and process. Raises UserError if the global batch does not divide."""
    if config.processes and config.processes != processes:
        raise UserError(
            f"{processes} process(es) run but processes={config.processes} was asked for: "
            "launch with `accelerate launch --num_processes N` (GPUs) or `torchrun --nproc_per_node N` (CPU)"
        )
    share = config.micro_batch * processes
    if config.batch % share:
        raise UserError(
            f"batch {config.batch} is not a multiple of micro_batch {config.micro_batch} x {processes} process(es): "
            f"use batch={max(1, round(config.batch / share)) * share}"
        )
    return config.batch // share


def check_degradation(config: TrainConfig) -> None:
    """Words of the data pipeline."""
    preset(config.data.degradation)


def check_images(config: TrainConfig) -> None:
    """Whether the photographs named exist; what is in them is looked at later."""
    data = config.data
    if not data.paths:
        raise UserError("no training images: name at least one folder, list or shard in data.paths")
    named = [("data.paths", p) for p in data.paths] + [("data.lq_paths", p) for p in data.lq_paths if p]
    named += [(f"data.{key}", getattr(data, key)) for key in ("validation", "validation_lq") if getattr(data, key)]
    if data.validation_lq and not data.validation:
        raise UserError("data.validation_lq holds partners of data.validation, which is not set")
    for key, text in named:
        place = os.path.expanduser(text)
        if not os.path.exists(place) and not matching(place):
            raise UserError(f"{key}: {text} does not exist: give a folder, a text list, a tar shard or a pattern")


def check_models(config: TrainConfig) -> None:
    """Whether local folders of weights exist."""
    for key, text in (("init", config.init), ("model.base", config.model.base)):
        hub_id = text.partition("@")[0].count("/") <= 1  # or a known name; revisions may have more
        local = text.startswith((".", "/", "~")) or not hub_id
        if local and not os.path.exists(os.path.expanduser(text)):
            raise UserError(f"{key}: {text} does not exist: give the output_dir of an earlier run, or a model folder")


def check_packages(config: TrainConfig) -> None:
    """Optional packages that the config asks for."""
    second = config.deft.optimizer if config.stage.endswith("deft") else config.optimizer
    kinds = {config.optimizer.kind, second.kind}
    if config.engine == "zero1" and "adamw8bit" in kinds:
        raise UserError("engine=zero1 shares out AdamW's own moments: use optimizer.kind=adamw, or engine=ddp")
    wanted = {"wandb": (config.tracker == "wandb", "tracker=tensorboard"),
              "bitsandbytes": ("adamw8bit" in kinds, "optimizer.kind=adamw"),
              "tensorboard": (config.tracker == "tensorboard", "tracker=none")}  # fmt: skip
    for package, (needed, instead) in wanted.items():
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: `pip install {package}`, or set {instead}")


def check_resuming(config: TrainConfig, resume: str) -> None:
    """What `resume` cannot go on with, and the output folder."""
    if resume and config.data.pair_pool:
        raise UserError(
            "data.pair_pool: the pool of pairs is not in checkpoints: resume with data.pair_pool=0 and --allow-changes"
        )
    check_output(config, resume)


def check_changes(config: TrainConfig, resume: str, allowed: bool) -> None:
    """Says what the run that `resume` goes on with had otherwise.

    UserError where that is the stage, seed, batch, data, model or loss, unless `allowed`.
    """
    checkpoint = find_checkpoint(Path(config.output_dir), resume)
    output = checkpoint.parent
    before = output / "train.yaml"
    if (stage := read_word("stage", before)) not in ("", config.stage) and not allowed:
        raise UserError(
            f"{before} is of stage {stage}, this run of {config.stage}: choose another output_dir (to start from the "
            f"result: init={output})"
        )
    try:
        differ = changed_fields(load_config(type(config), before), config, ("output_dir", "data.validation"))
    except UserError as error:
        log.warning("%s cannot be compared with this run's settings: %s", before, error)
        return
    numbers = ("optimizer.", "deft.optimizer.")
    fixed = [n for n in differ if n not in FREE and (n.endswith(".kind") or not n.startswith(numbers))]
    if fixed and not allowed:
        raise UserError(
            f"{before} differs from this run in {', '.join(fixed)}: a run that goes on keeps these; use the same, "
            "choose another output_dir, or give --allow-changes if this is meant"
        )
    if differ:
        step = step_of(checkpoint)
        log.warning("step %d goes on with other settings than before: %s", step, ", ".join(differ))


def check_output(config: TrainConfig, resume: str) -> None:
    """Whether `output_dir` can be written, and holds what `resume` asks for, or nothing that would be lost."""
    output = Path(config.output_dir)
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output_dir {output} cannot be written ({there}): choose another")
    if not resume:
        if list_checkpoints(output) or logged_step(output) >= max(1, config.steps):
            raise UserError(f"{output} holds a run: go on with --resume latest, or choose another output_dir")
        return
    step = step_of(find_checkpoint(output, resume))
    if step > config.steps:
        raise UserError(f"--resume {resume}: {output} is at step {step}, beyond steps={config.steps}: use more steps")
    newer = [str(path) for path in list_checkpoints(output) if step_of(path) > step]
    if newer:
        raise UserError(f"--resume {resume}: newer checkpoints stand beside it: first remove {', '.join(newer)}")


def logged_step(output: Path) -> int:
    """The last step that a run's log tells of; 0 without a log. (A run killed before its first checkpoint has one.)"""
    try:
        return int(json.loads((output / "log.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError):
        return 0
