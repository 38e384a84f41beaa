"""What a model gets in training beside token ids, images say, cut into what belongs to each text of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from csulora_callback.models.documents import Document
from csulora_callback.models.reading import Inputs

MOST_BYTES = 2**25
"""How large the images of a text may be: some dozens of texts are kept, in the memory of the host."""

_TEXT = {
    "input_ids",
    "attention_mask",
    "labels",
    "position_ids",
    "cache_position",
    "completion_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "logits_to_keep",
    "loss_mask",
    "num_items_in_batch",
    "seq_idx",
    "shift_labels",
}
"""Arguments of a forward pass that say no more than ids do, or something of the loss alone."""

_TOKENWISE = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(?:id|index)")
_PATCHES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@dataclass(frozen=True)
class Cut:
    """What is kept of a text: its first ``length`` tokens, and what the model gets beside them."""

    length: int
    inputs: Inputs


def cut_inputs(
    ids: Tensor, documents: Sequence[Document], given: Mapping[str, Any], config: PreTrainedConfig, length: int
) -> list[Cut | None]:
    """What belongs to each document of a batch; ``None`` where that is not certain, or is too large to be kept.

    It is certain where there is one document; where tensors have a line for each row, and each row a placeholder of
    each kind that there is: it has one image then, be the lines of rows or of images; and where grids say how many
    patches an image has, as in Qwen's models, and placeholders add up to them. A document without placeholders is a
    text.

    Args:
        ids: ``(b, l)``.
        documents: those in it.
        given: the other arguments of the model's forward.
        config: of the model.
        length: how many tokens of a document are kept, where no placeholder stands further on.

    Example:
        >>> import torch
        >>> from transformers import LlavaConfig
        >>> from csulora_callback.models.documents import documents_of
        >>> ids, given = torch.tensor([[9, 5], [9, 7]]), {"pixel_values": torch.ones(2, 3, 8, 8)}
        >>> config = LlavaConfig(image_token_index=9)
        >>> [cut.inputs["pixel_values"].shape[0] for cut in cut_inputs(ids, documents_of(ids, {}), given, config, 512)]
        [1, 1]
        >>> ids[1, 0] = 8  # both images may be the first row's now, and the second row is a text
        >>> cut_inputs(ids, documents_of(ids, {}), given, config, 512)
        [None, Cut(length=512, inputs={})]
    """
    others = {name: value for name, value in given.items() if name not in _TEXT and _holds_tensors(value)}
    if not others:
        return [Cut(length, {})] * len(documents)
    tokenwise = {name: others.pop(name) for name in _TOKENWISE if name in others}
    marked = _Marked.of([document.of(ids) for document in documents], placeholders_of(config))
    is_row_by_row = [document.row for document in documents] == list(range(len(ids)))
    shares = _shares(others, marked, is_row_by_row, config.to_dict().get("vision_config"))
    if others and isinstance(given.get("position_ids"), Tensor):
        tokenwise["position_ids"] = given["position_ids"]
    return [
        None if share is None else _kept(ids, document, share, tokenwise, marked, place, length)
        for place, (document, share) in enumerate(zip(documents, shares, strict=True))
    ]


def placeholders_of(config: PreTrainedConfig) -> dict[str, set[int]]:
    """The token ids that a model puts images, videos and audio in the place of, by kind.

    Example:
        >>> from transformers import LlamaConfig, LlavaConfig
        >>> placeholders_of(LlavaConfig(image_token_index=9)), placeholders_of(LlamaConfig())
        ({'image': {9}}, {})
    """
    tokens: dict[str, set[int]] = {}
    for name, value in config.to_dict().items():
        if (found := _PLACEHOLDER.fullmatch(name)) and isinstance(value, int):
            tokens.setdefault(found[1], set()).add(value)
    return tokens


def _holds_tensors(value: object) -> bool:
    """Whether it holds some of more than one number, or lists of tensors."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) and value.ndim > 0


