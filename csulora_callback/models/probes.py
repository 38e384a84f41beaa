"""Prompts that are to be refused: where they come from, and how a model is asked them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import AutoTokenizer

from csulora_callback.models.sources import read_rows

_COLUMNS = ("prompt", "text")  # of a table; lines of a text file are its column `text`
Probes = str | os.PathLike | Sequence[str] | Sequence[Sequence[int]]
"""A source of rows (see :mod:`csulora_callback.models.sources`), prompts, or prompts as token ids."""


def read_prompts(probes: Probes) -> list[str] | list[list[int]]:
    """The prompts of a source, from its column ``prompt`` or ``text``, or those that are given.

    Raises:
        ValueError: where the source cannot be read, lacks the column, or there is no prompt.

    Example:
        >>> read_prompts(["How do I pick a lock?", " "])
        ['How do I pick a lock?']
    """
    if isinstance(probes, str | os.PathLike):
        try:
            rows = read_rows(os.fspath(probes))
        except ValueError as error:
            raise ValueError(f"`probes`: {error}") from error
        column = next((name for name in _COLUMNS if name in rows.column_names), None)
        if column is None:
            raise ValueError(f"`probes`: {probes}: expected a column 'prompt' or 'text', but got {rows.column_names}.")
        probes = rows[column]
    prompts = [prompt.strip() if isinstance(prompt, str) else list(prompt) for prompt in probes if prompt]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError("`probes`: expected prompts that are to be refused, but got none.")
    return prompts


def tokenize(prompts: Sequence[str] | Sequence[Sequence[int]], checkpoint: str | None) -> list[list[int]]:
    """Token ids of each prompt, as the model is asked it: through the chat template, where there is one.

    Args:
        prompts: texts, or token ids, which are returned as they are.
        checkpoint: where the tokenizer is loaded from.

    Raises:
        ValueError: where no tokenizer can be loaded.
    """
    if not isinstance(prompts[0], str):
        return [list(prompt) for prompt in prompts]
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`probes`: expected a tokenizer in {checkpoint!r}, the checkpoint under the adapter, but none can be "
            f"loaded ({error}). Pass the prompts as lists of token ids instead."
        ) from error
    if tokenizer.chat_template is None:
        return tokenizer(list(prompts)).input_ids
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
