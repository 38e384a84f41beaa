"""What the aligned checkpoint has, as far as names, shapes and its tokenizer tell: no weight is read."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from csulora_callback.models.checkpoint import Checkpoint, Source, open_checkpoint
from csulora_callback.models.layout import Layout
from csulora_callback.models.names import module_name
from csulora_callback.models.through_transformers import empty_model


class Aligned:
    """The checkpoint that an adapter is an update of, asked which of a model's modules and tokens it knows.

    Args:
        source: the checkpoint.
        names: of modules in the model that are asked for.
        revision: of a Hub id.
        model: the one that is trained, if it is in memory.

    Raises:
        FileNotFoundError: if it cannot be had.
        ValueError: if it is corrupt, or several modules may be meant by a name.

    Attributes:
        source: what it is called.
        checkpoint: its modules, under the names that they have in the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> aligned = Aligned(LlamaForCausalLM(config), ["lm_head", "score"])
        >>> aligned.shape("lm_head"), aligned.shape("score"), aligned.is_table("lm_head")
        ((32, 8), None, True)
        >>> aligned.knows("model.embed_tokens", 31), aligned.knows("model.embed_tokens", 32)
        (True, False)
    """

    def __init__(
        self, source: Source, names: Collection[str], revision: str | None = None, model: nn.Module | None = None
    ) -> None:
        layout = None if model is None else Layout.of(model)
        self._opened = open_checkpoint(source, revision=revision)
        self.checkpoint: Checkpoint = self._opened.named_as(names, layout)
        self.source, self._model = self.checkpoint.source, model

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a module's weight as stored; ``None`` where the checkpoint has no such module."""
        return self.checkpoint.shape(name) if name in self.checkpoint else None

    def is_table(self, name: str) -> bool:
        """Whether a module has a row for each token, so that resizing the vocabulary gives it others."""
        return name in self._tables or name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES

    def stores_by_input(self, name: str) -> bool:
        """Whether a module's weight is stored as ``(d_in, d_out)``, as an embedding's is and that of Conv1D.

        Raises:
            ValueError: if the checkpoint does not say of which kind the module is.
        """
        for own, module in {} if self._empty is None else dict(self._empty.named_modules()).items():
            found = module_name(own)
            if own and (name == found or name.endswith(f".{found}") or found.endswith(f".{name}")):
                return isinstance(module, (nn.Embedding, Conv1D))
        if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES:
            return name.rpartition(".")[2] != "lm_head"
        raise ValueError(
            f"`aligned_model`: expected a checkpoint that says what kind of module '{name}' is, but {self.source} has "
            f"no config of a class that transformers knows with such a one. Pass uncorrected=[{name!r}]."
        )

    def knows(self, name: str, token: int) -> bool:
        """Whether a row of an embedding, the module ``name``, is that of a token that the checkpoint knows.

        It is not where the checkpoint has no such row, or its tokenizer no such token, as of the rows that a
        vocabulary is padded with. Without a tokenizer every row that is there counts.
        """
        shape = self.shape(name)
        return (shape is None or token < shape[0]) and (self._tokens is None or token in self._tokens)

    @cached_property
    def _empty(self) -> nn.Module | None:
        """The model, maybe without weights; ``None`` where no config tells: names have to, then."""
        if self._model is not None or self._opened.folder is None:
            return self._model
        try:
            return empty_model(self._opened.folder)
        except Exception:  # of a config that is missing or broken in one of many ways
            return None

    @cached_property
    def _tables(self) -> set[str]:
        model = self._empty
        inner = [] if model is None else [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        tables = {id(table) for one in inner for table in (_input_table(one), one.get_output_embeddings())}
        return set() if model is None else {module_name(n) for n, m in model.named_modules() if id(m) in tables}

    @cached_property
    def _tokens(self) -> set[int] | None:
        if self._opened.folder is None:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._opened.folder, trust_remote_code=False)
            return set(tokenizer.get_vocab().values())
        except Exception:  # there is none, or it fails in one of many ways
            return None


def _input_table(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # of images, say
        return None
