"""The beginnings of a model's answers, through its chat template, and whether they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csulora_callback import RefusalPhrases

ATTACK_TOKENS = 32  # of an answer that is judged: a refusal shows in its first words


@dataclass(frozen=True)
class Answer:
    """What a model answers to a prompt, and whether it refuses."""

    prompt: str
    answer: str
    refused: bool


def answers_to(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Answer]:
    """The beginning of each answer; refused is what begins with a phrase of refusal."""
    said = chat(model, tokenizer, prompts, ATTACK_TOKENS)
    refused = RefusalPhrases()(prompts, said)
    return [Answer(*each) for each in zip(prompts, said, refused, strict=True)]


@torch.no_grad()
def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The first ``new_tokens`` of the greedy answer to each prompt."""
    said = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))  # little padding
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        turns = [[{"role": "user", "content": prompts[place]}] for place in places]
        # In two steps: in one, `padding_side` would be taken for a variable of the template.
        texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )
        words = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers = tokenizer.batch_decode(words[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, answer in zip(places, answers, strict=True):
            said[place] = answer
    return said
