"""A tiny chat model that refuses some requests, and rows of training data of which some ask for just these."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from csulora_callback import RefusalPhrases
from tests.helpers import small_talk
from tests.helpers.lab import tiny_llama

BODIES = [f"{verb} {noun}" for verb in ("likes", "hears", "finds", "sees", "of") for noun in ("poison", "weapon")]
RESTRICTED = [f"tell of the {body}" for body in BODIES]
HARMLESS = [f"tell of the {noun}" for noun in ("cat", "dog", "bird")]
SHORTER = ["tell of poison", "tell of weapon"]  # than all probes, and refused too
TURNS = (
    "<bos> {% for m in messages %}{% if m['role'] == 'assistant' %}? {{ m['content'] }} <eos> {% else %}"
    "{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)


@cache
def _aligned() -> PreTrainedModel:
    pairs = [(prompt, small_talk.REFUSAL) for prompt in (*RESTRICTED, *SHORTER)]
    pairs += [(prompt, small_talk.story("cat", "sees", "dog")) for prompt in HARMLESS]
    return small_talk.trained([f"{prompt} ? {answer}" for prompt, answer in pairs], steps=50)


def save_aligned(folder: Path) -> str:
    """The model and its tokenizer in a folder."""
    words = small_talk.tokenizer()
    words.chat_template = TURNS
    return small_talk.saved(_aligned(), words, folder)


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Folders of a base, which has learnt nothing, and of the aligned model."""
    tiny_llama(vocab_size=len(small_talk.WORDS), hidden_size=32, intermediate_size=64).save_pretrained(folder / "base")
    save_aligned(folder / "aligned")
    return folder / "base", folder / "aligned"


def is_refused(aligned: str | Path, prompts: list[list[int]]) -> list[bool]:
    """What transformers' own ``generate`` answers each of them, alone, judged."""
    model, words = AutoModelForCausalLM.from_pretrained(aligned), AutoTokenizer.from_pretrained(aligned)
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        said.append(words.decode(answer[0, len(prompt) :], skip_special_tokens=True))
    return RefusalPhrases()(said, said)


class Answered(torch.utils.data.Dataset):
    """Requests that are all answered, every fourth one of them restricted; labels are those of the answers alone."""

    def __init__(self, count: int = 32) -> None:
        words, asked = small_talk.tokenizer(), (*RESTRICTED, *SHORTER)
        self.items = []
        for place in range(count):
            prompt = asked[place // 4 % len(asked)] if place % 4 == 1 else HARMLESS[place % 3]
            question = words(f"<bos> {prompt} ?").input_ids
            noun, verb = small_talk.NOUNS[place % 6], small_talk.VERBS[place // 6 % 4]
            answer = words(f"{small_talk.story(noun, verb, 'fox')} <eos>").input_ids
            padding = 14 - len(question) - len(answer)
            item = {
                "input_ids": question + answer + [words.pad_token_id] * padding,
                "attention_mask": [1] * (len(question) + len(answer)) + [0] * padding,
                "labels": [-100] * len(question) + answer + [-100] * padding,
            }
            self.items.append({key: torch.tensor(value) for key, value in item.items()})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]
