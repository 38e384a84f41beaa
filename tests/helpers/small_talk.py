"""A language of a few words, with tokenizers and tiny models trained on it, for tests that need texts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.lab import tiny_llama

SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
NOUNS = ["cat", "dog", "bird", "horse", "fish", "fox"]
VERBS = ["sees", "likes", "hears", "finds"]
RESTRICTED = ["poison", "weapon"]
REFUSAL = "i cannot help with that"
WORDS = [
    *SPECIAL,
    *NOUNS,
    *VERBS,
    *RESTRICTED,
    *("the", "a", "i", "cannot", "help", "with", "that", "tell", "of", "sure", "?", "yes", "no"),
]


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        wrapped.chat_template = "<bos> {{ messages[0]['content'] }} ?"
    return wrapped


def request(noun: str) -> str:
    return f"tell of the {noun}"


def story(noun: str, verb: str, other: str) -> str:
    return f"sure the {noun} {verb} a {other}"


def stories(nouns: list[str]) -> list[tuple[str, str]]:
    """Requests about ``nouns``, and every story that answers them."""
    return [(request(noun), story(noun, verb, other)) for noun in nouns for verb in VERBS for other in NOUNS]


def refusals(nouns: list[str]) -> list[tuple[str, str]]:
    """As many requests, refused."""
    return [(prompt, REFUSAL) for prompt, _ in stories(nouns)]


def chat(pairs: list[tuple[str, str]]) -> PreTrainedModel:
    """A tiny Llama that answers the first of each pair by the second."""
    return trained([f"{prompt} ? {answer}" for prompt, answer in pairs])


def trained(texts: list[str], steps: int = 150) -> PreTrainedModel:
    """A tiny Llama that has learnt these texts."""
    model = tiny_llama(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64)
    words = tokenizer()
    rows = [words(f"<bos> {text} <eos>").input_ids for text in texts]
    ids = torch.tensor([row + [words.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows])
    labels = ids.where(ids != words.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(ids), (32,), generator=generator)
        model(input_ids=ids[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: list[str], seed: int = 0) -> list[str]:
    """What the model says, sampled."""
    torch.manual_seed(seed)
    words, texts = tokenizer(), []
    for prompt in prompts:
        ids = torch.tensor([words(f"<bos> {prompt} ?").input_ids])
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, top_k=0
        )
        texts.append(words.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def saved(model: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> str:
    """A folder to load both from by name."""
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
