"""What enters the adapted modules while a model reads texts: samples of token vectors. Knows nothing of safety."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from inspect import signature
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from csulora_callback.models.adapters import Adapter
from csulora_callback.models.beside_ids import placeholders_of
from csulora_callback.models.fused_experts import check_inputs
from csulora_callback.models.known_inputs import known_inputs
from csulora_callback.models.listening import Listener, TokenVectors, draw
from csulora_callback.models.reading import Inputs, Rows, batches_of_lengths, evaluating, padded, shared_prefix
from csulora_callback.models.sharding import full_shape
from csulora_callback.models.wholes import check_reads_vectors

TOKENS = 512
"""How many token vectors of the task are kept, and as many of the probes."""

_BATCH_TOKENS = 2048  # of a pass without logits
_BATCH_TOKENS_WITH_LOGITS = 1024  # they take this many times the vocabulary


class Counted(NamedTuple):
    """Rows that the task is measured by, their ``starts``, and what the model gets beside the ids of each."""

    rows: Rows
    starts: Sequence[int]
    inputs: Sequence[Inputs]


@dataclass(frozen=True)
class Texts:
    """What a model reads for a data-aware correction, as token ids, and in memory what else it got with them.

    Attributes:
        task: rows of its training data.
        probes: prompts that are to be refused.
        seen: how many rows of training data the sample ``task`` was drawn from.
        starts: of each row of ``task``, how many tokens stand before the first that the loss counts; none where
            nothing is known of that, and all of them count.
        held_back: places in ``probes`` of those that are measured by and not read.
        screened: places in ``task`` of rows whose prompt the aligned model was asked.
        refused: those of them that it refuses: such rows are not what the task is measured by.
        inputs: what the model got beside ids, images say, by place in ``task``; ``None`` where it did and that is not
            known, as files hold ids alone. Such a row is never read: its placeholders would pass for text.
        left_out: how many rows of training data are in no sample, as it is not certain what belongs to them.

    Example:
        >>> texts = Texts([[5, 6], [7, 8], [9]], [], 3, starts=[1, 1, 0], screened=[0, 1], refused=[1])
        >>> texts.counted
        Counted(rows=[[5, 6], [9]], starts=[1, 0], inputs=[{}, {}])
        >>> Texts.from_json({"task": [[5], [6]], "probes": [], "seen": 2, "with_inputs": [0]}).counted.rows
        [[6]]
    """

    task: Rows
    probes: Rows
    seen: int
    starts: Sequence[int] = field(default_factory=list)  # lists, as JSON reads them
    held_back: Sequence[int] = field(default_factory=list)
    screened: Sequence[int] = field(default_factory=list)
    refused: Sequence[int] = field(default_factory=list)
    inputs: Mapping[int, Inputs | None] = field(default_factory=dict)
    left_out: int = 0

    def to_json(self) -> dict:
        """What files hold: of the inputs, where there are some."""
        return {**asdict(replace(self, inputs={})), "with_inputs": sorted(self.inputs)}

    @classmethod
    def from_json(cls, kept: Mapping) -> Texts:
        """What :meth:`to_json` gave, or what an earlier version did, that knew of no inputs."""
        known = {name: value for name, value in kept.items() if name not in ("inputs", "with_inputs")}
        return cls(**known, inputs=dict.fromkeys(kept.get("with_inputs", ())))

    @property
    def unreadable(self) -> list[int]:
        """Places in ``task`` of rows that the model got more with than is known."""
        return [place for place, own in self.inputs.items() if own is None]

    @property
    def read(self) -> Rows:
        """The probes that are not held back."""
        return [prompt for place, prompt in enumerate(self.probes) if place not in self.held_back]

    @property
    def counted(self) -> Counted:
        """The rows that the task is measured by."""
        starts, left_out = self.starts or [0] * len(self.task), {*self.refused, *self.unreadable}
        kept = [place for place in range(len(self.task)) if place not in left_out]
        rows, inputs = [self.task[place] for place in kept], [self.inputs.get(place, {}) for place in kept]
        return Counted(rows, [starts[place] for place in kept], inputs)


@dataclass(frozen=True)
class Activations:
    """What a data-aware correction measures by: the token vectors that texts send into a model's adapted modules.

    Those of task and probes have to be of the same model: where the task was measured as it was trained and the probes
    after that, the same safety costs more of the task.

    Attributes:
        task: of the rows that count, all tokens.
        probes: of those that are not held back.
        texts: what was read.
        skips_prefix: whether there are none of the prefix that all probes share, as for a content-aware correction.
    """

    task: TokenVectors
    probes: TokenVectors
    texts: Texts
    skips_prefix: bool = False

    @classmethod
    def read(cls, adapter: Adapter, texts: Texts, skip_prefix: bool = False) -> Activations:
        """Have the model read them, as :func:`vectors_of` does.

        Of modules that the probes do not reach nothing is read: nothing of them is attenuated.

        Args:
            adapter: in its model.
            texts: what is read.
            skip_prefix: whether no vectors of the prefix are kept that all probes share, those held back among them.
        """
        rows, _, inputs = texts.counted
        probes = vectors_of(adapter, texts.read, start=shared_prefix(texts.probes) if skip_prefix else 0)
        task = vectors_of(adapter, rows, inputs=inputs, modules=probes or None)
        return cls(task, probes, texts, skip_prefix)

    def unreached(self, adapter: Adapter) -> str | None:
        """What to say of the modules that no probe reaches; ``None`` where there are none."""
        names = [name for name in adapter.layers if name not in self.probes] if self.texts.read else []
        if not names:
            return None
        return (
            f"No prompt reaches {len(names)} of {len(adapter.layers)} adapted modules, such as '{names[0]}', as one "
            "without images does not reach a vision tower: a data-aware penalty leaves them as they were trained. "
            "Penalty.guard(10) corrects them too."
        )

    @cached_property
    def finite(self) -> bool:
        """Whether no vector holds NaN or Inf."""
        return all(bool(v.isfinite().all()) for kind in (self.task, self.probes) for v in kind.values())


@torch.no_grad()
def vectors_of(
    adapter: Adapter,
    rows: Rows,
    tokens: int = TOKENS,
    inputs: Sequence[Inputs] = (),
    modules: Collection[str] | None = None,
    start: int = 0,
) -> TokenVectors:
    """A sample of at most ``tokens`` of the token vectors that texts send into each adapted module.

    A module outside the language model that they do not reach, as one of a vision tower, has none.

    Runs the model as it stands, in evaluation mode; neither its weights nor any random generator change. The same rows
    give the same sample. Only what it needs is read: no text out of which no token was drawn, in a causal model none
    of a text's tokens after the last drawn one, and no logits where no adapted module comes after the model's body.
    Collective where parameters are sharded. Of inputs that follow from the texts alone, see :func:`.known_inputs`.

    Args:
        adapter: of a model that takes ``input_ids`` and ``attention_mask``.
        rows: no row gives no vectors.
        tokens: more are drawn from at random, the same places for all modules.
        inputs: what the model gets beside the ids of each row; no row has any by default.
        modules: of which vectors are kept; all by default.
        start: how many tokens at the beginning of each row, which is longer, are read and not drawn.

    Raises:
        ValueError: if the model is not a causal language model, or a module gets no input, or not one vector for each
            token.

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
    check_inputs(adapter.layers)
    pairs = [(row, own) for row, own in zip(rows, inputs or [{}] * len(rows), strict=True) if len(row)]
    if not pairs:
        return {}
    check_reads_vectors(adapter.layers)
    model = running_model(adapter)
    refuse_unless_causal(adapter, "penalty")
    known = known_inputs(adapter, model.get_input_embeddings(), [row[start:] for row, _ in pairs])
    wanted = adapter.layers.keys() if modules is None else modules
    layers = {n: layer.module for n, layer in adapter.layers.items() if n in wanted and n not in known}
    known = {name: vectors for name, vectors in known.items() if name in wanted}
    if not layers:
        return known
    device = adapter.device
    drawn = draw(pairs, tokens, start, cut=_is_causal(model))
    listener = Listener(layers, adapter.model, sum(len(text.places) for text in drawn))
    most, no_logits = _BATCH_TOKENS_WITH_LOGITS, {}
    if _reads_without_logits(model, layers):
        most, no_logits = _BATCH_TOKENS, {"logits_to_keep": 1}  # of the last token, as 0 means all
    alone = [place for place, text in enumerate(drawn) if text.inputs]
    with evaluating(model), listener.hooked():
        for batch in batches_of_lengths([len(text.ids) for text in drawn], most, alone):
            texts = [drawn[place] for place in batch]
            ids, mask = padded([text.ids for text in texts])
            others = {name: value.to(device) for text in texts for name, value in text.inputs.items()}
            listener.begin(ids.shape, texts)
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **others, **no_logits)
            listener.end()
    return listener.vectors(may_miss=_beside_the_decoder(_inner(model))) | known


