"""Try the model families that the installed transformers has: ``python -m recipes.families [--family NAME …]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from csulora_callback.reporting.terminal import make_console
from recipes.families.catalogue import ADAPTERS, KEY, Entry, catalogue
from recipes.families.isolated import Died, call
from recipes.families.report import print_tables, to_markdown
from recipes.families.trial import FAILED, attempt
from recipes.files.points import Points, claim, write_whole
from recipes.schema.recipe import RecipeError

PACKAGES = ("csulora-callback", "transformers", "peft", "torch")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    family: Annotated[list[str] | None, typer.Option(help="Only these, by `model_type`, such as llama.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(ADAPTERS)}.")] = None,
    output: Annotated[Path, typer.Option(help="Where results are kept; a run that is there goes on.")] = Path(
        "outputs/families"
    ),
    seconds: Annotated[float, typer.Option(min=1, help="The most that one of them may take.")] = 90,
) -> None:
    """Train each family from a tiny config under the callback, and check what it saves against a dense reference."""
    try:
        entries = catalogue(family or (), adapter or ADAPTERS)
        run(entries, output, seconds, make_console())
    except (ValueError, RecipeError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error


def run(entries: Sequence[Entry], output: Path, seconds: float, console: Console) -> list[dict]:
    """Try those that the output folder does not hold yet, write what came out for all of these, and print it.

    Raises:
        RecipeError: if the folder holds points of other versions.
    """
    versions = {package: version(package) for package in PACKAGES}
    claim(output, versions)
    points = Points(output / "points.jsonl", KEY)
    for entry in (bar := tqdm(entries, "families", leave=False)):
        bar.set_postfix_str(entry.family)
        if entry.key not in points:
            points.add(tried(entry, seconds))
    found = [points[entry.key] for entry in entries]
    results = {"versions": versions, "points": found}
    write_whole(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_whole(output / "report.md", to_markdown(results))
    print_tables(found, console)
    console.print(f"Written to {output}: results.json, report.md, points.jsonl.")
    return found


def tried(entry: Entry, seconds: float) -> dict:
    """What came out for one entry, also where its process came to nothing."""
    try:
        return call(attempt, entry, seconds, "recipes.families.warm")
    except Died as error:
        return {**asdict(entry), "outcome": error.stage or FAILED, "said": str(error)}


if __name__ == "__main__":
    app()
