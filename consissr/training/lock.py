"""One run per output folder. No torch here."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from consissr.errors import UserError

FILE = ".lock"


@contextlib.contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this run's first process; the system lets go of it when that ends, however it ends.

    Raises UserError, naming the process, while another run writes there: a second one, or processes of one whose
    launcher was killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            other = file.read().strip() or "another process"
            raise UserError(
                f"{folder} belongs to a run that still writes to it: {other}; stop that one first"
            ) from error
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / FILE).unlink()
                folder.rmdir()  # of a run that wrote nothing
