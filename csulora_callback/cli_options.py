"""What the commands of ``csulora`` share: their options, and how their help shows examples."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Kind(str, Enum):
    """The penalties that have a name."""

    csulora = "csulora"
    separable = "separable"
    guard = "guard"
    projection = "projection"
    data_aware = "data_aware"


class Rank(str, Enum):
    """What to do where the closest safe update does not fit the adapter's rank."""

    truncate = "truncate"
    expand = "expand"


def examples(*commands: str) -> str:
    """The end of a command's help: lines that can be run as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])  # \b: leave the lines alone


AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT adapter, corrected before or not.")]
SubspaceOption = Annotated[
    Path | None, typer.Option("--subspace", metavar="FILE", help="A safety subspace that `csulora subspace` wrote.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="BASE", help="The unaligned base checkpoint, to estimate a subspace with the default rank."
    ),
]
AlignedOption = Annotated[
    str | None,
    typer.Option("--aligned", metavar="ALIGNED", help="The aligned checkpoint; else what the adapter names."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
