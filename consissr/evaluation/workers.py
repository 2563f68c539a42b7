"""How many processes work side by side."""

import os

from consissr.errors import UserError


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count(jobs: int | None, device: str = "cpu") -> int:
    """`jobs` checked; for None one process per core, or a single one on an accelerator."""
    if jobs is None:
        return cores() if device == "cpu" else 1
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}: leave it out for one process per core")
    return jobs
