"""What a dry run says of a user's data: its format, its first rows, and how one of them reads."""

from __future__ import annotations

import os

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from csulora_callback.models.conversations import Format
from recipes.files.sources import locate
from recipes.schema.recipe import Recipe
from recipes.training.examples import load_tokenizer, make_examples, read_user_rows

_ROWS = 1000
_CHARACTERS = 800


def preview(recipe: Recipe) -> dict[str, str]:
    """Lines for the table of a dry run; nothing is downloaded.

    Raises:
        RecipeError: as training would, for what shows in the first rows.
    """
    source = recipe.data.source
    if source is None:
        return {}
    if not os.path.exists(source) and locate("data.source", source) is None:
        return {"format": "checked when the rows are downloaded, before any model is"}
    user = read_user_rows(recipe.data)
    ignored = f"; ignored: {_shown(', '.join(user.ignored))}" if user.ignored else ""
    lines = {"format": user.form.described(user.rows.column_names) + ignored}
    first, total = user.first(_ROWS), len(user.rows)
    part = f"the first {len(first.rows):,} of {total:,}: " if len(first.rows) < total else ""
    tokenizer = _tokenizer_here(recipe.model.aligned, user.form)
    if tokenizer is None:
        for row in first.rows:
            first.convert(row)
        return {**lines, "rows": f"{part}all of this format; the model's tokenizer, which counts them, is not here"}
    examples = make_examples(first, tokenizer, recipe.data.max_length)
    return {**lines, "rows": part + examples.summary(), **_reading(examples.rows[0], tokenizer)}


def _tokenizer_here(aligned: str, form: Format) -> PreTrainedTokenizerBase | None:
    if os.path.isdir(aligned):
        return load_tokenizer(aligned, form)
    if not isinstance(try_to_load_from_cache(aligned, "tokenizer_config.json"), str):
        return None
    return load_tokenizer(aligned, form, local_files_only=True)


def _reading(row: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    learned = [token for token in row["labels"] if token != -100]
    text, answer = (_shown(tokenizer.decode(ids)) for ids in (row["input_ids"], learned))
    return {
        f"the first, {len(row['input_ids']):,} tokens": text,
        f"learned of it, {len(learned):,} tokens": "all of it" if answer == text else answer,
    }


def _shown(text: str) -> str:
    """Short enough for a table, and without what a terminal would take for a command."""
    if len(text) > _CHARACTERS:
        text = f"{text[: _CHARACTERS // 2]} … {text[-_CHARACTERS // 2 :]}"
    return "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
