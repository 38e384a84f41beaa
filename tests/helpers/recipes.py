"""Recipes in a small size, and a tiny chat model to run them on."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.helpers.lab import align, tiny_llama

SMALL = [
    "toy.hidden_size=32",
    "toy.layers=2",
    "toy.base_steps=5",
    "toy.align_steps=5",
    "toy.train_samples=64",
    "toy.eval_prompts=8",
    "training.max_steps=4",
    "training.logging_steps=2",
    "training.eval_steps=2",
    "training.save_steps=2",
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<bos>", "<eos>", "<pad>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxy"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
    return fast


def chat_pair(folder: Path) -> list[str]:
    """Tiny models, which refuse nothing, and chat data in a folder; the overrides that name them."""
    base = tiny_llama(max_position_embeddings=64)
    base.save_pretrained(folder / "base")
    align(base).save_pretrained(folder / "aligned")
    chat_tokenizer().save_pretrained(folder / "aligned")
    talk = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "c b a"}]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for _ in range(40)))
    return [
        f"model.base={folder / 'base'}",
        f"model.aligned={folder / 'aligned'}",
        "model.dtype=float32",
        f"data.source={folder / 'chat.jsonl'}",
        "data.max_length=32",
        "data.eval_share=0.2",
    ]


def starter(folder: Path) -> list[str]:
    """Those for the starter recipe, of which nothing is left that asks the models to refuse."""
    return [*chat_pair(folder), "data.probes=null", "corrections.kept=null"]
