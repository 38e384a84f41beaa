"""What came out for the families, on the terminal and as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import shorten

from rich.console import Console

from csulora_callback.reporting.terminal import make_table, print_section, text_table
from recipes.families.catalogue import TASKS
from recipes.families.reference import STRENGTH
from recipes.families.trial import CORRECTED, OUTCOMES, TOLERANCE
from recipes.files.markdown import markdown_table

COLUMNS = ("family", "class", "adapter", "came out", "matrices", "worst error", "trained on, or why not")
COUNTS = ("what is trained", "tried", *OUTCOMES)


def count_rows(points: Sequence[Mapping]) -> list[list[str]]:
    """How often what came out, by task and together."""
    rows = []
    for name, chosen in [*((task, [p for p in points if p["task"] == task]) for task in TASKS), ("together", points)]:
        counts = Counter(point["outcome"] for point in chosen)
        rows.append([name, str(len(chosen)), *(str(counts[outcome]) for outcome in OUTCOMES)])
    return rows


def row(point: Mapping) -> list[str]:
    """One entry as texts."""
    measured = "worst" in point
    said = "; ".join(filter(None, (point.get("trained_on") if measured else "", point["said"])))
    if point.get("lost"):
        said += f"; {len(point['lost'])} keys are not loaded, such as {point['lost'][0]}"
    if point.get("new"):
        said += f"; new, saved as trained: {', '.join(point['new'])}"
    return [
        point["family"],
        point["kind"],
        point["adapter"],
        point["outcome"],
        str(point["matrices"]) if measured else "",
        f"{point['worst']:.1e}" if measured else "",
        shorten(said, 200, placeholder=" …"),
    ]


def worst(points: Sequence[Mapping]) -> float:
    """The largest error of those that are corrected, 0 where none is."""
    return max((point["worst"] for point in points if point["outcome"] == CORRECTED), default=0.0)


def print_tables(points: Sequence[Mapping], console: Console) -> None:
    """All rows, and how many of what there are."""
    table = text_table(console, COLUMNS)
    table.columns[0].justify = "left"
    for point in points:
        table.add_row(*row(point))
    print_section(console, "Model families", table)
    counts = make_table(console, COUNTS)
    for cells in count_rows(points):
        counts.add_row(*cells)
    print_section(console, "What came out", counts)


def to_markdown(results: Mapping) -> str:
    """The page that stands beside the results."""
    points = results["points"]
    versions = ", ".join(f"{package} {version}" for package, version in results["versions"].items())
    parts = [
        "# Model families",
        f"`python -m recipes.families` with {versions}. {_EXPLANATION}",
        f"The largest error of any that is corrected is {worst(points):.1e}.",
        markdown_table(COUNTS, count_rows(points)),
    ]
    for task in TASKS:
        rows = [[_cell(text) for text in row(point)] for point in points if point["task"] == task]
        if rows:
            parts += [f"## {task.capitalize()}", markdown_table(COLUMNS, rows, texts=(0, 1, 2, 3, 6))]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


_EXPLANATION = f"""Each class is made from a tiny config, saved as a base and, displaced, as an aligned model, wrapped
in LoRA and trained for two steps by the real Trainer with the callback, in a process of its own. Then PEFT loads and
merges what was saved, and what that does to every weight is compared with the closest safe update of what the raw
adapter does: dense, in float64, for `Penalty.guard({STRENGTH:g})`, by subspaces from an SVD of the weights that
transformers loads.

- *Matrices* are those that were updated, each expert's of a stack counted. The error is the largest
  `‖X − X*‖ / ‖X*‖` of them, and *wrong* is one of {TOLERANCE:g} or more.
- *Not loaded*: saved right, but PEFT does not load all that it saved, with the callback or without.
- *Refused*: by the callback, before the first step. *Not adapted*: by PEFT.
- *Not built*: transformers, or a package that it asks for, does not make it from our config, or it does not load what
  it saved, or it is not tiny by the rules of `recipes/families/tiny.py`.
- Where a model takes none of our batches, the loss is the size of the factors, and the reason stands in the row."""
