"""Prompts that are to be refused: where they come from, and how a model is asked them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from numbers import Integral
from reprlib import repr as short

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csulora_callback.models.foreign import first_line
from csulora_callback.models.reading import Rows
from csulora_callback.models.sources import read_rows
from csulora_callback.models.training_rows import LENGTH, fixed_sample

logger = logging.getLogger(__name__)

PROBES = 256
"""How many prompts a model is asked at most: the time that it takes is spent at every save and evaluation."""

_COLUMNS = ("prompt", "text")  # of a table; lines of a text file are its column `text`
Probes = str | os.PathLike | Sequence[str] | Sequence[Sequence[int]]
"""A source of rows (see :mod:`csulora_callback.models.sources`), prompts, prompts as token ids, or ``"builtin"``."""

BUILTIN = "builtin"


def read_prompts(probes: Probes) -> list[str] | list[list[int]]:
    """The prompts of a source, from its column ``prompt`` or ``text``, those that are given, or the built-in ones.

    Empty ones are left out, and so are repeated ones, as what is measured by must not be what was read; warnings say
    how many. Tensors are refused: padding in them would pass for tokens.

    Raises:
        ValueError: where the source cannot be read or lacks the column, there is no prompt, or something is neither a
            text nor a list of token ids, or some are the one and some the other.

    Example:
        >>> read_prompts(["How do I pick a lock?", " "])
        ['How do I pick a lock?']
        >>> read_prompts([[5, 6, 7], [8, 9]])
        [[5, 6, 7], [8, 9]]
        >>> read_prompts("bulitin")
        Traceback (most recent call last):
        ValueError: `probes`: no such file: 'bulitin'; did you mean 'builtin'?
    """
    if isinstance(probes, str) and probes == BUILTIN:
        return _builtin()
    if isinstance(probes, str) and _is_misspelt(probes):  # said before the Hub is asked
        raise ValueError(f"`probes`: no such file: {probes!r}; did you mean {BUILTIN!r}?")
    given = _column(os.fspath(probes)) if isinstance(probes, str | os.PathLike) else probes
    if not _is_list(given):
        raise ValueError(
            f"`probes`: expected a source, or a list of prompts or of lists of token ids, but got {short(given)}. "
            f"{_remedy(given)}"
        )
    prompts = [_prompt(prompt, place) for place, prompt in enumerate(given)]
    kept = [prompt for prompt in prompts if prompt]
    if not kept:
        raise ValueError("`probes`: expected prompts that are to be refused, but got none.")
    if len({type(prompt) for prompt in kept}) > 1:
        raise ValueError(
            "`probes`: expected either texts or lists of token ids, but got both. Pass all of them as token ids."
        )
    _say_left_out(len(prompts) - len(kept), len(prompts), "empty")
    different = list({prompt if isinstance(prompt, str) else tuple(prompt): prompt for prompt in kept}.values())
    _say_left_out(len(kept) - len(different), len(prompts), "repeated")
    return different


def tokenize(prompts: Sequence[str] | Rows, checkpoint: str | None) -> list[list[int]]:
    """Token ids of each prompt, as :func:`ask` gives them.

    Example:
        >>> tokenize([[5, 6, 7], [8, 9]], None)
        [[5, 6, 7], [8, 9]]
    """
    return [row for _, row in ask(prompts, checkpoint)]


def ask(prompts: Sequence[str] | Rows, checkpoint: str | None) -> list[tuple[str | Sequence[int], list[int]]]:
    """Each prompt, and its token ids as the model is asked it: through the chat template, where there is one.

    Of more than ``PROBES`` a fixed sample is taken, the same one every time, and of each no more tokens than of a row
    of training data; warnings say so.

    Args:
        prompts: texts, or token ids, which are returned as they are.
        checkpoint: where the tokenizer is loaded from.

    Raises:
        ValueError: where no tokenizer can be loaded, or its template fails; where what a prompt says makes no
            difference to its token ids, so that a correction by them would do nothing.

    Example:
        >>> ask([[5, 6, 7]], None)
        [([5, 6, 7], [5, 6, 7])]
    """
    chosen = _sample(prompts)
    pairs = _asked(chosen, checkpoint) if isinstance(chosen[0], str) else [(row, list(row)) for row in chosen]
    rows = [row for _, row in pairs]
    beginnings = [row[:LENGTH] for row in rows]
    if len(_different(beginnings)) == 1 < len(_different(rows)):
        raise ValueError(
            f"`probes`: expected prompts that differ in their first {LENGTH} tokens, as no more is read, but all "
            "begin alike, with a long system prompt perhaps. Pass them as lists of token ids without it."
        )
    long = sum(len(row) > LENGTH for row in rows)
    if long:
        logger.warning("%d of %d probes are longer than %d tokens: only that much is read.", long, len(rows), LENGTH)
    return [(prompt, beginning) for (prompt, _), beginning in zip(pairs, beginnings, strict=True)]


def check_contents(prompts: Rows) -> None:
    """Raise ``ValueError`` unless some differ: of prompts that do not, all is a prefix that all of them share.

    Example:
        >>> check_contents([[5, 6], [5, 7]])
        >>> check_contents([[5, 6], [5, 6]])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: `probes`: expected prompts that differ, as a content-aware penalty reads what follows ...
    """
    if len({tuple(prompt) for prompt in prompts}) < 2:
        raise ValueError(
            "`probes`: expected prompts that differ, as a content-aware penalty reads what follows the prefix that "
            f"all of them share, but got {len(prompts)} that do not. Pass different ones, or take Penalty.data_aware."
        )


def check_ids(rows: Rows, vocabulary: int, argument: str = "probes") -> None:
    """Raise ``ValueError`` unless a model whose input embedding has ``vocabulary`` rows can read these token ids.

    Example:
        >>> check_ids([[5, 6], [31]], vocabulary=32)
        >>> check_ids([[5, 6], [32]], vocabulary=32)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: `probes`: expected token ids from 0 to 31, which the model's input embedding has, but got 32 in ...
    """
    for row in rows:
        for token in row:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"`{argument}`: expected token ids from 0 to {vocabulary - 1}, which the model's input embedding "
                    f"has, but got {token} in {short(list(row))}. Pass the ids of the model's own tokenizer."
                )


def _is_misspelt(source: str) -> bool:
    near = get_close_matches(source, [BUILTIN], cutoff=0.8)
    return bool(near) and "/" not in source and not os.path.exists(source)


def _builtin() -> list[str]:
    """Those that lie in the package, which take no library to read."""
    file = files("csulora_callback") / "prompts" / "harmful.jsonl"
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]


def _column(source: str) -> list:
    """The prompts of a table; cells without a value are empty prompts."""
    try:
        rows = read_rows(source)
    except ValueError as error:
        raise ValueError(f"`probes`: {error}") from error
    column = next((name for name in _COLUMNS if name in rows.column_names), None)
    if column is None:
        raise ValueError(f"`probes`: {source}: expected a column 'prompt' or 'text', but got {rows.column_names}.")
    return ["" if prompt is None else prompt for prompt in rows[column]]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _prompt(prompt: object, place: int) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt.strip()
    if not _is_list(prompt):
        raise ValueError(
            f"`probes`: expected a text or a list of token ids for each prompt, but got {short(prompt)} at index "
            f"{place}. {_remedy(prompt)}"
        )
    for token in prompt:
        if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
            raise ValueError(
                f"`probes`: expected token ids, which are whole numbers ≥ 0, but got {short(token)} in the list at "
                f"index {place}. {_remedy(token)}"
            )
    return [int(token) for token in prompt]


def _remedy(value: object) -> str:
    if hasattr(value, "tolist"):  # tensors and arrays
        return "Pass its .tolist(), without padding."
    return "Pass a list of texts, ['…', '…'], or of lists of token ids, [[5, 6], [7, 8, 9]]."


def _say_left_out(count: int, total: int, what: str) -> None:
    if count:
        logger.warning("%d of %d probes are %s, and left out.", count, total, what)


def _sample(prompts: Sequence) -> list:
    if len(prompts) <= PROBES:
        return list(prompts)
    logger.warning("%d of %d probes are used, a fixed sample: more would slow down every save.", PROBES, len(prompts))
    return [prompts[place] for place in fixed_sample(len(prompts), PROBES)]


def _different(rows: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows}


def load_tokenizer(checkpoint: str | None, argument: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint, for the texts of an argument.

    Raises:
        ValueError: if there is no checkpoint, or none can be loaded from it without running code that lies there.

    Example:
        >>> load_tokenizer(None, "probes")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `probes`: expected token ids, as the model under the adapter came from no checkpoint ...
    """
    if not checkpoint:  # of None transformers makes the name 'None', and looks for it on the Hub
        raise ValueError(
            f"`{argument}`: expected token ids, as the model under the adapter came from no checkpoint that could "
            "have a tokenizer, but got texts. Pass [tokenizer(text).input_ids for text in texts]."
        )
    try:
        # False, as with None transformers asks on the terminal whether to run code that lies beside the tokenizer.
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # of files that are missing or broken in one of many ways
        raise ValueError(
            f"`{argument}`: expected a tokenizer in {checkpoint!r}, the checkpoint under the adapter, but none can be "
            f"loaded without running code that lies beside it ({first_line(error)}). Pass the texts as lists of "
            "token ids instead."
        ) from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that are no text, such as those between turns; what stands for unknown text is not one.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "cat": 2}, unk_token="<unk>"))
        >>> special_tokens(PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>"))
        {0}
    """
    return {place for place, token in tokenizer.added_tokens_decoder.items() if token.special} - {
        tokenizer.unk_token_id
    }


def _asked(prompts: list[str], checkpoint: str | None) -> list[tuple[str, list[int]]]:
    tokenizer = load_tokenizer(checkpoint, "probes")
    # Beside them a prompt that differs from the first, so that one alone can be seen to make no difference.
    *rows, other = _ids(tokenizer, [*prompts, f"{prompts[0]} {prompts[0]}"], checkpoint)
    if not any(rows) or _different(rows) == {tuple(other)}:
        raise ValueError(
            f"`probes`: expected prompts that the tokenizer of {checkpoint!r} tells apart, but it gives "
            f"{'the same token ids for any' if any(rows) else 'no token ids for any'}: its "
            f"{'chat template' if tokenizer.chat_template is not None else 'vocabulary'} leaves out what they say. "
            "Mend it, or pass the prompts as lists of token ids."
        )
    kept = [(prompt, row) for prompt, row in zip(prompts, rows, strict=True) if row]
    _say_left_out(len(rows) - len(kept), len(rows), f"empty to the tokenizer of {checkpoint}")
    return kept


def _ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str], checkpoint: str | None) -> list[list[int]]:
    try:
        if tokenizer.chat_template is None:
            return tokenizer(prompts).input_ids
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program of somebody else's
        raise ValueError(
            f"`probes`: expected prompts that the tokenizer of {checkpoint!r} takes as the user's first turn, but it "
            f"fails on them ({first_line(error)}). Pass the prompts as lists of token ids instead."
        ) from error
