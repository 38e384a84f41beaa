"""Tables in Markdown, as the pages of results have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: Collection[int] = (0,)) -> str:
    """Columns that are not ``texts``, by their places, are to the right.

    Example:
        >>> print(markdown_table(["what", "seconds"], [["a log", "0.06"]]))
        | what | seconds |
        |---|---:|
        | a log | 0.06 |
    """
    rule = "".join("|---" if place in texts else "|---:" for place in range(len(columns))) + "|"
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])
