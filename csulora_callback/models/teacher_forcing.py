"""What a model, as it stands, says of given texts in one pass, and what it would answer. Knows nothing of safety."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from csulora_callback.models.activations import running_model
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.reading import Inputs, Rows, batches_of_lengths, evaluating, padded

_BATCH_TOKENS = 1024  # their logits take this many times the vocabulary in float32
_BATCH_PROMPTS, _PROMPT_TOKENS = 32, 4096  # of what is answered together; a model may say logits of all of them
_CACHE_NAMES = ("cache", "past_key_values")  # of keys and values, in newer and older versions of transformers


@dataclass(frozen=True)
class Predicted:
    """What is said of a text: ``logits (t, vocabulary)`` in float32 for its last tokens, and these ``tokens (t,)``."""

    logits: Tensor
    tokens: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """Of each token, ``(t,)``."""
        return -torch.nn.functional.cross_entropy(self.logits, self.tokens, reduction="none")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest after those before it: generating greedily would give just these."""
        return bool((self.logits.argmax(-1) == self.tokens).all())


@dataclass(frozen=True)
class Batch:
    """Some texts that are read in one pass.

    Attributes:
        places: where they stand among all.
        rows: token ids.
        starts: of each text, the place of the first token that is to be predicted; at least 1.
        inputs: what the model gets beside the ids, of a text that is read alone.
    """

    places: Sequence[int]
    rows: Rows
    starts: Sequence[int]
    inputs: Inputs

    @torch.no_grad()
    def read(self, adapter: Adapter) -> list[Predicted]:
        """What the model of an adapter, as it stands, says of them.

        In evaluation mode; neither weights nor any random generator change. Collective where parameters are sharded.
        """
        model, device = running_model(adapter), adapter.device
        ids, mask = (tensor.to(device) for tensor in padded(self.rows))
        others = {name: value.to(device) for name, value in self.inputs.items()}
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **others).logits
        return [
            Predicted(logits[i, start - 1 : len(row) - 1].float(), ids[i, start : len(row)])
            for i, (row, start) in enumerate(zip(self.rows, self.starts, strict=True))
        ]


def batches_of(rows: Rows, starts: Sequence[int], inputs: Sequence[Inputs] = ()) -> list[Batch]:
    """Batches of texts of about the same length, of bounded size; texts without a token to predict are left out.

    Args:
        rows: token ids.
        starts: of each text, the place of the first token that is to be predicted. Nothing predicts the first of all.
        inputs: what the model gets beside the ids of each; such a text is a batch. None has any by default.

    Example:
        >>> [batch.places for batch in batches_of([[5, 6, 7], [8], [9, 10]], [0, 0, 1])]
        [[2, 0]]
    """
    starts = [max(start, 1) for start in starts]
    wanted = [place for place, (row, start) in enumerate(zip(rows, starts, strict=True)) if start < len(row)]
    others = dict(enumerate(inputs))
    alone = [i for i, place in enumerate(wanted) if others.get(place)]
    batches = batches_of_lengths([len(rows[place]) for place in wanted], _BATCH_TOKENS, alone)
    places = [[wanted[i] for i in batch] for batch in batches]
    return [
        Batch(batch, [rows[p] for p in batch], [starts[p] for p in batch], others.get(batch[0], {}))
        for batch in places
    ]


@torch.no_grad()
def greedy_answers(
    model: nn.Module, prompts: Rows, tokens: int, progress: bool = False, padding: bool = False
) -> list[list[int]]:
    """The first tokens of what a model, as it stands, answers greedily: nothing but the argmax.

    An answer ends with the first end-of-sequence token in it. As :meth:`Batch.read`, it leaves the model as it was,
    and is collective where parameters are sharded.

    Args:
        model: a decoder-only one of transformers that takes ``input_ids``, or its ``PeftModel``.
        prompts: token ids; none is empty.
        tokens: how many of each answer.
        progress: show a progress bar.
        padding: answer prompts of different lengths together, padded on the left, where the model takes
            ``position_ids``. That is some times as fast where there are many lengths, and decides near ties
            otherwise, which in bfloat16 there are. Without it prompts of one length are answered together, and each
            answer is the one that the prompt gets alone.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> answers = greedy_answers(LlamaForCausalLM(config), [[5, 6, 7], [8, 9]], tokens=4)
        >>> [len(answer) <= 4 for answer in answers]
        [True, True]
    """
    ends = end_tokens(model)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), tqdm(total=len(prompts), desc="asking", unit="prompt", disable=not progress) as bar:
        for batch in _together(prompts, padding and _takes_positions(model)):
            said = _continue(model, [prompts[place] for place in batch], tokens)
            for place, answer in zip(batch, said, strict=True):
                answers[place] = _until_end(answer, ends)
            bar.update(len(batch))
    return answers


def _together(prompts: Rows, padding: bool) -> Iterator[list[int]]:
    """Places of prompts that are answered together: of one length, or of about the same."""
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    groups = [places] if padding else (list(group) for _, group in groupby(places, lambda place: len(prompts[place])))
    for group in groups:
        batch: list[int] = []
        for place in group:
            if batch and (len(batch) == _BATCH_PROMPTS or (len(batch) + 1) * len(prompts[place]) > _PROMPT_TOKENS):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch


def end_tokens(model: nn.Module) -> list[int]:
    """The token ids that end an answer of a model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, eos_token_id=[3, 4])
        >>> end_tokens(GPT2LMHeadModel(config))
        [3, 4]
    """
    ends = (model.generation_config or model.config).eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a model reads at most, prompt and answer together; ``None`` where it knows no limit.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM
        >>> most_tokens(GPT2LMHeadModel(GPT2Config(n_positions=64, vocab_size=32, n_embd=8, n_layer=1, n_head=2)))
        64
        >>> most_tokens(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1))) is None
        True
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _continue(model: nn.Module, prompts: Rows, tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts, through the model's own forward: engines gather weights in it."""
    length, device = max(map(len, prompts)), model.get_input_embeddings().weight.device
    text = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    is_padded, cached = not mask.all(), {}
    for _ in range(tokens):
        ids = text[:, -1:] if cached else text
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        where = {"attention_mask": mask, "position_ids": positions} if is_padded else {}
        output = model(input_ids=ids, use_cache=True, **where, **cached)
        text = torch.cat([text, output.logits[:, -1:].argmax(-1).to(device)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        # Models that keep another state, or none, read the whole text again.
        name = next((name for name in _CACHE_NAMES if name in output), None)
        cached = {} if name is None else {name: output[name]}
    return text[:, length:].tolist()


def _takes_positions(model: nn.Module) -> bool:
    """Otherwise padding on the left would move the text, or be read as a part of it, as by models with a state."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in signature(inner.forward).parameters


def _until_end(answer: list[int], ends: Sequence[int]) -> list[int]:
    length = next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))
    return answer[:length]
