"""Patterns of paths: a shell's wildcards and braces. No torch here: the checks before a run use this, too."""

import glob
import re
from collections.abc import Iterator

from consissr.errors import UserError

BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
"""A range {000..099} or a choice {a,b}."""


def matching(pattern: str) -> list[str]:
    """What is there of a pattern's matches, sorted; UserError for a member of a range or choice that is missing."""
    paths: set[str] = set()
    words = list(in_braces(pattern))
    for word in words:
        matches = glob.glob(word, recursive=True)
        if not matches and len(words) > 1:
            raise UserError(f"data path {pattern} includes {word}, which does not exist")
        paths.update(matches)
    return sorted(paths)


def in_braces(pattern: str) -> Iterator[str]:
    """The words that the braces of `pattern` stand for: a{1..3} a1 a2 a3, {x,y}b xb yb, as in a shell."""
    braces = BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    inside = braces[1]
    if "," in inside:
        choices = inside.split(",")
    else:
        first, last = inside.split("..")
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from in_braces(pattern[: braces.start()] + choice + pattern[braces.end() :])
