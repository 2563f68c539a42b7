"""The processes of a run as a whole: how long they wait for each other, and who says so when one fails or falls silent.

Collectives of a step end after `timeout` minutes. What may take longer (validation, and what only the first process
does: saving, export) is waited for in a group of its own, which has a day. Each process leaves a sign of life in the
launcher's store every few seconds; one that was stopped, or whose machine is gone, leaves none, and is then named.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from consissr.errors import UserError, reason_of

LONG = timedelta(days=1)
FAILED = "failed"
"""Key of the store: how many processes have failed so far."""


class Processes:
    """This process among `world`. `timeout`: minutes of silence after which one counts as lost."""

    def __init__(self, rank: int, world: int, device: torch.device, timeout: float) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.silence = 60 * timeout
        self.where = f"process {rank} (pid {os.getpid()} on {socket.gethostname()})"
        self.others: dict[int, tuple[bytes, float]] = {}
        """The last sign of life of each process, and when it was new."""
        self.launcher = os.getppid()
        self.ended = threading.Event()
        self.long = None
        if world > 1:
            try:
                self.long = dist.new_group(backend="gloo", timeout=LONG)
            except RuntimeError as error:  # such as a host whose own name means 127.0.1.1
                raise UserError(
                    f"the processes cannot reach each other ({reason_of(error)}): set GLOO_SOCKET_IFNAME, and "
                    "NCCL_SOCKET_IFNAME, to the network interface between the machines"
                ) from error
            self.store = own_client()
            self.thread = threading.Thread(target=self.watch, name="signs of life", daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Until all processes are here, however long the first one takes."""
        if self.long is not None:
            dist.barrier(self.long)

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, in all of them."""
        if self.long is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.long)
        return values

    def first(self, value: Any) -> Any:
        """`value` of the first process, in all of them."""
        if self.long is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.long)
        return values[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor of equal shapes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def leave(self) -> None:
        """Until all processes have nothing more to ask of each other: the one that keeps the store may then end."""
        self.wait()
        self.close()
        self.wait()

    @contextlib.contextmanager
    def machine_first(self, local_rank: int) -> Iterator[None]:
        """The first process of each machine goes through alone; the others follow, and find what it cached."""
        if local_rank:
            self.wait()
        yield
        if not local_rank:
            self.wait()

    def orphaned(self) -> bool:
        """Whether the launcher that started this process and others is gone."""
        return self.world > 1 and os.getppid() != self.launcher

    # --- failures -----------------------------------------------------------------------------------------------------

    def speaks(self) -> bool:
        """Whether this process, which fails, is the first to do so: its line is the run's."""
        if self.world == 1 or self.orphaned():  # without a launcher there is no store either
            return self.rank == 0
        try:
            return self.store.add(FAILED, 1) == 1
        except RuntimeError:  # the store went with the process or launcher that kept it
            return self.rank == 0

    def outlast(self, seconds: float = 5) -> None:
        """Where no launcher keeps the store, process 0 does: it stays until the others, if they meet the same within
        `seconds`, have asked."""
        if self.rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # a store elsewhere, which is gone
            while self.store.add(FAILED, 0) < self.world and time.monotonic() < until:
                time.sleep(0.01)

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Lets the first process that fails tell of it; the others, which fail in its wake, end without a word."""
        try:
            yield
        except Exception as error:
            if self.world == 1 or not isinstance(error, UserError | RuntimeError):
                raise
            self.close()  # before process 0, which may keep the store, is told that it may go
            speaks = self.speaks()
            self.outlast()
            if not speaks:
                raise SystemExit(2) from None
            if not isinstance(error, UserError) and broken(error):
                error = UserError(
                    f"{self.where} lost the others: one of them has ended (which, the launcher's last lines say), or "
                    "kept it waiting for too long; --resume latest goes on from the last checkpoint"
                )
            record(str(error))
            raise error

    def watch(self) -> None:
        """Leave signs of life and look for the others'; a process that leaves none for too long ends the run."""
        every = min(5.0, self.silence / 5)
        for number in range(10**9):
            if self.ended.wait(every):
                return
            try:
                self.store.set(f"alive/{self.rank}", str(number))
                silent = self.silent()
            except RuntimeError:
                return
            if silent:
                self.end(f"{', '.join(silent)} not heard of for {self.silence:.0f} s: stopped, or its machine is gone")

    def silent(self) -> list[str]:
        """The others whose last sign is too old."""
        now, lost = time.monotonic(), []
        for other in range(self.world):
            key = f"alive/{other}"
            sign = self.store.get(key) if self.store.check([key]) else b""
            if self.others.get(other, (None, now))[0] != sign:
                self.others[other] = (sign, now)
            if other != self.rank and now - self.others[other][1] > self.silence:
                lost.append(f"process {other}")
        return lost

    def end(self, message: str) -> None:
        """End this process at once, from a thread: its main one waits for a process that does not answer."""
        if self.speaks():
            message += "; --resume latest goes on from the last checkpoint"
            os.write(2, f"\nerror: {message}\n".encode())
            record(message)
        os._exit(2)

    def close(self) -> None:
        """No more signs: the run has ended. (A thread that still asked the store would bring the interpreter down.)"""
        self.ended.set()
        if self.world > 1:
            self.thread.join(5)


def own_client() -> dist.Store:
    """The launcher's store, or process 0's, by a connection of its own: one that waits for a key keeps every other call
    of its connection waiting. Keys are those of this attempt: torchrun may start the processes again."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"consissr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def record(message: str) -> None:
    """Leave `message` for torchrun's and accelerate's last lines, which else know an exit code only."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def broken(error: RuntimeError) -> bool:
    """Whether `error` comes from the connection to other processes."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class Flags:
    """What the processes must agree on after each step: whether to stop, and whether something was not finite.

    Read at once on a CPU; on a GPU a step later, so that nothing waits for the step that is being computed.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.pending: list[tuple[Any, Tensor, torch.cuda.Event | None]] = []

    def post(self, about: Any, flags: list[Tensor | float]) -> None:
        """Add up a step's numbers, 0 where nothing is wrong, over processes; `about` comes back with their sums."""
        device = self.processes.device
        # A number is filled in there: to copy it would wait for the device.
        row = torch.stack([s.float() if isinstance(s, Tensor) else torch.full((), s, device=device) for s in flags])
        if self.processes.world > 1:
            dist.all_reduce(row)
        if device.type != "cuda" or not torch.cuda.is_available():
            self.pending.append((about, row, None))
            return
        there = torch.empty(row.shape, pin_memory=True)
        there.copy_(row, non_blocking=True)
        complete = torch.cuda.Event()
        complete.record()
        self.pending.append((about, there, complete))

    def collect(self, all_of_them: bool = False) -> list[tuple[Any, list[float]]]:
        """(about, sums) of the steps known by now: everything but a GPU's last step, or `all_of_them`."""
        keep = 0 if all_of_them or (self.pending and self.pending[-1][2] is None) else 1
        known = self.pending[: len(self.pending) - keep]
        self.pending = self.pending[len(known) :]
        for _, _, complete in known:
            if complete is not None:
                complete.synchronize()
        return [(about, row.tolist()) for about, row, _ in known]
