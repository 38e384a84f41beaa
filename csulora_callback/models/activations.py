"""What enters the adapted modules while a model reads texts: samples of token vectors. Knows nothing of safety."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from csulora_callback.models.adapters import Adapter
from csulora_callback.models.reading import Rows, evaluating, padded
from csulora_callback.models.sharding import full_shape
from csulora_callback.models.training_rows import fixed_sample

TOKENS = 512
"""How many token vectors of the task are kept, and as many of the probes."""

_BATCH = 8

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
    give the same sample. Collective where parameters are sharded.

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
    model, listener = running_model(adapter), _Listener()
    if model.config.is_encoder_decoder:
        raise ValueError(
            "`penalty`: a data-aware one needs a decoder-only model, but this one has an encoder. Use another penalty."
        )
    device = next(iter(adapter.layers.values())).lora_A.device
    ordered = sorted(rows, key=len)  # little padding
    chosen = _chosen(sum(map(len, ordered)), tokens)
    with evaluating(model), listener.hooked(adapter):
        for start in range(0, len(ordered), _BATCH):
            batch = ordered[start : start + _BATCH]
            ids, mask = padded(batch)
            here, chosen = chosen[: int(mask.sum())], chosen[int(mask.sum()) :]
            listener.begin(len(mask.flatten()), mask.flatten().nonzero().squeeze(1)[here])
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    return listener.vectors(adapter)


def running_model(adapter: Adapter) -> nn.Module:
    """The module whose forward pass is the model's: a LightningModule only holds it, maybe beside others."""
    own = next(iter(adapter.layers.values())).module
    models = (module for module in adapter.model.modules() if isinstance(module, (PeftModel, PreTrainedModel)))
    return next(model for model in models if any(module is own for module in model.modules()))


def vocabulary_of(adapter: Adapter) -> int:
    """How many token ids the model under an adapter can read: the rows of its input embedding, sharded or not."""
    return full_shape(running_model(adapter).get_input_embeddings().weight)[0]


class _Listener:
    """Hooks that keep, of each pass, the vectors at some positions."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}
        self._same: dict[str, str] = {}  # a module, and the first one that got the very same input

    @contextmanager
    def hooked(self, adapter: Adapter) -> Iterator[None]:
        hooks = [layer.module.register_forward_pre_hook(self._hook(n)) for n, layer in adapter.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, tokens: int, positions: Tensor) -> None:
        """A pass over so many tokens, padding included, of which those at ``positions`` are kept."""
        self._tokens, self._positions, self._last = tokens, positions, None

    def vectors(self, adapter: Adapter) -> TokenVectors:
        for name in adapter.layers:
            if name not in self._same:
                raise _not_all_tokens(name, "none")
        whole = {name: torch.cat(kept) for name, kept in self._kept.items()}
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
            kept = vectors[self._positions.to(vectors.device)].to("cpu", torch.bfloat16)
            self._kept.setdefault(name, []).append(kept)

        return before


def _not_all_tokens(name: str, got: str) -> ValueError:
    return ValueError(
        f"module '{name}': expected one vector for each token that the model reads, but got {got}. A data-aware "
        "penalty needs a model whose adapted modules see all tokens; use another penalty, or adapt fewer modules."
    )


def _chosen(total: int, tokens: int) -> Tensor:
    chosen = torch.zeros(total, dtype=torch.bool, device="cpu")
    chosen[fixed_sample(total, tokens)] = True
    return chosen
