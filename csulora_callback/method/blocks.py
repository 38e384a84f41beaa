"""Factors split by the two sides of a subspace, and the blocks of their updates in small matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.method.penalty import BLOCKS
from csulora_callback.method.precision import small_on


@dataclass(frozen=True)
class Side:
    """Factors ``F (d, r)`` of ``m`` modules, each split by a subspace into ``P F`` and ``(I − P) F``.

    They are kept in rows, ``Fᵀ``: in float64 a CPU multiplies those twice to four times as fast.

    Attributes:
        inner: ``(m, r, k)``, the products of ``Fᵀ`` with the subspace's columns.
        parts: ``(m, 2r, d)``, ``(P F)ᵀ`` above ``((I − P) F)ᵀ``.
        root: ``(m, min(d, 2r), 2r)``, both parts in some orthonormal basis, of the small dtype.

    Example:
        >>> side = Side.of(torch.ones(1, 1, 3), torch.eye(3)[None, :, :1])
        >>> side.parts[0].tolist(), [round(root.norm().item(), 3) for root in side.roots]
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [1.0, 1.414])
    """

    inner: Tensor
    parts: Tensor
    root: Tensor

    @classmethod
    def of(cls, rows: Tensor, subspace: Tensor) -> Side:
        """Of factors in rows, ``(m, r, d)``, and the columns of their subspaces, ``(m, d, k)``."""
        inner = rows @ subspace
        inside = inner @ subspace.mT
        # One QR over both parts: were each factorized alone, rounding could make their directions overlap.
        parts = torch.cat([inside, rows - inside], dim=-2)
        return cls(inner, parts, torch.linalg.qr(parts.mT, mode="r").R.to(small_on(rows.device)))

    def at(self, places: list[int]) -> Side:
        """Those of some of the modules."""
        return Side(picked(self.inner, places), picked(self.parts, places), picked(self.root, places))

    @property
    def inside(self) -> Tensor:
        """``(P F)ᵀ``."""
        return self.parts.chunk(2, dim=-2)[0]

    @property
    def roots(self) -> tuple[Tensor, Tensor]:
        """Of ``P F`` and of ``(I − P) F``, ``(m, min(d, 2r), r)`` each."""
        return self.root.chunk(2, dim=-1)


def blocks_of(output: Side, input_: Side) -> dict[str, Tensor]:
    """The blocks of ``F Hᵀ`` in the bases of both sides, ``(m, min(d_out, 2r), min(d_in, 2r))`` each.

    Example:
        >>> side = Side.of(torch.ones(1, 1, 3), torch.eye(3)[None, :, :1])
        >>> {block: round(part.norm().item(), 3) for block, part in blocks_of(side, side).items()}
        {'aligned': 1.0, 'output': 1.414, 'input': 1.414, 'off': 2.0}
    """
    (in_B, out_B), (in_A, out_A) = output.roots, input_.roots
    pairs = ((in_B, in_A), (in_B, out_A), (out_B, in_A), (out_B, out_A))
    return {block: one @ other.mT for block, (one, other) in zip(BLOCKS, pairs, strict=True)}


def along_pairs(on_output: Tensor, on_input: Tensor) -> Tensor:
    """``uᵢᵀ B A vᵢ`` of the pairs of columns of ``U`` and ``V``, ``(m, min(k, k'))``.

    Args:
        on_output: ``BᵀU (m, r, k)``.
        on_input: ``A V (m, r, k')``.

    Example:
        >>> along_pairs(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 5.0], [4.0, 6.0]]]))
        tensor([[11.]])
    """
    pairs = min(on_output.shape[-1], on_input.shape[-1])
    return (on_output[..., :pairs] * on_input[..., :pairs]).sum(dim=-2)


def shares_of(energy: Mapping[str, float]) -> dict[str, float]:
    """``ρ_b``; all zero for ``Δ = 0``.

    Example:
        >>> shares_of({"aligned": 1.0, "output": 0.0, "input": 0.0, "off": 3.0})["off"]
        0.75
    """
    total = sum(energy.values())
    return {block: part / total if total else 0.0 for block, part in energy.items()}


def picked(tensor: Tensor, places: list[int]) -> Tensor:
    """The modules of a stack at these places, in this order; without a copy if they are all.

    Example:
        >>> picked(torch.arange(3), [2, 0])
        tensor([2, 0])
    """
    return tensor if places == list(range(len(tensor))) else tensor[places]
