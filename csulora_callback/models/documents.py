"""The documents in a batch: its rows without padding, and where it is packed, what was packed into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_IGNORED = -100  # torch's mark for labels that a loss does not count


@dataclass(frozen=True)
class Document:
    """A text in a batch.

    Attributes:
        row: of the batch.
        chosen: places of its tokens in the row, or a mask of them; ``None`` where it is all of the row.
        is_packed: whether others may stand in the same row.
    """

    row: int
    chosen: Tensor | None
    is_packed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor ``(b, length, …)``."""
        return tensor[self.row] if self.chosen is None else tensor[self.row][self.chosen]

    def start(self, labels: Tensor, length: int) -> int:
        """How many of its first ``length`` tokens stand before the first that the loss counts.

        Nothing predicts the first token of a packed document, and collators mark it as not counted whatever it is:
        where all others count, nothing is known of a prompt.
        """
        counted = (self.of(labels)[:length] != _IGNORED).tolist()
        start = counted.index(True) if True in counted else len(counted)
        return 0 if self.is_packed and start == 1 else start


def documents_of(ids: Tensor, given: Mapping[str, Any]) -> list[Document]:
    """The documents of a batch.

    In a row one ends and the next begins where positions do not go on by one, or where ``seq_idx`` or
    ``cu_seq_lens_q`` say so. What is packed and has no token that the loss counts is padding.

    Args:
        ids: ``(b, length)``.
        given: the other arguments of the model's forward.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
        >>> documents = documents_of(ids, {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        >>> [document.of(ids).tolist() for document in documents]
        [[5, 6, 7], [8, 9]]
        >>> [document.of(ids).tolist() for document in documents_of(ids, {"attention_mask": (ids > 6).long()})]
        [[7, 8, 9]]
    """
    mask, numbers = given.get("attention_mask"), _numbers(ids, given)
    mask = mask != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else None
    documents = []
    for row in range(len(ids)):
        whole = Document(row, None if mask is None else mask[row], is_packed=bool(numbers))
        cuts = _cuts([whole.of(number) for number in numbers])
        if cuts:
            places = whole.of(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
            parts = [Document(row, part, is_packed=True) for part in places.tensor_split(cuts)]
            documents += [part for part in parts if _is_trained(part, ids, given.get("labels"))]
        else:
            documents.append(whole)
    return documents


def _numbers(ids: Tensor, given: Mapping[str, Any]) -> list[Tensor]:
    """Tensors ``(b, length)`` that are the same all over a document, and others in the next one."""
    numbers, steps = [], torch.arange(ids.shape[1], device=ids.device)
    positions, index, ends = (given.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    if isinstance(positions, Tensor) and positions.shape[-1] == ids.shape[1]:
        # Those of M-RoPE, (3, b, length), stand still within an image: there a document begins at 0 alone.
        own = (positions[0] == 0).cumsum(-1) if positions.ndim == 3 else positions - steps
        numbers.append(own.expand_as(ids))
    if isinstance(index, Tensor):
        numbers.append(index.expand_as(ids))
    if isinstance(ends, Tensor) and len(ids) == 1:
        numbers.append(torch.bucketize(steps, ends.to(ids.device), right=True)[None])
    return numbers


def _cuts(numbers: list[Tensor]) -> list[int]:
    """Where a row ``(t,)`` is cut."""
    changes = [number.diff() != 0 for number in numbers]
    return (torch.stack(changes).any(0).nonzero().squeeze(1) + 1).tolist() if changes else []


def _is_trained(document: Document, ids: Tensor, labels: object) -> bool:
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        return True
    return bool((document.of(labels) != _IGNORED).any())
