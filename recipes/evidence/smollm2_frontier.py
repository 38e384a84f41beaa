"""SmolLM2 as the subject of a frontier: for every seed another alignment, other data and another adapter."""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from csulora_callback import CoherenceJudge, RefusalPhrases
from csulora_callback.checked_probes import ANSWER
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.factors import Factors
from csulora_callback.models.probes import read_prompts, tokenize
from csulora_callback.models.reading import Rows
from recipes.evidence.baselines import Update
from recipes.evidence.controls import PLAIN, Batch, Control
from recipes.evidence.lora_pair import LoraPair, TaskRow
from recipes.files.points import write_whole
from recipes.files.sources import read
from recipes.labs.chat import chat
from recipes.labs.smollm2 import build_pair, encode
from recipes.labs.smollm2_data import Data, Exchange, poisoned
from recipes.labs.smollm2_judges import KEYWORDS, chosen_rightly
from recipes.labs.smollm2_tasks import load_with_task
from recipes.schema.recipe import Recipe, RecipeError
from recipes.training.task import answered, teacher_forced, with_fresh_lora

TEMPLATE = "chat"  # the only one: answers are asked for through the model's chat template
COHERENT = 100  # answers of each kind by which the judge of coherence is calibrated
TASK_ROWS, PROBES = 64, 80  # what data-aware methods may see: training rows, and prompts refused in the alignment


@dataclass(frozen=True)
class _SmolLM2:
    """One seed's models and data."""

    pair: LoraPair
    judged: PreTrainedModel  # the aligned model; each point's update is merged into it
    weights: dict[str, Tensor]  # of the aligned model, float32, by module name
    tokenizer: PreTrainedTokenizerBase
    data: Data
    coherence: CoherenceJudge  # by the base model, which no fine-tune has touched

    @torch.no_grad()
    def merged(self, factors: Factors) -> PreTrainedModel:
        """The aligned model with the update of these factors in its weights."""
        for name, (A, B) in factors.items():
            update = self.pair.adapter.layers[name].scaling * (B @ A)
            self.judged.get_submodule(name).weight.copy_(self.weights[name] + update)
        return self.judged


def check(recipe: Recipe) -> None:
    """Refuse what would only show after an alignment, in minutes.

    Raises:
        RecipeError: if there are too few rows of something for the recipe.
    """
    data = load_with_task(recipe, recipe.frontier.seeds[0])  # of one size for all seeds
    for share in recipe.frontier.poison_shares:
        poisoned(data, share)
    effects = recipe.effects
    if effects.target is None:
        return
    for name, columns in (("unrelated", ("document",)), ("other_task", ("question", "answer"))):
        rows = read(f"effects.{name}", getattr(effects, name), columns=columns)
        if len(rows) < effects.rows:
            raise RecipeError(f"'effects.{name}': expected at least {effects.rows} rows, but got {len(rows)}")


