"""Tables and heat maps for a terminal; plain columns of text where the output is piped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 240  # columns of what is piped: whoever reads it can do so in any width, and nothing is cut off


def make_console() -> Console:
    """Of the standard output: as wide as the terminal, or wide enough for whole lines where there is none."""
    plain = {"highlight": False, "markup": False, "emoji": False}  # names may hold brackets and colons
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=_WIDE)


def print_section(console: Console, title: str, table: Table) -> None:
    """A table under its title, which is not a part of it: rich would break it where the table is narrow."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)


def make_table(console: Console, columns: Sequence[str]) -> Table:
    """A table whose first column is names and all others are numbers."""
    table = Table(box=_box(console), pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    return table


def text_table(console: Console, columns: Sequence[str]) -> Table:
    """A table whose first column is numbers and all others are texts."""
    table = Table(box=_box(console), pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place else "right", no_wrap=not place, overflow="fold")
    return table


def facts(console: Console, rows: Mapping[str, str]) -> Table:
    """A table of names and what is to be said of each."""
    table = Table(box=_box(console), show_header=False, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, Text(text, overflow="fold"))
    return table


def heat_map(
    console: Console, rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]
) -> Table:
    """Percentages by row and column: red where they are above 0, blue where below, as strong as they are large.

    Where the output is piped there are numbers alone.

    Example:
        >>> import io
        >>> console = Console(file=io.StringIO())
        >>> console.print(heat_map(console, ["0"], ["q", "v"], {("0", "q"): 0.25}))
        >>> [line.split() for line in console.file.getvalue().splitlines()]
        [['layer', 'q', 'v'], ['0', '+25.0']]
    """
    table = make_table(console, ["layer", *columns])
    largest = max((abs(value) for value in values.values()), default=0.0)
    for row in rows:
        cells = [_cell(values.get((row, column)), largest, console.is_terminal) for column in columns]
        table.add_row(row, *cells)
    return table


def percent(share: float) -> str:
    """A share in percent, without the sign: two digits behind the point, and one from 10 on.

    Example:
        >>> percent(0.1234), percent(0.00123), percent(0.0)
        ('12.3', '0.12', '0.00')
    """
    hundredths = 100 * share
    return f"{hundredths:.1f}" if abs(hundredths) >= 9.995 else f"{hundredths:.2f}"


def span(values: Sequence[int]) -> str:
    """The smallest and the largest of some whole numbers, or the one that they all are.

    Example:
        >>> span([16, 4, 64]), span([8, 8])
        ('4–64', '8')
    """
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def signed(share: float) -> str:
    """:func:`percent` with plus or minus; of what would be shown as zero there is none.

    Example:
        >>> signed(0.1234), signed(-0.005), signed(-0.000001)
        ('+12.3', '-0.50', '0.00')
    """
    text = percent(abs(share))
    return text if text == "0.00" else f"{'-' if share < 0 else '+'}{text}"


def _cell(value: float | None, largest: float, colored: bool) -> Text:
    if value is None:
        return Text("")
    if not colored or not largest:
        return Text(signed(value))
    strength = abs(value) / largest
    faded = round(255 * (1 - strength))
    ground = f"rgb(255,{faded},{faded})" if value > 0 else f"rgb({faded},{faded},255)"
    return Text(signed(value), style=f"{'black' if strength < 0.6 else 'white'} on {ground}")


def _box(console: Console) -> box.Box | None:
    return box.SIMPLE_HEAD if console.is_terminal else None