def _is_causal(model: nn.Module) -> bool:
    """Whether what a model makes of a token is known not to depend on later ones: its attention modules say so."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def _reads_without_logits(model: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a model can leave logits out, and no adapted module would miss tokens by that.

    It goes through the model's own forward all the same: that is where engines gather weights and precision is set.
    """
    inner = _inner(model)
    if inner.base_model is inner:
        return False
    body = set(inner.base_model.modules())
    return "logits_to_keep" in signature(inner.forward).parameters and all(
        module in body for module in layers.values()
    )


def running_model(adapter: Adapter) -> nn.Module:
    """The module whose forward pass is the model's: a LightningModule only holds it, maybe beside others."""
    own = adapter.parts[0].module
    models = (module for module in adapter.model.modules() if isinstance(module, (PeftModel, PreTrainedModel)))
    return next(model for model in models if any(module is own for module in model.modules()))


def known_as_text(texts: Texts, config: PreTrainedConfig) -> Texts:
    """Texts out of a file: rows with placeholders of images have lost them, also where that was not written down."""
    placeholders = {token for tokens in placeholders_of(config).values() for token in tokens}
    lost = {
        place: None for place, row in enumerate(texts.task) if place in texts.inputs or placeholders.intersection(row)
    }
    return replace(texts, inputs=lost)


def refuse_unless_causal(adapter: Adapter, argument: str) -> None:
    """Raise ``ValueError`` unless the model under an adapter is one that continues texts, by a decoder alone."""
    model = _inner(running_model(adapter))
    if not isinstance(model, PreTrainedModel):
        why = "is no model of transformers"
    elif model.config.is_encoder_decoder:
        why = "has an encoder"
    elif not model.can_generate():
        why = "has no head that continues texts"
    else:
        return
    raise ValueError(
        f"`{argument}`: expected a decoder-only language model, which alone can be asked what it is to refuse, but "
        f"{type(model).__name__} {why}. Correct it by its weights alone: penalty=Penalty.guard(10) without probes."
    )


def _beside_the_decoder(model: PreTrainedModel) -> set[nn.Module]:
    """What no token of a text need go through, in the body of a model: a vision tower, say."""
    return set(model.base_model.modules()) - set(model.get_decoder().modules())


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def vocabulary_of(adapter: Adapter) -> int:
    """How many token ids the model under an adapter can read: the rows of its input embedding, sharded or not."""
    return full_shape(running_model(adapter).get_input_embeddings().weight)[0]
