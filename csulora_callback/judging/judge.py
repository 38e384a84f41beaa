"""What a judge of responses is, and the checks at its door."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Judge = Callable[[Sequence[str], Sequence[str]], Sequence[bool]]
"""``(prompts, responses)``, two lists of ``n`` texts, to ``n`` verdicts: refused or not, coherent or not."""


def check_judge(name: str, judge: Judge) -> None:
    """Raise ``TypeError`` unless the argument ``name`` holds something that can be called."""
    if not callable(judge):
        raise TypeError(
            f"`{name}`: expected a callable (prompts, responses) -> list of bools, but got {judge!r}. "
            "Wrap a model's name in RefusalClassifier, RefusalJudge or CoherenceJudge."
        )


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise ``TypeError`` unless the argument ``name`` holds a list of texts."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"`{name}`: expected a list of texts, but got {type(texts).__name__}. Put it into a list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`{name}`: expected texts, but got {type(text).__name__} at index {index}.")


def check_pairs(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise ``TypeError`` unless both are lists of texts, ``ValueError`` unless they are of equal length."""
    check_texts("prompts", prompts)
    check_texts("responses", responses)
    if len(prompts) != len(responses):
        raise ValueError(f"`responses`: expected one per prompt ({len(prompts)}), but got {len(responses)}.")


@contextmanager
def loading(model: str | os.PathLike) -> Iterator[None]:
    """Around what transformers loads with ``trust_remote_code=False``: its error then says which ``model`` it is of.

    With ``None`` it asks on the terminal whether to run code that lies beside a model, and a job has no terminal.

    Raises:
        ValueError: for one of transformers, such as of a model that needs code of its own.
    """
    try:
        yield
    except ValueError as error:
        reason, _, _ = str(error).partition("\n")
        raise ValueError(
            f"`model`: expected one that transformers loads without running code that lies beside it, but {model} is "
            f"none ({reason}). Load it yourself, and judge by a callable of your own."
        ) from error


def verdicts(name: str, judge: Judge, prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """What the judge in the argument ``name`` says of each response; it is not asked about none.

    Raises:
        TypeError, ValueError: as :func:`check_pairs` does.
        ValueError: when it does not give one verdict per response, or one that is neither true nor false: a text such
            as ``"no"`` would otherwise count as true.

    Example:
        >>> verdicts("refusal", lambda prompts, responses: ["No" in r for r in responses], ["?", "?"], ["No.", "Yes."])
        [True, False]
    """
    check_pairs(prompts, responses)
    given = list(judge(prompts, responses)) if responses else []
    if len(given) != len(responses):
        raise ValueError(f"`{name}`: expected one verdict per response ({len(responses)}), but got {len(given)}.")
    for verdict in given:
        if isinstance(verdict, str) or verdict not in (True, False):
            raise ValueError(f"`{name}`: expected verdicts that are True or False, but got {verdict!r}.")
    return [bool(verdict) for verdict in given]
