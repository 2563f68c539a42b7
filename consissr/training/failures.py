"""What a run says when it cannot go on, in one line that names the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from consissr.config.training import TrainConfig
from consissr.errors import UserError, compile_errors_in_one_line
from consissr.models.memory import is_out_of_memory
from consissr.training.checkpoints import last_good, list_checkpoints
from consissr.training.checks import depends_on_micro_batch
from consissr.training.processes import Processes


@contextmanager
def step_errors_in_one_line(config: TrainConfig, step: Callable[[], int], world: int) -> Iterator[None]:
    """Makes UserErrors of what stops a step: too little memory, no compiler, and what the system could not do.

    step: called for the number of the step that is being computed.
    """
    try:
        with compile_errors_in_one_line("use compile=false"):
            yield
    except (OSError, SafetensorError) as error:
        good = last_good(Path(config.output_dir))
        again = "use --resume latest" if list_checkpoints(Path(config.output_dir)) else "start again"
        raise UserError(f"step {step()}: {error}; {good}; mend this and {again}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(memory_remedy(config, step(), world)) from error


def memory_remedy(config: TrainConfig, step: int, world: int) -> str:
    """A line on a step that ran out of memory: what was done, and what needs less."""
    c, ways = config, []
    if c.micro_batch > 1:
        ways.append("a smaller one" + ("" if depends_on_micro_batch(c) else " (same result)"))
    if c.stage.removeprefix("nano_") in ("tala", "nuts") and not c.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    if world > 1 and c.engine == "ddp":
        ways.append("engine=zero1")
    remedy = " or ".join(ways) or "a smaller data.crop, or a device with more memory"
    return f"step {step}: out of memory with micro_batch={c.micro_batch}: use {remedy}; {last_good(Path(c.output_dir))}"


def not_finite(
    config: TrainConfig, processes: Processes, step: int, name: str, files: list[str], totals: dict[str, Tensor | float]
) -> UserError:
    """A loss or gradient ("phase/loss", "phase/grad_norm") that is not finite, with all that is needed to find why.

    All processes call this together; files and values are those of the ones where it is not.
    """
    phase, what = name.split("/")
    losses = [key for key in totals if key.startswith(f"{phase}/") and not key.endswith(("/lr", "/grad_norm"))]
    values = {key.split("/")[1]: float(totals[key]) for key in losses} if what == "loss" else float(totals[name])
    reports = processes.gathered((files, values, bool(torch.isfinite(totals[name]))))
    bad = [one for one in reports if not one[2]]
    return UserError(
        f"step {step}: {'loss' if what == 'loss' else 'gradient'} of '{phase}' is not finite ({bad[0][1]}); files: "
        f"{', '.join(file for one in bad for file in one[0])}; {last_good(Path(config.output_dir))}: "
        f"{'resume it' if list_checkpoints(Path(config.output_dir)) else 'start again'} with a lower learning rate"
    )
