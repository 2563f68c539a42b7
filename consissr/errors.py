"""The one exception that users meet, and how scripts end."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """A mistake the user can mend: the message names the value, the rule and the remedy in one line."""


def exit_status(work: Callable[[], int], interrupted: str = "the same command goes on where it was") -> int:
    """What `work` returns; 2 for a mistake and 130 for an interrupt, each told in one line."""
    for stream in (sys.stdout, sys.stderr):  # file names may hold what a terminal's encoding has no bytes for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except (UserError, OSError) as error:
        status, told = 2, f"error: {error}\n"
    except KeyboardInterrupt:
        status, told = 130, f"interrupted; {interrupted}\n"
    with suppress(OSError):  # a full disk or closed pipe does not change the status
        sys.stderr.write(told)
    return status


@contextmanager
def compile_errors_in_one_line(instead: str) -> Iterator[None]:
    """Makes a UserError of code that torch.compile cannot make, or finds damaged. instead: how to do without."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor.", "torch._dynamo.")):
            raise
        reason = reason_of(getattr(error, "inner_exception", error))  # its own may name the backend alone
        raise UserError(
            f"the networks could not be compiled ({reason}): install a C++ compiler; remove the file, if one "
            f"is named, which a run that was killed left damaged; or {instead}"
        ) from error


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
