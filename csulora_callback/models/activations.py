"""What enters the adapted modules while a model reads texts: samples of token vectors. Knows nothing of safety."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from itertools import accumulate

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from csulora_callback.models.adapters import Adapter
from csulora_callback.models.reading import Rows, batches_of_lengths, evaluating, padded
from csulora_callback.models.sharding import full_shape
from csulora_callback.models.training_rows import fixed_sample
from csulora_callback.models.wholes import check_reads_vectors

TOKENS = 512
"""How many token vectors of the task are kept, and as many of the probes."""

_BATCH_TOKENS = 2048  # of a pass without logits
_BATCH_TOKENS_WITH_LOGITS = 1024  # they take this many times the vocabulary
_TRANSFER = 2**26  # bytes of vectors that wait on a device, at most about, before they are moved to the host

TokenVectors = dict[str, Tensor]
"""Token vectors ``(n, d_in)`` by module name, bfloat16, on the CPU; modules that share an input share the tensor."""


@dataclass(frozen=True)
class Texts:
    """What a model reads for a data-aware correction, as token ids.

    Attributes:
        task: rows of its training data.
        probes: prompts that are to be refused.
        seen: how many rows of training data the sample ``task`` was drawn from.
        starts: of each row of ``task``, how many tokens stand before the first that the loss counts; none where
            nothing is known of that, and all of them count.
        held_back: places in ``probes`` of those that are measured by and not read.
        screened: places in ``task`` of rows whose prompt the aligned model was asked.
        refused: those of them that it refuses: such rows are not what the task is measured by.

    Example:
        >>> texts = Texts([[5, 6], [7, 8], [9]], [], 3, starts=[1, 1, 0], screened=[0, 1], refused=[1])
        >>> texts.counted
        ([[5, 6], [9]], [1, 0])
    """

    task: Rows
    probes: Rows
    seen: int
    starts: Sequence[int] = field(default_factory=list)  # lists, as JSON reads them
    held_back: Sequence[int] = field(default_factory=list)
    screened: Sequence[int] = field(default_factory=list)
    refused: Sequence[int] = field(default_factory=list)

    @property
    def read(self) -> Rows:
        """The probes that are not held back."""
        return [prompt for place, prompt in enumerate(self.probes) if place not in self.held_back]

    @property
    def counted(self) -> tuple[Rows, Sequence[int]]:
        """The rows that the task is measured by, and their ``starts``."""
        starts, left_out = self.starts or [0] * len(self.task), set(self.refused)
        kept = [place for place in range(len(self.task)) if place not in left_out]
        return [self.task[place] for place in kept], [starts[place] for place in kept]


@dataclass(frozen=True)
class Activations:
    """What a data-aware correction measures by: the token vectors that texts send into a model's adapted modules.

    Those of task and probes have to be of the same model: where the task was measured as it was trained and the probes
    after that, the same safety costs more of the task.
    """

    task: TokenVectors
    probes: TokenVectors
    texts: Texts

    @classmethod
    def read(cls, adapter: Adapter, texts: Texts) -> Activations:
        """Have the model read them, as :func:`vectors_of` does."""
        rows, _ = texts.counted
        return cls(vectors_of(adapter, rows), vectors_of(adapter, texts.read), texts)

    @cached_property
    def finite(self) -> bool:
        """Whether no vector holds NaN or Inf."""
        return all(bool(v.isfinite().all()) for kind in (self.task, self.probes) for v in kind.values())


@torch.no_grad()
def vectors_of(adapter: Adapter, rows: Rows, tokens: int = TOKENS) -> TokenVectors:
    """A sample of at most ``tokens`` of the token vectors that texts send into each adapted module.

    Runs the model as it stands, in evaluation mode; neither its weights nor any random generator change. The same rows
    give the same sample. Only what it needs is read: no text out of which no token was drawn, in a causal model none
    of a text's tokens after the last drawn one, and no logits where no adapted module comes after the model's body.
    Collective where parameters are sharded.

    Args:
        adapter: of a model that takes ``input_ids`` and ``attention_mask``.
        rows: no row gives no vectors.
        tokens: more are drawn from at random, the same places for all modules.

    Raises:
        ValueError: if the model has an encoder, or a module gets no input, or not one vector for each token.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from csulora_callback.models.adapters import find_adapter
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
        >>> vectors = vectors_of(find_adapter(model), [[5, 6, 7], [8, 9]])
        >>> query, key = vectors.values()
        >>> query.shape, query is key  # they get the same input
        (torch.Size([5, 8]), True)
    """
    rows = [row for row in rows if len(row)]
    if not rows:
        return {}
    check_reads_vectors(adapter.layers)
    model = running_model(adapter)
    if model.config.is_encoder_decoder:
        raise ValueError(
            "`penalty`: a data-aware one needs a decoder-only model, but this one has an encoder. Use another penalty."
        )
    device = adapter.device
    drawn = _draw(rows, tokens, cut=_is_causal(model))
    listener = _Listener(sum(len(text.places) for text in drawn))
    most, no_logits = _BATCH_TOKENS_WITH_LOGITS, {}
    if _reads_without_logits(model, adapter):
        most, no_logits = _BATCH_TOKENS, {"logits_to_keep": 1}  # of the last token, as 0 means all
    with evaluating(model), listener.hooked(adapter):
        for batch in batches_of_lengths([len(text.ids) for text in drawn], most):
            texts = [drawn[place] for place in batch]
            ids, mask = padded([text.ids for text in texts])
            listener.begin(ids.shape, texts)
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **no_logits)
            listener.end()
    return listener.vectors(adapter)


@dataclass(frozen=True)
class _Drawn:
    """What is read of a text: token ``ids``, of which those at ``places`` are drawn, from the ``first`` one on."""

    ids: Sequence[int]
    places: Tensor
    first: int


def _draw(rows: Rows, tokens: int, cut: bool) -> list[_Drawn]:
    """Texts out of which some token is drawn; ``cut`` after the last of them."""
    ordered = sorted(rows, key=len)
    chosen = torch.zeros(sum(map(len, ordered)), dtype=torch.bool, device="cpu")
    chosen[fixed_sample(len(chosen), tokens)] = True
    places = [own.nonzero().squeeze(1) for own in chosen.split([len(row) for row in ordered])]
    firsts = accumulate(map(len, places), initial=0)
    return [
        _Drawn(row[: int(own[-1]) + 1] if cut else row, own, first)
        for row, own, first in zip(ordered, places, firsts, strict=False)
        if len(own)
    ]


def _is_causal(model: nn.Module) -> bool:
    """Whether what a model makes of a token is known not to depend on later ones: its attention modules say so."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def _reads_without_logits(model: nn.Module, adapter: Adapter) -> bool:
    """Whether a model can leave logits out, and no adapted module would miss tokens by that.

    It goes through the model's own forward all the same: that is where engines gather weights and precision is set.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.base_model is inner:
        return False
    body = set(inner.base_model.modules())
    return "logits_to_keep" in signature(inner.forward).parameters and all(
        layer.module in body for layer in adapter.layers.values()
    )


def running_model(adapter: Adapter) -> nn.Module:
    """The module whose forward pass is the model's: a LightningModule only holds it, maybe beside others."""
    own = adapter.parts[0].module
    models = (module for module in adapter.model.modules() if isinstance(module, (PeftModel, PreTrainedModel)))
    return next(model for model in models if any(module is own for module in model.modules()))


