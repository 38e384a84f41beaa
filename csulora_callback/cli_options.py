"""What the commands of ``csulora`` share: their options, and how their help shows examples."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from csulora_callback.method.penalty import Penalty
from csulora_callback.presets import FAMILIES, Family, check_projection, check_share, check_without_strength


class Kind(str, Enum):
    """The penalties that have a name."""

    csulora = "csulora"
    separable = "separable"
    guard = "guard"
    projection = "projection"
    data_aware = "data_aware"
    content_aware = "content_aware"


class Rank(str, Enum):
    """What to do where the closest safe update does not fit the adapter's rank."""

    truncate = "truncate"
    expand = "expand"


def choose_preset(kind: Kind | None, strength: float | None, target: float | None) -> Penalty | Family:
    """The penalty of these options, or for a target a preset without its strength.

    Raises:
        ValueError: if they say different things, or the strength is out of range.

    Example:
        >>> choose_preset(None, None, None), choose_preset(Kind.guard, None, 0.9) == Penalty.guard
        (Penalty(name='csulora', parameters={'strength': 10.0}), True)
    """
    if kind is Kind.projection:
        check_projection(**{"--strength": strength, "--target": target})
        return Penalty.projection()
    check_share(target)
    check_without_strength(target, strength)
    if target is not None:
        return FAMILIES[(kind or Kind.data_aware).value]
    preset = FAMILIES[(kind or Kind.csulora).value]
    return preset() if strength is None else preset(strength)


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
ProbesOption = Annotated[
    str | None,
    typer.Option(
        "--probes",
        metavar="FILE",
        help="Prompts to be refused, for data_aware, content_aware or a target; else the checkpoint's.",
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="FILE", help="What was trained on, for data_aware or content_aware; else the checkpoint's."
    ),
]
UncorrectedOption = Annotated[
    list[str] | None,
    typer.Option("--uncorrected", metavar="A,B", help="Names of what was trained beside LoRA, and may pass."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def names_in(given: list[str] | None) -> list[str]:
    """The names in options that may be repeated, and may hold several each.

    Example:
        >>> names_in(["q_proj,v_proj", "score"]), names_in(None)
        (['q_proj', 'v_proj', 'score'], [])
    """
    return [name for names in given or () for name in names.split(",") if name]
