"""Modules of the same shapes together, with their bases where the factors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.models.factors import Factors

# On a CPU stacking saves calls and costs a copy, so what is large stays alone. On an accelerator launches count.
_ENTRIES_ON_CPU, _ENTRIES = 2**18, 2**26


@dataclass(frozen=True)
class Stack:
    """Some modules of the same shapes, dtypes and device, along the first axis.

    Attributes:
        names: of the modules.
        lora_A: ``(m, r, d_in)``.
        lora_B: ``(m, d_out, r)``.
        U: ``(m, d_out, k)`` float32.
        V: ``(m, d_in, k)`` float32.
        singular_values: ``(m, k)`` float32.
    """

    names: tuple[str, ...]
    lora_A: Tensor
    lora_B: Tensor
    U: Tensor
    V: Tensor
    singular_values: Tensor


class Stacks:
    """The bases of an adapter's modules, stacked as its factors are.

    Those that lie on the CPU are not kept twice. Those on an accelerator are moved there once, and kept for as long as
    factors come from there, in float32: 165 MB for Llama-3.2-1B, 1.2 GB for Llama-3.1-8B with the relative rank.

    Example:
        >>> basis = torch.eye(3)[:, :1], torch.eye(2)[:, :1], torch.ones(1)
        >>> factors = {name: (torch.ones(1, 2), torch.ones(3, 1)) for name in ("k_proj", "q_proj")}
        >>> [(stack.names, tuple(stack.U.shape)) for stack in Stacks({"k_proj": basis, "q_proj": basis}).of(factors)]
        [(('k_proj', 'q_proj'), (2, 3, 1))]
    """

    def __init__(self, bases: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        self._bases = bases
        self._moved: dict[tuple, tuple[Tensor, ...]] = {}

    def of(self, factors: Factors) -> Iterator[Stack]:
        """The factors in stacks; which these are, and their order, does not depend on the factors' order."""
        groups: dict[tuple, list[str]] = {}
        for name in sorted(factors):
            A, B = factors[name]
            sides = tuple(side.shape for side in self._bases[name])
            groups.setdefault((A.device, A.shape, B.shape, A.dtype, B.dtype, sides), []).append(name)
        chunks = [(key[0], names) for key, group in groups.items() for names in self._chunks(key[0], group, factors)]
        moved = self._moved  # a thread that saves may come in: what one of them looks at may grow, and not shrink
        self._moved = {chunk: moved[chunk] for chunk in chunks if chunk in moved}
        for device, names in chunks:
            pairs = zip(*(factors[name] for name in names), strict=True)
            yield Stack(names, *map(_stack, pairs), *self._bases_on(device, names))

    def _chunks(self, device: torch.device, names: list[str], factors: Factors) -> Iterator[tuple[str, ...]]:
        entries = sum(tensor.numel() for tensor in (*factors[names[0]], *self._bases[names[0]]))
        most = max(1, (_ENTRIES_ON_CPU if device.type == "cpu" else _ENTRIES) // max(1, entries))
        return (tuple(names[place : place + most]) for place in range(0, len(names), most))

    def _bases_on(self, device: torch.device, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        moved = self._moved
        if (device, names) in moved:
            return moved[device, names]
        parts = zip(*(self._bases[name] for name in names), strict=True)
        stacked = tuple(_stack(part).to(device) for part in parts)
        if any(part.device.type != device.type for part in self._bases[names[0]]):
            moved[device, names] = stacked
        return stacked


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
