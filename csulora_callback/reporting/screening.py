"""What a person reads of data that was screened; and the same for machines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from csulora_callback.aligned_answers import short
from csulora_callback.reporting.terminal import percent, print_section, text_table
from csulora_callback.screening import ScreenedRows

MOST = 50
"""How many rows are shown."""


def print_screened(console: Console, done: ScreenedRows, output: Path | None) -> None:
    """A table of refused rows, counted from 0, and how many they are."""
    if done.refused:
        table = text_table(console, ["row", "prompt", "the aligned model answers", "the data answers"])
        for row in done.refused[:MOST]:
            table.add_row(str(row.row), *map(short, (row.prompt, row.aligned_answer, row.trained_answer)))
        print_section(console, "Rows that the aligned model refuses, counted from 0", table)
    if len(done.refused) > MOST:
        where = f"in {output}" if output else "with -o FILE"
        console.print(f"… and {len(done.refused) - MOST:,} more: all of them {where}.", soft_wrap=True)
    for why, rows in done.left_out.items():
        console.print(f"{len(rows):,} not asked: {why} (row {rows[0]}{' first' if rows[1:] else ''}).", soft_wrap=True)
    refused = f"{len(done.refused):,} of {done.asked:,} rows ({percent(done.share)} %)"
    written = f" They are written to {output}." if output else ""
    console.print(f"The aligned model refuses {refused} of {done.data}.{written}", soft_wrap=True)


def screened_json(done: ScreenedRows, output: Path | None) -> dict:
    """The same, with all of the rows."""
    return {
        "data": done.data,
        "model": done.model,
        "output": None if output is None else str(output),
        "asked": done.asked,
        "left_out": done.left_out,
        "share": done.share,
        "refused": [asdict(row) for row in done.refused],
    }
