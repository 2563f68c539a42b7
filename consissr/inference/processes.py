"""One process among those of `torchrun` or `accelerate launch`: its number, its device, its end."""

import logging
import os
import time
from datetime import timedelta

from consissr.errors import UserError

PATIENCE = 48 * 60 * 60
"""Seconds that a process waits for the others at the end: longer than a run, shorter than for ever."""
_ENVIRONMENT = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def numbers() -> tuple[int, int, int]:
    """(rank, local rank, number of processes), as `accelerate launch` and `torchrun` pass them on; (0, 0, 1) alone."""
    try:
        rank, local, world = (int(os.environ.get(name) or default) for name, default in _ENVIRONMENT)
    except ValueError:
        told = " ".join(f"{name}={os.environ.get(name, '')}" for name, _ in _ENVIRONMENT)
        raise UserError(f"{told} in the environment are not whole numbers: unset them, or use torchrun") from None
    if world > 1 and not os.environ.get("RANK"):
        raise UserError(f"WORLD_SIZE={world} is in the environment without RANK: unset it, or use torchrun")
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit: use torchrun")
    return rank, local, world


def choose_device(name: str, local_rank: int = 0) -> str:
    """The device of this process: 'auto' takes an accelerator where there is one; processes get one GPU each.

    A GPU becomes the process's current one, which is the one whose memory is reported.

    Raises:
        UserError: no such device here.
    """
    import torch

    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "mps" and mps:
        return name
    if name == "cuda":
        name = f"cuda:{local_rank}"
    kind, _, index = name.partition(":")
    if kind != "cpu" and not (kind == "cuda" and index.isdigit() and int(index) < gpus):
        raise UserError(f"--device {name}: this machine has no such device ({gpus} GPUs); use auto or cpu")
    if kind == "cuda":
        torch.cuda.set_device(name)
    return name


def finish(failed: bool, world: int) -> None:
    """Tell the others that this process is done; one that `failed` waits here until all `world` processes are.

    torchrun and accelerate launch end all processes as soon as one leaves with a status other than 0; their agent's
    store outlives the processes, so those that succeeded need not wait. A process that dies is no reason to wait for
    ever: the launcher then ends this one, too, and if it cannot, PATIENCE ends. Started otherwise, nobody waits.
    """
    if world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(minutes=5))
        key = f"consissr/infer/done{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        done, begin = store.add(key, 1), time.monotonic()
        while failed and done < world and time.monotonic() - begin < PATIENCE:
            time.sleep(0.5)
            done = store.add(key, 0)
    except (RuntimeError, LookupError, ValueError) as error:
        logging.getLogger(__name__).warning("the other processes cannot be asked whether they are done (%s)", error)