@dataclass(frozen=True)
class _Marked:
    """Where the placeholders of images, videos and audio are.

    Attributes:
        counts: of each kind that the model knows, how many each document has.
        ends: of each document, the place behind its last one.
        sizes: of each document, how many tokens it has.
    """

    counts: dict[str, list[int]]
    ends: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, texts: Sequence[Tensor], tokens: Mapping[str, set[int]]) -> _Marked:
        rows = [text.tolist() for text in texts]
        counts = {kind: [sum(token in own for token in row) for row in rows] for kind, own in tokens.items()}
        of_any = set().union(*tokens.values())
        ends = [max((i + 1 for i, token in enumerate(row) if token in of_any), default=0) for row in rows]
        return cls(counts, ends, list(map(len, rows)))

    def is_text(self, place: int) -> bool:
        return bool(self.counts) and not self.ends[place]


def _shares(
    others: Mapping[str, Any], marked: _Marked, is_row_by_row: bool, vision: Mapping[str, Any] | None
) -> Sequence[Mapping[str, Any] | None]:
    """What of the others belongs to each document."""
    count = len(marked.sizes)
    if not others:
        return [{}] * count
    if count == 1:
        return [others]
    found = _by_patches(others, marked, vision)
    if found is None and is_row_by_row:
        found = _by_lines(others, marked, count)
    return [{} if marked.is_text(place) else found and found[place] for place in range(count)]


def _by_patches(others: Mapping[str, Any], marked: _Marked, vision: Mapping[str, Any] | None) -> list[dict] | None:
    """By the grids of images and videos, which stand in the order of the documents; ``None`` where they do not fit."""
    left, shares = dict(others), [{} for _ in marked.sizes]
    for kind, names in _PATCHES.items():
        if not left.keys() >= set(names) or kind not in marked.counts or "spatial_merge_size" not in (vision or {}):
            continue
        patches, grids = (left.pop(name) for name in names)
        sizes = grids.prod(-1).tolist()
        tokens = [size // vision["spatial_merge_size"] ** 2 for size in sizes]
        if sum(sizes) != len(patches) or sum(tokens) != sum(marked.counts[kind]):
            return None
        first = 0
        for share, wanted in zip(shares, marked.counts[kind], strict=True):
            last = first
            while last < len(tokens) and sum(tokens[first:last]) < wanted:
                last += 1
            if sum(tokens[first:last]) != wanted:
                return None
            if wanted:
                share[names[0]] = patches[sum(sizes[:first]) : sum(sizes[:last])]
                share[names[1]] = grids[first:last]
            first = last
    return None if left else shares


def _by_lines(others: Mapping[str, Any], marked: _Marked, rows: int) -> list[dict] | None:
    """Line by line; ``None`` where a line may be another row's."""
    tensors = all(isinstance(value, Tensor) and len(value) == rows for value in others.values())
    kinds = [counts for counts in marked.counts.values() if any(counts)]
    if not tensors or not kinds or not all(all(counts) for counts in kinds):
        return None
    return [{name: value[row : row + 1] for name, value in others.items()} for row in range(rows)]


def _kept(
    ids: Tensor,
    document: Document,
    share: Mapping[str, Any],
    tokenwise: Mapping[str, Tensor],
    marked: _Marked,
    place: int,
    length: int,
) -> Cut | None:
    if not all(isinstance(value, Tensor) for value in share.values()):
        return None
    size = marked.sizes[place]
    if share:
        length = max(length, marked.ends[place] if marked.counts else size)
    if any(value.shape[:2] == ids.shape for value in share.values()) and min(size, length) < ids.shape[1]:
        return None  # maybe it has a line for each token, and has to be cut with them
    inputs = dict(share)
    for name, value in tokenwise.items():
        own = (
            _of_tokens(value, document)[..., :length] if name == "position_ids" else document.of(value)[None, :length]
        )
        if share or (name != "position_ids" and not (marked.is_text(place) and not own.any())):
            inputs[name] = own
    too_large = sum(value.nbytes for value in inputs.values()) > MOST_BYTES
    return None if too_large else Cut(length, inputs)


def _of_tokens(positions: Tensor, document: Document) -> Tensor:
    """Positions of a document, ``(1, t)`` or, of M-RoPE, ``(3, 1, t)``."""
    row = document.row if positions.shape[-2] > 1 else 0
    own = positions[..., row, :]
    return (own if document.chosen is None else own[..., document.chosen]).unsqueeze(-2)
