"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def one_line(text: str) -> str:
    """A name without line breaks."""
    return " ".join(text.split())


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table; its first `words` columns hold words, which stand left, the others numbers."""
    rule = "|" + "---|" * words + "--:|" * (len(header) - words)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