def vocabulary_of(adapter: Adapter) -> int:
    """How many token ids the model under an adapter can read: the rows of its input embedding, sharded or not."""
    return full_shape(running_model(adapter).get_input_embeddings().weight)[0]


class _Listener:
    """Hooks that keep, of each pass, the vectors at some positions: so many in all, of each module."""

    def __init__(self, vectors: int) -> None:
        self._vectors = vectors
        self._kept: dict[str, list[Tensor]] = {}  # of each module, and each of its calls in a pass, all vectors
        self._filled: Counter[str] = Counter()
        self._same: dict[str, str] = {}  # a module, and the first one that got the very same input
        self._waiting: list[tuple[str, int, Tensor]] = []  # a module, its call, and vectors on the module's device

    @contextmanager
    def hooked(self, adapter: Adapter) -> Iterator[None]:
        hooks = [layer.module.register_forward_pre_hook(self._hook(n)) for n, layer in adapter.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, shape: torch.Size, texts: Sequence[_Drawn]) -> None:
        """A pass over ids of this shape, one row for each text."""
        self._tokens, self._last, self._calls = shape.numel(), None, Counter()
        positions = torch.cat([row * shape[1] + text.places for row, text in enumerate(texts)])
        self._positions = {positions.device: positions}
        self._into = torch.cat([text.first + torch.arange(len(text.places), device="cpu") for text in texts])

    def end(self) -> None:
        """The pass is over."""
        self._last = None
        self._move()

    def vectors(self, adapter: Adapter) -> TokenVectors:
        for name in adapter.layers:
            if name not in self._same:
                raise _not_all_tokens(name, "none")
        for name, calls in self._kept.items():
            if self._filled[name] != len(calls) * self._vectors:  # some pass left it out
                raise _not_all_tokens(name, f"{self._filled[name]} in {len(calls)} times {self._vectors}")
        whole = {name: calls[0] if len(calls) == 1 else torch.cat(calls) for name, calls in self._kept.items()}
        return {name: whole[self._same[name]] for name in adapter.layers}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def before(module: nn.Module, args: tuple) -> None:
            if self._last is not None and args[0] is self._last[1]:
                self._same[name] = self._last[0]
                return
            self._last, self._same[name] = (name, args[0]), name
            vectors = args[0].flatten(0, -2)
            if len(vectors) != self._tokens:
                raise _not_all_tokens(name, str(len(vectors)))
            kept = vectors[self._positions_on(vectors.device)].to(torch.bfloat16)
            self._waiting.append((name, self._calls[name], kept))
            self._calls[name] += 1
            if sum(waiting.nbytes for _, _, waiting in self._waiting) > _TRANSFER:
                self._move()

        return before

    def _positions_on(self, device: torch.device) -> Tensor:
        if device not in self._positions:
            self._positions[device] = next(iter(self._positions.values())).to(device)
        return self._positions[device]

    def _move(self) -> None:
        """All that waits on a device goes to the host at once: each transfer waits for what the device computes."""
        for device in {kept.device for _, _, kept in self._waiting}:
            here = [waiting for waiting in self._waiting if waiting[2].device == device]
            moved = torch.cat([kept.flatten() for _, _, kept in here]).cpu()
            parts = moved.split([kept.numel() for _, _, kept in here])
            for (name, call, kept), part in zip(here, parts, strict=True):
                calls = self._kept.setdefault(name, [])
                if call == len(calls):
                    calls.append(torch.empty(self._vectors, kept.shape[1], dtype=kept.dtype, device="cpu"))
                calls[call][self._into] = part.view_as(kept)
                self._filled[name] += len(kept)
        self._waiting = []


def _not_all_tokens(name: str, got: str) -> ValueError:
    return ValueError(
        f"module '{name}': expected one vector for each token that the model reads, but got {got}. A data-aware "
        "penalty needs a model whose adapted modules see all tokens; use another penalty, or adapt fewer modules."
    )
