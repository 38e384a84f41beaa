"""A batch as a model gets it in training, cut into the rows that its collator made it of, where that is certain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from csulora_callback.models.beside_ids import cut_inputs
from csulora_callback.models.documents import documents_of
from csulora_callback.models.training_rows import LENGTH, TrainedRow

Wanted = Callable[[int], Sequence[bool]]
"""Says of each of so many rows whether it is to be learned; of none at all where that is not known."""


class TrainedBatch(Sequence[TrainedRow]):
    """The rows of a batch, as far as it is certain what belongs to them; each is taken out when it is asked for.

    Args:
        ids: ``(b, l)``.
        given: the other arguments of the model's forward. Where ``attention_mask`` is 0 there is padding, and the loss
            counts ``labels`` but -100.
        config: of the model.
        wanted: by default all rows are to be learned.

    Attributes:
        left_out: how many more there are that are, or may be, to be learned.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig
        >>> ids, labels = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[-100, 6, 7], [-100, 9, -100]])
        >>> batch = TrainedBatch(ids, {"attention_mask": ids != 0, "labels": labels}, LlamaConfig())
        >>> list(batch), batch.left_out
        ([TrainedRow(ids=[5, 6, 7], start=1, inputs={}), TrainedRow(ids=[8, 9], start=1, inputs={})], 0)
    """

    def __init__(
        self,
        ids: Tensor,
        given: Mapping[str, Any],
        config: PreTrainedConfig,
        wanted: Wanted | None = None,
    ) -> None:
        self._ids, labels = ids, given.get("labels")
        self._labels = labels if isinstance(labels, Tensor) and labels.shape == ids.shape else None
        documents = documents_of(ids, given)
        cuts = cut_inputs(ids, documents, given, config, LENGTH)
        learned = [True] * len(documents) if wanted is None else wanted(len(documents))
        known = list(zip(documents, cuts, learned, strict=True)) if learned else []
        self._rows = [(document, cut) for document, cut, is_learned in known if is_learned and cut is not None]
        self.left_out = (sum(learned) if learned else len(documents)) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> TrainedRow:
        document, cut = self._rows[place]
        start = 0 if self._labels is None else document.start(self._labels, cut.length)
        # Copies: a part of a batch would keep all of it.
        inputs = {name: value.detach().to("cpu", copy=True) for name, value in cut.inputs.items()}
        return TrainedRow(document.of(self._ids)[: cut.length].tolist(), start, inputs)
