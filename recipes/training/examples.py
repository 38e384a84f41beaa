"""From rows of a user's data to the token ids that a model is trained on and judged by, the same in both trainers.

What is learned of a row is what TRL's ``SFTTrainer`` learns of it: a whole conversation, or of a prompt and its
completion the completion. A row of another form than the others is refused; one of that form that has nothing to learn
in it is left out, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from datasets import Dataset, Features, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csulora_callback.models.conversations import FORMATS, TEXTS, Format, convert, recognize, why_left_out
from csulora_callback.models.foreign import first_line
from csulora_callback.models.task_rows import common_length
from recipes.files.sources import read
from recipes.schema.recipe import Data, RecipeError
from recipes.training.pretrained import load_pretrained

_FEATURES = Features(
    {
        "input_ids": List(Value("int64")),
        "labels": List(Value("int64")),
        "number": Value("int64"),
        "cut": Value("bool"),
        "left_out": Value("string"),
    }
)


@dataclass(frozen=True)
class UserRows:
    """What ``data.source`` holds: rows of one format with their ``number``, counted from 1."""

    source: str
    form: Format
    rows: Dataset
    ignored: list[str]  # columns of other names

    def some(self, most: int | None, seed: int) -> UserRows:
        """At most so many of them, drawn without replacement."""
        if most is None:
            return self
        return replace(self, rows=self.rows.shuffle(seed=seed)).first(most)

    def first(self, most: int) -> UserRows:
        """At most so many of them from the beginning."""
        return replace(self, rows=self.rows.select(range(min(most, len(self.rows)))))

    def convert(self, row: dict) -> dict:
        """See :func:`csulora_callback.models.conversations.convert`.

        Raises:
            RecipeError: naming the source and the row.
        """
        try:
            return convert(self.form, row)
        except ValueError as error:
            raise self.fault(row, str(error)) from error

    def fault(self, row: dict, what: str) -> RecipeError:
        """An error about one row."""
        return RecipeError(f"'data.source': {self.source}: row {row['number']}: {what}")


@dataclass(frozen=True)
class Examples:
    """Rows of ``input_ids`` and ``labels``, which are -100 where nothing is learned; and what became of the others."""

    rows: Dataset
    cut: int  # rows that lost their end to ``data.max_length``
    left_out: dict[str, list[int]]  # numbers of rows by the reason

    def summary(self) -> str:
        """For a person, in one line."""
        lengths = [len(ids) for ids in self.rows["input_ids"]]
        fewest, most = min(lengths), max(lengths)
        tokens = f"{most:,} tokens" if fewest == most else f"{fewest:,} to {most:,} tokens"
        cut = f", {self.cut:,} of them cut there" if self.cut else ""
        return "; ".join([f"{len(lengths):,} to learn from, of {tokens}{cut}", *_reasons(self.left_out)])


def read_user_rows(data: Data) -> UserRows:
    """The rows of ``data.source``.

    Raises:
        RecipeError: if it cannot be read, has no row, or has the columns of no format.
    """
    rows = read("data.source", data.source, data.split)
    try:
        if not len(rows):
            raise ValueError("expected rows, but there is none")
        form = recognize(rows.column_names, rows[0])
    except ValueError as error:
        raise RecipeError(f"'data.source': {data.source}: {error}") from error
    ignored = [column for column in rows.column_names if column not in form.used(rows.column_names)]
    # Columns of other formats stay, so that a row that is in one of them can be told from one that is broken.
    known = {column for other in FORMATS for column in other.used(rows.column_names)}
    rows = rows.select_columns([column for column in rows.column_names if column in known])
    return UserRows(data.source, form, rows.add_column("number", range(1, len(rows) + 1)), ignored)


def load_tokenizer(aligned: str, form: Format, **settings: object) -> PreTrainedTokenizerBase:
    """The aligned model's tokenizer, with a pad token, as batches need one.

    Raises:
        RecipeError: if it does not load, or lacks what rows of that form need.
    """
    tokenizer = load_pretrained(AutoTokenizer, aligned, **settings)
    needed = "an end token" if tokenizer.eos_token is None else "a chat template"
    if tokenizer.eos_token is None or (form is not TEXTS and tokenizer.chat_template is None):
        raise RecipeError(f"'model.aligned': {aligned}: expected a tokenizer with {needed}, but it has none")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_examples(user: UserRows, tokenizer: PreTrainedTokenizerBase, most: int) -> Examples:
    """Token ids and labels of rows, at most ``most`` of each.

    Raises:
        RecipeError: for the first row that is of another form or that the chat template refuses; if nothing is to be
            learned from any.
    """
    reader = "tokenizer" if user.form is TEXTS else "chat template"

    def encode(row: dict) -> dict:
        said = user.convert(row)
        why, ids, start = why_left_out(said), [], 0
        if why is None:
            try:
                ids, start, answer = _tokens(tokenizer, said, most)
            except Exception as error:  # a template is a program of somebody else's
                raise user.fault(row, f"the model's {reader} does not take it ({first_line(error)})") from error
            if min(len(ids), most) <= max(answer, 1):  # the first token follows from nothing
                why = "no answer within data.max_length" if answer < len(ids) else "no answer in its tokens"
        kept = {"input_ids": ids[:most], "labels": ([-100] * start + ids[start:])[:most]}
        return {**kept, "number": row["number"], "cut": len(ids) > most, "left_out": why}

    # Not from a cache: what an earlier version of this function made of the rows would count as the same.
    columns = user.rows.column_names
    made = user.rows.map(encode, remove_columns=columns, features=_FEATURES, load_from_cache_file=False)
    left_out: dict[str, list[int]] = {}
    for number, why in zip(made["number"], made["left_out"], strict=True):
        if why is not None:
            left_out.setdefault(why, []).append(number)
    kept = made.select([place for place, why in enumerate(made["left_out"]) if why is None])
    if not len(kept):
        raise RecipeError(
            f"'data.source': {user.source}: expected rows to learn from, but got none: {'; '.join(_reasons(left_out))}"
        )
    return Examples(kept.select_columns(["input_ids", "labels"]), sum(kept["cut"]), left_out)


def _tokens(tokenizer: PreTrainedTokenizerBase, said: dict, most: int) -> tuple[list[int], int, int]:
    """Token ids, the place from which on they are learned, and the place of the first answer among them."""
    if "messages" in said:
        turns = said["messages"]
        ids = _render(tokenizer, turns)
        if len(ids) <= most:
            return ids, 0, 0
        before = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
        return (
            ids,
            0,
            common_length(ids, _render(tokenizer, turns[:before], add_generation_prompt=True) if before else []),
        )
    prompt, completion = said["prompt"], said["completion"]
    if isinstance(prompt, str):
        end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        ids, asked = tokenizer(prompt + completion + end).input_ids, tokenizer(prompt).input_ids
    else:
        ids, asked = _render(tokenizer, prompt + completion), _render(tokenizer, prompt, add_generation_prompt=True)
    start = common_length(ids, asked)
    return ids, start, start


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **settings: bool) -> list[int]:
    return tokenizer.apply_chat_template(turns, return_dict=True, **settings)["input_ids"]


def _reasons(left_out: dict[str, list[int]]) -> list[str]:
    return [
        f"{len(rows):,} left out: {why} (row {rows[0]:,}{' first' if rows[1:] else ''})"
        for why, rows in left_out.items()
    ]
