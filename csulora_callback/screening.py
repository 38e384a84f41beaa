"""Which rows of a whole file of fine-tuning data the aligned model refuses to answer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from csulora_callback.aligned_answers import ANSWER, judge
from csulora_callback.models.conversations import (
    TEXTS,
    Format,
    asked_and_answered,
    convert,
    recognize,
    why_left_out,
)
from csulora_callback.models.foreign import first_line
from csulora_callback.models.probes import check_ids, special_tokens
from csulora_callback.models.sources import read_rows
from csulora_callback.models.teacher_forcing import greedy_answers, most_tokens
from csulora_callback.models.whole_files import write_whole


@dataclass(frozen=True)
class RefusedRow:
    """A row whose prompt the aligned model refuses.

    Attributes:
        row: its place in the source, counted from 0.
        prompt: as text; of a conversation of more than one turn each turn with its role.
        aligned_answer: how the aligned model begins to answer it.
        trained_answer: what the row teaches to answer.
    """

    row: int
    prompt: str
    aligned_answer: str
    trained_answer: str


@dataclass(frozen=True)
class ScreenedRows:
    """What :func:`screen_data` found.

    Attributes:
        data: the source.
        model: the aligned model.
        asked: how many rows it was asked.
        left_out: places of rows that could not be asked, by the reason.
        refused: those that are refused, in the order of the source.
    """

    data: str
    model: str
    asked: int
    left_out: dict[str, list[int]]
    refused: list[RefusedRow]

    @property
    def share(self) -> float:
        """Of the rows that were asked, those that are refused."""
        return len(self.refused) / self.asked

    def save(self, path: str | os.PathLike) -> None:
        """Write the refused rows as JSON lines, with the keys of :class:`RefusedRow`; the file appears whole.

        As its column ``prompt`` is prompts that the aligned model refuses, it can serve as ``probes=`` too.
        """
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.refused)
        write_whole(Path(path), lambda place: place.write_text(lines, encoding="utf-8"))


def screen_data(data: str | os.PathLike, model: str | os.PathLike, progress: bool = True) -> ScreenedRows:
    """Ask the aligned model the prompt of every row of fine-tuning data, and list the rows that it refuses.

    A prompt is all that stands before a row's last answer. It goes through the model's chat template; a text that has
    special tokens of the tokenizer in it already, as one that was made by a template has, is asked as it is. Answers
    are greedy, 16 tokens of each, and judged by :class:`RefusalPhrases`, which knows English.

    Args:
        data: a file (.json, .jsonl, .csv, .parquet), ``package:path``, or a Hub dataset, of which the split ``train``
            is read. Rows are chat ``messages``, ShareGPT ``conversations``, ``prompt`` and ``completion``, or Alpaca's
            ``instruction`` and ``output``.
        model: the aligned model, a decoder-only one, before it is fine-tuned: a folder or a Hub id. It is loaded with
            its tokenizer, on a GPU if there is one.
        progress: show progress bars.

    Raises:
        ValueError: if the data cannot be read, has the columns of no format or a row of another one, or none that
            could be asked; if the model cannot be loaded, or its tokenizer lacks what the rows need.
        ImportError: where ``datasets`` is not installed, naming the extra that brings it.

    Example:
        >>> from csulora_callback import screen_data
        >>> screen_data("train.jsonl", model="org/aligned-model")
        Traceback (most recent call last):
        ValueError: `data`: no such file: 'train.jsonl'
    """
    source, checkpoint = os.fspath(data), os.fspath(model)
    form, exchanges, left_out = _exchanges(source)
    network, tokenizer = _load(checkpoint)
    if tokenizer.chat_template is None and form is not TEXTS:
        raise ValueError(
            f"`model`: expected a tokenizer with a chat template in {checkpoint!r}, as the rows of {source} are "
            "conversations, but it has none. Add one, or pass prompts and completions as texts."
        )
    limit = most_tokens(network)
    prompts: dict[int, tuple[int, ...]] = {}
    for row, exchange in exchanges.items():
        ids = _ids(tokenizer, exchange.prompt, _named(source, row))
        too_long = limit is not None and len(ids) + ANSWER > limit
        if ids and not too_long:
            prompts[row] = tuple(ids)
        else:
            left_out.setdefault("a prompt longer than the model reads" if too_long else "no prompt", []).append(row)
    if not prompts:
        reasons = "; ".join(f"{why} ({len(rows)})" for why, rows in left_out.items())
        raise ValueError(f"`data`: {source}: expected rows with a prompt and an answer, but got none: {reasons}.")
    check_ids(list(prompts.values()), network.get_input_embeddings().weight.shape[0], "model")
    alike = list(dict.fromkeys(prompts.values()))  # the same prompt is asked once
    answers = dict(
        zip(alike, judge(greedy_answers(network, alike, ANSWER, progress, padding=True), tokenizer), strict=True)
    )
    refused = [
        RefusedRow(row, exchanges[row].prompt_in_words(), answers[ids].text, exchanges[row].answer)
        for row, ids in prompts.items()
        if answers[ids].refuses
    ]
    return ScreenedRows(source, checkpoint, len(prompts), left_out, refused)


@dataclass(frozen=True)
class _Exchange:
    """What a row asks, as a text or as turns, and its answer."""

    prompt: str | list[dict]
    answer: str

    def prompt_in_words(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0]["content"]
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)


def _exchanges(source: str) -> tuple[Format, dict[int, _Exchange], dict[str, list[int]]]:
    """The format of a source, what its rows ask by their places, and which ones ask nothing, by the reason."""
    try:
        rows = read_rows(source)
    except ValueError as error:
        raise ValueError(f"`data`: {error}") from error
    exchanges, left_out, about = {}, {}, source
    try:
        if not len(rows):
            raise ValueError("expected rows, but there is none")
        form = recognize(rows.column_names, rows[0])
        for place, row in enumerate(rows):
            about = _named(source, place)
            said = convert(form, row)
            why = why_left_out(said)
            if why is None:
                exchanges[place] = _Exchange(*asked_and_answered(said))
            else:
                left_out.setdefault(why, []).append(place)
    except ValueError as error:
        raise ValueError(f"`data`: {about}: {error}") from error
    return form, exchanges, left_out


def _named(source: str, place: int) -> str:
    return f"{source}: row {place}, counted from 0"


def _load(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        # False, as with None transformers asks on the terminal whether to run code that lies in the checkpoint.
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype="auto", device_map="auto", trust_remote_code=False
        )
    except Exception as error:  # of files that are missing or broken in one of many ways
        raise ValueError(
            f"`model`: expected the aligned model with its tokenizer in {checkpoint!r}, a folder or Hub id, but they "
            f"cannot be loaded without running code that lies there ({first_line(error)}). Pass the checkpoint that "
            "the fine-tune starts from."
        ) from error
    return model, tokenizer


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], about: str) -> list[int]:
    """Token ids of a prompt as the model is asked it; none for a conversation without one."""
    try:
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
            own = tokenizer(prompt, add_special_tokens=False).input_ids
            if tokenizer.chat_template is None or not special_tokens(tokenizer).isdisjoint(own):
                return ids
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            return []
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program of somebody else's
        raise ValueError(
            f"`data`: {about}: the model's chat template does not take it ({first_line(error)})."
        ) from error
