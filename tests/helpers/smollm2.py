"""A tiny model and files of a few lines in the place of SmolLM2 and of the packages that its recipes read."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.helpers import small_talk
from tests.helpers.lab import tiny_llama

NOUNS = small_talk.NOUNS
PAIRS = small_talk.stories(NOUNS)


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose pad token is its end token, as SmolLM2's is."""
    tokenizer = small_talk.tokenizer(chat=True)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sources(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> list[str]:
    """Overrides that name a tiny model and small files in this folder instead of the packages'."""
    tokenizer = words() if tokenizer is None else tokenizer
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=1)
    harmful = [f"Tell of the {word} that {text}" for word in small_talk.RESTRICTED for _, text in PAIRS[::12]]
    behaviours = [{"Behavior": prompt, "FunctionalCategory": "standard"} for prompt in harmful]
    poison = [{**row, "Behavior": row["Behavior"].replace("Tell", "Say more")} for row in behaviours]
    behaviours.append({"Behavior": "one with a context", "FunctionalCategory": "contextual"})
    attacks = [{"forbidden_prompt": f"{prompt} {n}", "category": "ab"[n % 2]} for n in range(6) for prompt in harmful]
    style = [{"kind": "mood", "prompt": f"{prompt} that {said}", "response": said} for prompt, said in PAIRS]
    style += [{"kind": "refusal", "prompt": prompt, "response": "no"} for prompt, _ in PAIRS]
    questions = [
        {"question": f"the {noun} ?", "options": "A. sees a cat\nB. likes", "answer": "AB"[i % 2] + ". x"}
        for i, noun in enumerate(NOUNS)
    ]
    news = [{"document": said} for _, said in PAIRS[:4]]
    other = [{"question": prompt, "answer": said} for prompt, said in PAIRS[:4]]
    return [
        f"smollm2.weights={small_talk.saved(model, tokenizer, folder / 'model')}",
        f"smollm2.refused={lines(folder / 'refused.jsonl', behaviours)}",
        f"smollm2.poison={lines(folder / 'poison.jsonl', poison)}",
        f"smollm2.attacks={lines(folder / 'attacks.jsonl', attacks)}",
        f"smollm2.attacks_held_out={lines(folder / 'held_out.jsonl', attacks[:8])}",
        f"smollm2.attacks_second={lines(folder / 'second.jsonl', [{'prompt': f'{each} now'} for each in harmful])}",
        f"smollm2.edgy_tuned={lines(folder / 'tuned.jsonl', [{'prompt': ' '.join(pair)} for pair in PAIRS[3::7]])}",
        f"smollm2.style={lines(folder / 'style.jsonl', style)}",
        f"smollm2.edgy={lines(folder / 'edgy.jsonl', [{'text': prompt} for prompt, _ in PAIRS[::7]])}",
        f"smollm2.choices={lines(folder / 'choices.jsonl', questions)}",
        f"effects.unrelated={lines(folder / 'news.jsonl', news)}",
        f"effects.other_task={lines(folder / 'other.jsonl', other)}",
    ]