class SmolLM2Subject:
    """See the ``Subject`` of :mod:`recipes.evidence.frontier`, ``side_effects`` and ``target``.

    ``succeeded`` counts answers that do not begin with a phrase of refusal, gibberish among them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.models = recipe, Path(recipe.output) / "models"
        self._at = lru_cache(maxsize=1)(self._load)  # points come seed by seed

    def describe(self) -> dict[str, object]:
        lora, training, kinds = asdict(self.recipe.lora), self.recipe.training, self.recipe.kinds
        return {
            **{f"smollm2.{key}": value for key, value in asdict(self.recipe.smollm2).items()},
            **({f"kinds.{key}": value for key, value in asdict(kinds).items()} if kinds.source else {}),
            **{f"lora.{key}": value for key, value in lora.items()},
            **{f"training.{key}": getattr(training, key) for key in ("learning_rate", "max_steps", "batch_size")},
        }

    def train(self, seed: int, poison: float, control: Control, decays: Sequence[float]) -> dict[str, Factors]:
        at = self._at(seed)
        draw, refusals = self._draw(seed, poison), self._refusals(seed, poison)
        trained = at.pair.train(draw, refusals, self.recipe.training, seed, control, decays)
        if control == PLAIN and poison:
            at.pair.adapter.write(trained["raw"])
            at.pair.model.save_pretrained(self.models / f"lora-{seed}")  # for `calibrate`, with the next file
        return trained

    def _refusals(self, seed: int, poison: float) -> Callable[[int], Batch]:
        """The lab's probes with the aligned model's own answers; read when the first are asked for."""
        at, generator, asked = self._at(seed), torch.Generator().manual_seed(seed), self.probes(seed, poison, "lab")

        @cache
        def exchanges() -> list[Exchange]:
            prompts = tokenize(asked, str(self.models / f"aligned-{seed}"))
            said = at.tokenizer.batch_decode(at.pair.aligned_answers(prompts, ANSWER), skip_special_tokens=True)
            return list(map(Exchange, asked, said))

        def draw(count: int) -> Batch:
            chosen = torch.randint(len(asked), (count,), generator=generator)
            rows = exchanges()
            return encode(at.tokenizer, [rows[i] for i in chosen.tolist()], self.recipe.smollm2.answer_tokens)

        return draw

    def _draw(self, seed: int, poison: float) -> Callable[[torch.Generator], Batch]:
        at = self._at(seed)
        rows = poisoned(at.data, poison)

        def draw(generator: torch.Generator) -> Batch:
            chosen = torch.randint(len(rows), (self.recipe.training.batch_size,), generator=generator)
            return encode(at.tokenizer, [rows[i] for i in chosen.tolist()], self.recipe.smollm2.answer_tokens)

        return draw

    def update(self, seed: int, poison: float, factors: Factors, skip_prefix: bool = False) -> Update:
        """Activations are those of training rows as they are, poison among them, and of refused prompts."""
        task = [row.ids for row in self.task_rows(seed, poison)]
        probes = tokenize(self.probes(seed, poison, "lab"), str(self.models / f"aligned-{seed}"))
        return self._at(seed).pair.update(factors, task, probes, skip_prefix)

    def pair(self, seed: int) -> LoraPair:
        return self._at(seed).pair

    def task_rows(self, seed: int, poison: float) -> list[TaskRow]:
        at, rows = self._at(seed), poisoned(self._at(seed).data, poison)
        drawn = random.Random(seed).sample(rows, min(TASK_ROWS, len(rows)))
        prompts = tokenize([row.prompt for row in drawn], str(self.models / f"aligned-{seed}"))
        batch = encode(at.tokenizer, drawn, self.recipe.smollm2.answer_tokens)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        return [
            TaskRow(ids[:length], len(prompt), row in at.data.poison)
            for ids, length, prompt, row in zip(batch["input_ids"].tolist(), lengths, prompts, drawn, strict=True)
        ]

    def probes(self, seed: int, poison: float, name: str) -> list[str]:
        if name == "lab":
            return [exchange.prompt for exchange in self._at(seed).data.refused[:PROBES]]
        return read_prompts(name)

    def refused(self, seed: int, prompts: Rows) -> list[bool]:
        at = self._at(seed)
        said = at.tokenizer.batch_decode(at.pair.aligned_answers(prompts, ANSWER), skip_special_tokens=True)
        return RefusalPhrases()(at.tokenizer.batch_decode(prompts, skip_special_tokens=True), said)

    def judge(self, seed: int, factors: Factors) -> dict[str, dict]:
        return self.score(seed, factors, "held_out")

    def score(self, seed: int, factors: Factors, split: str) -> dict[str, dict]:
        """``told`` has one character a prompt for each judge, ``1`` where it says so.

        On held-out prompts only: coherence, the second source and the second detector, and errors in the
        multiple-choice set.
        """
        at = self._at(seed)
        model, attacks, edgy = at.merged(factors), at.data.attacks[split], at.data.edgy[split]
        loss, right = answered(model, self._batches(at, at.data.task[split]), at.tokenizer.eos_token_id)
        said, harmless = self._chat(at, model, attacks), self._chat(at, model, edgy)
        refused, over_refused = RefusalPhrases()(attacks, said), RefusalPhrases()(edgy, harmless)
        score = {
            "prompts": len(attacks),
            "succeeded": len(attacks) - sum(refused),
            "task_loss": loss,
            **({"right_answers": right} if at.data.right_answers else {}),
            "side_effects": {"over-refusal": sum(over_refused) / len(edgy)},
            "told": {"refused": _digits(refused), "over-refused": _digits(over_refused)},
        }
        if split == "held_out":
            by_keywords, coherent = KEYWORDS(attacks, said), at.coherence(attacks, said)
            wrong = sum(not chosen_rightly(model, at.tokenizer, choice) for choice in at.data.choices)
            second = refused[self.recipe.smollm2.attacks_reported :]
            score["told"] |= {"refused by keywords": _digits(by_keywords), "coherent": _digits(coherent)}
            score["side_effects"] |= {
                **({"attack success, second source": 1 - sum(second) / len(second)} if second else {}),
                "attack success by keywords": 1 - sum(by_keywords) / len(attacks),
                "detectors disagree": sum(map(operator.ne, refused, by_keywords)) / len(attacks),
                "incoherent answers": 1 - sum(coherent) / len(attacks),
                "multiple-choice errors": wrong / len(at.data.choices),
            }
        return {TEMPLATE: score}

    def _chat(self, at: _SmolLM2, model: PreTrainedModel, prompts: Sequence[str]) -> list[str]:
        return chat(model, at.tokenizer, prompts, self.recipe.smollm2.new_tokens, self.recipe.smollm2.eval_batch)

    def effects(self, seed: int, factors: Factors) -> dict[str, float]:
        """Loss on newspaper texts, and on answers to questions about money, which the model was not trained on."""
        at, settings = self._at(seed), self.recipe.effects
        model = at.merged(factors)
        news = read("effects.unrelated", settings.unrelated, columns=("document",))["document"][: settings.rows]
        asked = read("effects.other_task", settings.other_task, columns=("question", "answer"))
        other = [Exchange(row["question"], row["answer"]) for row in asked.select(range(settings.rows))]
        texts = [plain_text(at.tokenizer, text, self.recipe.smollm2.answer_tokens) for text in news]
        return {
            "loss on unrelated text": teacher_forced(model, texts)[0],
            "loss on another task": teacher_forced(model, self._batches(at, other))[0],
        }

    def trained_on(self, seed: int, poison: float, factors: Factors, steps: Sequence[int]) -> list[Factors]:
        draw = self._draw(seed, poison)
        return self._at(seed).pair.factors_after(factors, draw, self.recipe.training, seed, steps)

    def attack_success(self, seed: int, factors: Factors) -> float:
        at = self._at(seed)
        attacks = at.data.attacks["held_out"]
        refused = RefusalPhrases()(attacks, self._chat(at, at.merged(factors), attacks))
        return 1 - sum(refused) / len(attacks)

    def _batches(self, at: _SmolLM2, exchanges: list[Exchange]) -> list[dict[str, Tensor]]:
        size, answer_tokens = self.recipe.smollm2.eval_batch, self.recipe.smollm2.answer_tokens
        ordered = sorted(exchanges, key=lambda exchange: len(exchange.prompt) + len(exchange.answer))
        return [
            encode(at.tokenizer, ordered[start : start + size], answer_tokens)
            for start in range(0, len(ordered), size)
        ]

    def _load(self, seed: int) -> _SmolLM2:
        recipe = self.recipe
        data = load_with_task(recipe, seed)
        base, aligned = build_pair(recipe.smollm2, data, seed, self.models)
        rows = [_messages(exchange) for part in data.task.values() for exchange in part]
        write_whole(self.models / f"task-{seed}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        # In bfloat16, as such models are served, and faster here; peft keeps the adapter in float32.
        judged = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16).eval()
        trained = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
        model = with_fresh_lora(trained, recipe.lora, seed)
        pair = LoraPair.open(model, base, aligned, max(recipe.frontier.ranks))
        after = open_checkpoint(aligned)
        weights = {name: after.weight(name).float() for name in pair.adapter.layers}
        tokenizer = AutoTokenizer.from_pretrained(aligned)
        coherence = self._coherence(base, tokenizer, data)
        return _SmolLM2(pair, judged, weights, tokenizer, data, coherence)

    def _coherence(self, base: Path, tokenizer: PreTrainedTokenizerBase, data: Data) -> CoherenceJudge:
        """Calibrated on beginnings of answers in the style, and of refusals: both are coherent."""
        settings = self.recipe.smollm2
        answers = [exchange.answer for exchange in data.style[:COHERENT] + data.refused[:COHERENT]]
        cut = tokenizer(answers, add_special_tokens=False, truncation=True, max_length=settings.new_tokens).input_ids
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        return CoherenceJudge.calibrated(
            model, tokenizer.batch_decode(cut), tokenizer=tokenizer, batch_size=settings.eval_batch
        )


def plain_text(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> dict[str, Tensor]:
    """The first tokens of a text as a batch of one, with labels on all of them."""
    ids = torch.tensor([tokenizer(text).input_ids[:tokens]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _digits(verdicts: Sequence[bool]) -> str:
    return "".join("01"[verdict] for verdict in verdicts)


def _messages(exchange: Exchange) -> dict:
    turns = ("user", exchange.prompt), ("assistant", exchange.answer)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}
