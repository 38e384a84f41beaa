r"""Harmless prompts that look like the probes, beside the task: a correction keeps what the update does to them too.

A data-aware correction attenuates what an update does to the inputs that probes send into a module, and what only
looks like a probe sends nearly the same ones. So harmless prompts stand beside the task. With ``T`` token vectors of
the task and ``G`` those of harmless prompts, scaled to the same ``‖·‖²``, the correction gets ``[T; G]`` as those of
the task (:mod:`csulora_callback.method.token_space`), and scales it as it does any. The second moment of the task
becomes the mean of both,

    ``C_T = (½ (TᵀT + GᵀG) + ε I) / (1 + ε)``  with  ``‖T‖² = ‖G‖² = d_in``,

and all else stays as it is. Of an embedding the counts ``t`` and ``g``, scaled to the same sum, are added: the same
mean.

What tells a probe from a harmless prompt comes after the beginning that all of them share, a chat template's. Vectors
of that are the same on both sides, to be attenuated and to be kept. Hence only what comes after it is drawn, of both;
the model reads whole prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from reprlib import repr as short

import torch
from torch import Tensor

from csulora_callback.models.listening import TokenVectors
from csulora_callback.models.probes import Probes, read_prompts
from csulora_callback.models.reading import Rows

Prompts = list[str] | list[list[int]]


def read_both(probes: Probes | None, harmless: Probes | None) -> tuple[Prompts | None, Prompts | None]:
    """The prompts of either source, where it is given.

    Raises:
        ValueError: where one cannot be read, or a prompt stands in both.

    Example:
        >>> read_both(["How do I kill a man?"], ["How do I kill a process?"])
        (['How do I kill a man?'], ['How do I kill a process?'])
        >>> read_both(None, [[5, 6, 7]])
        (None, [[5, 6, 7]])
    """
    refused = None if probes is None else read_prompts(probes)
    answered = None if harmless is None else read_prompts(harmless, "harmless")
    check_apart(refused or [], answered or [])
    return refused, answered


def check_apart(probes: Sequence[str] | Rows, harmless: Sequence[str] | Rows) -> None:
    """Raise ``ValueError`` where a prompt is to be refused and to be answered.

    Example:
        >>> check_apart([[5, 6], [7]], [[7, 5], [7]])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: `harmless`: expected prompts that are not among `probes`, but got [7], which is in both. ...
    """
    refused = set(map(_hashable, probes))
    for prompt in harmless:
        if _hashable(prompt) in refused:
            raise ValueError(
                f"`harmless`: expected prompts that are not among `probes`, but got {short(prompt)}, which is in "
                "both. It is to be answered or to be refused: leave it out of one of them."
            )


def shared_beginning(rows: Rows) -> int:
    """How many tokens all rows begin with in common, but for the last token of the shortest; of an empty one none.

    Example:
        >>> shared_beginning([[0, 1, 5, 6], [0, 1, 7]]), shared_beginning([[0, 1, 5], [0, 1]])
        (2, 1)
    """
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return max(0, min(sum(1 for _ in same), min(map(len, rows)) - 1))


def beside_task(task: TokenVectors, harmless: TokenVectors) -> TokenVectors:
    """What counts as the task's where harmless prompts stand beside it: both together, each of the same weight.

    Of a module of which nothing is known of the task, or which got nothing but zeros on one side, it is what it was:
    the harmless ones alone would make the task count for nothing. Modules that share both tensors share the result.

    Args:
        task: vectors ``(n_T, d_in)`` or, of an embedding, counts ``(num_embeddings,)`` by module.
        harmless: likewise, ``(n_G, d_in)``.

    Returns:
        By module ``(n_T + n_G, d_in)``, or the counts together.

    Example:
        >>> import torch
        >>> both = beside_task({"q_proj": torch.eye(2)[:1], "embed": torch.ones(2)}, {
        ...     "q_proj": 3 * torch.eye(2)[1:], "embed": torch.tensor([0.0, 8.0]), "up_proj": torch.eye(2)
        ... })
        >>> both["q_proj"].tolist(), both["embed"].tolist(), len(both)
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 3.0], 2)
    """
    pairs = {name: (own, harmless[name]) for name, own in task.items() if name in harmless}
    distinct = {(id(own), id(other)): (own, other) for own, other in pairs.values()}
    together = {key: _together(own, other) for key, (own, other) in distinct.items()}
    return task | {name: together[id(own), id(other)] for name, (own, other) in pairs.items()}


def _together(task: Tensor, harmless: Tensor) -> Tensor:
    """One tensor of both, the harmless one scaled to the task's norm, or of counts to its sum."""
    order = 1 if task.ndim == 1 else 2
    norms = [torch.linalg.vector_norm(own, ord=order, dtype=torch.float64).item() for own in (task, harmless)]
    if 0.0 in norms:
        return task
    scaled = (harmless.float() * (norms[0] / norms[1])).to(task.dtype)
    return task + scaled if task.ndim == 1 else torch.cat([task, scaled])


def _hashable(prompt: str | Sequence[int]) -> str | tuple[int, ...]:
    return prompt if isinstance(prompt, str) else tuple(prompt)
