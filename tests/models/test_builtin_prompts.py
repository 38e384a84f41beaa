"""The prompts in the package: as many, as different and as evenly spread as their README says."""

import difflib
import itertools
import json
from collections import Counter
from importlib.resources import files

import pytest

from csulora_callback.models.probes import PROBES, read_prompts
from csulora_callback.models.sources import read_rows

NAMES = ("harmful", "harmless")
CATEGORIES = {
    *("violence", "weapons", "drugs", "cybercrime", "fraud", "theft", "hate", "harassment", "privacy", "deception"),
}


def rows(name: str) -> list[dict]:
    text = (files("csulora_callback") / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(prompt: str) -> frozenset[str]:
    return frozenset(word.strip(".,?!") for word in prompt.lower().split())


@pytest.mark.parametrize("name", NAMES)
def test_categories_and_kinds_are_balanced(name):
    counts = Counter((row["category"], row["kind"]) for row in rows(name))
    assert counts == dict.fromkeys(itertools.product(CATEGORIES, ("question", "instruction")), 8)
    assert len(rows(name)) == 160 <= PROBES  # all of them are asked
    for row in rows(name):
        assert row.keys() == {"prompt", "category", "kind"}
        assert row["prompt"].endswith("?" if row["kind"] == "question" else ".")
        assert 25 <= len(row["prompt"]) <= 100
        assert row["prompt"] == row["prompt"].strip()
        assert row["prompt"].isascii()


def test_no_two_are_nearly_the_same():
    prompts = {name: [row["prompt"] for row in rows(name)] for name in NAMES}
    everything = [*prompts["harmful"], *prompts["harmless"]]
    assert len({prompt.lower() for prompt in everything}) == len(everything)
    for name in NAMES:
        for one, other in itertools.combinations(prompts[name], 2):
            if len(words(one) & words(other)) / len(words(one) | words(other)) > 0.35:
                assert difflib.SequenceMatcher(None, one, other).ratio() < 0.8, (one, other)
            assert len(words(one) & words(other)) / len(words(one) | words(other)) < 0.5, (one, other)


def test_a_harmless_one_stands_where_the_harmful_one_is_that_it_looks_like():
    pairs = list(zip(rows("harmful"), rows("harmless"), strict=True))
    assert all((a["category"], a["kind"]) == (b["category"], b["kind"]) for a, b in pairs)

    def alike(ones: list[str], others: list[str]) -> float:
        shared = (len(words(a) & words(b)) / len(words(a) | words(b)) for a, b in zip(ones, others, strict=True))
        return sum(shared) / len(ones)

    harmful, harmless = ([row["prompt"] for row in side] for side in zip(*pairs, strict=True))
    assert alike(harmful, harmless) > 2 * alike(harmful, [*harmless[1:], harmless[0]])


def test_the_harmful_ones_are_the_builtin_probes():
    assert read_prompts("builtin") == [row["prompt"] for row in rows("harmful")]


def test_both_are_sources_of_rows():
    for name in NAMES:
        assert read_rows(f"csulora_callback:prompts/{name}.jsonl")["prompt"][:] == [r["prompt"] for r in rows(name)]
