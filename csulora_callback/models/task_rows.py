"""Rows of what a model was trained on, given from outside: where they come from, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral
from reprlib import repr as short

from transformers import PreTrainedTokenizerBase

from csulora_callback.models.foreign import first_line
from csulora_callback.models.probes import load_tokenizer
from csulora_callback.models.sources import read_rows
from csulora_callback.models.training_rows import LENGTH, ROWS, TrainingRows, fixed_sample

TaskRows = str | os.PathLike | Sequence[Sequence[int]]
"""A source of rows (see :mod:`csulora_callback.models.sources`), or rows as token ids."""

_COLUMNS = ("input_ids", "messages", "text")


def read_task(task: TaskRows, checkpoint: str | None) -> TrainingRows:
    """A fixed sample of rows, of as many and as long ones as are kept while a model is trained.

    Args:
        task: rows of token ids, or a source with one of the columns ``input_ids``, ``messages``, which go through the
            chat template, or ``text``. Of ``messages`` what stands before the last answer is the prompt, whose length
            is in ``starts``; of the others nothing is known of a prompt.
        checkpoint: where the tokenizer is loaded from, if it takes one.

    Raises:
        ValueError: where the source cannot be read or lacks the columns, there is no row, something is no list of
            token ids, or the tokenizer cannot be loaded or fails.

    Example:
        >>> read_task([[5, 6, 7], [8, 9]], None)
        TrainingRows(rows=[[5, 6, 7], [8, 9]], seen=2, starts=[0, 0], inputs={}, left_out=0)
    """
    column, given = _column(os.fspath(task)) if isinstance(task, str | os.PathLike) else ("input_ids", task)
    if not isinstance(given, Sequence) or not len(given):
        raise ValueError(f"`task`: expected a source of rows, or rows of token ids, but got {short(given)}.")
    rows, starts = [given[place] for place in fixed_sample(len(given), ROWS)], []
    if column != "input_ids":
        rows, starts = _ids(load_tokenizer(checkpoint, "task"), column, rows)
    for row in rows:
        if not isinstance(row, Sequence) or not all(isinstance(token, Integral) and token >= 0 for token in row):
            raise ValueError(
                f"`task`: expected rows of token ids, which are whole numbers ≥ 0, but got {short(row)}. Pass lists "
                "without padding, [[5, 6], [7, 8, 9]], or the name of a file."
            )
    return TrainingRows([[int(token) for token in row[:LENGTH]] for row in rows], len(given), starts)


def _column(source: str) -> tuple[str, list]:
    try:
        rows = read_rows(source)
    except ValueError as error:
        raise ValueError(f"`task`: {error}") from error
    column = next((name for name in _COLUMNS if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"`task`: {source}: expected one of the columns {_COLUMNS}, but got {rows.column_names}.")
    return column, rows[column][:]


def _ids(tokenizer: PreTrainedTokenizerBase, column: str, rows: list) -> tuple[list[list[int]], list[int]]:
    """Token ids of rows, and how many of each are its prompt."""
    try:
        if column == "messages":
            ids = tokenizer.apply_chat_template(rows, return_dict=True)["input_ids"]
            return ids, [_prompt_length(tokenizer, *row) for row in zip(rows, ids, strict=True)]
        return tokenizer(rows).input_ids, []
    except Exception as error:  # a template is a program of somebody else's
        raise ValueError(
            f"`task`: expected a column {column!r} that the tokenizer takes, but it fails on it "
            f"({first_line(error)}). Pass rows of token ids instead."
        ) from error


def _prompt_length(tokenizer: PreTrainedTokenizerBase, turns: list[dict], ids: list[int]) -> int:
    before = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not before:
        return 0
    asked = tokenizer.apply_chat_template(turns[:before], add_generation_prompt=True, return_dict=True)["input_ids"]
    return common_length(ids, asked)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they share at the start: a template may render a prompt otherwise where an answer follows.

    Example:
        >>> common_length([5, 6, 7], [5, 6, 8, 9])
        2
    """
    differ = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(one), len(other)))
