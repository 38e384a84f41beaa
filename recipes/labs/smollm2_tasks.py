"""A task with right answers for SmolLM2: what kind of request a text is, read from an installed package.

The requests are those that the style task answers; a few of them the aligned model saw in its alignment, as requests.
All that is not the task is as in :mod:`recipes.labs.smollm2_data`, and so is the aligned model of a seed, to the last
bit.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

from recipes.files.points import SPLITS
from recipes.files.sources import locate
from recipes.labs.smollm2_data import Data, Exchange, cut, load
from recipes.schema.recipe import Recipe, RecipeError

# By domain of the source; of the others no person could tell which is which.
KINDS = {
    "comparison": "comparison",
    "conversational": "chat",
    "definitions": "definition",
    "howto": "instructions",
    "math": "math",
    "personal_advice": "advice",
    "planning": "plan",
    "recommendation": "recommendation",
    "short_code": "code",
    "summarize": "explanation",
    "troubleshooting": "repair",
    "writing": "writing",
}
*_SOME, _LAST = KINDS.values()
QUESTION = f"What kind of request is this: {', '.join(_SOME)} or {_LAST}? Answer in one word."


def load_with_task(recipe: Recipe, seed: int) -> Data:
    """The data of one seed, with the task that the recipe names.

    Raises:
        RecipeError: where a source is missing or has too few rows; the key and what to do are named.
    """
    data, kinds = load(recipe.smollm2, seed), recipe.kinds
    if kinds.source is None:
        return data
    rows, sizes = _rows(kinds.source), (kinds.training, kinds.tuning, kinds.held_out)
    if len(rows) < sum(sizes):
        raise RecipeError(f"'kinds.source': expected at least {sum(sizes)} different requests, but got {len(rows)}")
    random.Random(seed).shuffle(rows)
    training, *parts, _ = cut(rows, sizes)
    return replace(data, training=training, task=dict(zip(SPLITS, parts, strict=True)), right_answers=True)


def _rows(source: str) -> list[Exchange]:
    """Every request once, with its kind as the answer."""
    file = locate("kinds.source", source)
    if file is None:
        raise RecipeError(f"'kinds.source': expected a .json file, or one of a package, but got {source!r}")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))["generation"]
        kinds = {row["prompt"]: KINDS[row["domain"]] for row in table if row["domain"] in KINDS}
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"'kinds.source': {source}: expected an object whose `generation` lists objects with `prompt` and "
            f"`domain`, but got something else ({error!r})"
        ) from error
    return [Exchange(f"{prompt}\n\n{QUESTION}", kind) for prompt, kind in kinds.items()]
