"""Fine-tuning data in every format that recipes read, saying the same, and a dry run of a recipe on a file of it."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.run import main

QUESTION, ANSWER = "a b c", "c b a"


def turns(*texts: str, names: tuple[str, str] = ("user", "assistant"), keys: tuple[str, str] = ("role", "content")):
    """Messages of the user and the assistant in turn."""
    return [dict(zip(keys, (names[place % 2], text), strict=True)) for place, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[dict]:
    """The same as people shared them."""
    return turns(*texts, names=("human", "gpt"), keys=("from", "value"))


SAID = {
    "messages": {"messages": turns(QUESTION, ANSWER)},
    "sharegpt": {"conversations": sharegpt(QUESTION, ANSWER)},
    "sharegpt_roles": {"conversations": turns(QUESTION, ANSWER)},
    "texts": {"prompt": f"user : {QUESTION} <eos> ", "completion": f"assistant : {ANSWER}"},
    "conversational": {"prompt": turns(QUESTION), "completion": turns(QUESTION, ANSWER)[1:]},
    "alpaca": {"instruction": "a b", "input": "c", "output": ANSWER},
    "alpaca_alone": {"instruction": QUESTION, "input": "", "output": ANSWER},
}
"""One row of each format; in the tiny chat template of the tests all are the same tokens."""


def lines(*rows: object) -> str:
    """JSON lines."""
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def dry_run(file: Path, pair: list[str], *overrides: str) -> int:
    """Exit status of a dry run on a file, with a tiny pair."""
    return main(["recipes/llama32_1b_sft.yaml", "--dry-run", *pair, f"data.source={file}", *overrides])
