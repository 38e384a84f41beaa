"""How a model is had to read texts in the middle of its training, so that nothing of it shows afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn

Rows = Sequence[Sequence[int]]
"""Texts as token ids."""

Inputs = Mapping[str, Tensor]
"""What a model gets with a text beside its ids, by name: pixel values, say. Empty where there is nothing else."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside, and every module of it in its own mode after.

    Example:
        >>> model = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
        >>> with evaluating(model):
        ...     inside = [module.training for module in model]
        >>> inside, [module.training for module in model]
        ([False, False], [False, True])
    """
    modes = {module: module.training for module in model.modules()}
    # Vision-language models with M-RoPE keep here how far the images of the last batch have moved its positions, and
    # would move those of the next text that they generate as far.
    moved = {module: module.rope_deltas for module in modes if "rope_deltas" in vars(module)}
    model.eval()
    for module in moved:
        module.rope_deltas = None
    for module in modes:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' 4-bit layers, in which nothing else depends on the mode. In that of evaluation they pack
            # themselves anew on some CPUs, round their scales for good, and let no gradient through any more.
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, deltas in moved.items():
            module.rope_deltas = deltas


def shared_prefix(rows: Rows) -> int:
    """How many tokens all rows begin with in common, but for the last token of the shortest; of an empty one none.

    Example:
        >>> shared_prefix([[0, 1, 5, 6], [0, 1, 7]]), shared_prefix([[0, 1, 5], [0, 1]])
        (2, 1)
    """
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return max(0, min(sum(1 for _ in same), min(map(len, rows), default=0) - 1))


def padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``(b, length)`` of a batch, padded on the right, where causal models do not look.

    Example:
        >>> padded([[5, 6, 7], [8]])
        (tensor([[5, 6, 7],
                [8, 0, 0]]), tensor([[1, 1, 1],
                [1, 0, 0]]))
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def batches_of_lengths(lengths: Sequence[int], most_tokens: int, alone: Collection[int] = ()) -> list[list[int]]:
    """Places of texts that are read together: of about the same length, at most so many tokens, padding included.

    A text that is longer is read alone, and so are those at the places ``alone``.

    Example:
        >>> batches_of_lengths([3, 1, 2, 9], most_tokens=4)
        [[1, 2], [0], [3]]
        >>> batches_of_lengths([3, 1, 2, 9], most_tokens=4, alone=[1])
        [[1], [2], [0], [3]]
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        apart = not batches or place in alone or batches[-1][-1] in alone
        if apart or (len(batches[-1]) + 1) * lengths[place] > most_tokens:
            batches.append([])
        batches[-1].append(place)
    return batches
