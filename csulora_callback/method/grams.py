r"""What is measured of updates, from small products of their factors alone: no QR, no correction.

With ``K_A = A Aᵀ``, ``K_B = Bᵀ B`` and those of the parts inside the subspace, ``p_A`` of ``A V`` and ``p_B`` of
``Uᵀ B``, all of them ``r × r``, the energies of the blocks of ``Δ = s·B·A`` are

    ``e_aligned = s² ⟨p_B, p_A⟩``,        ``e_output = s² ⟨p_B, K_A − p_A⟩``,
    ``e_input = s² ⟨K_B − p_B, p_A⟩``,    ``e_off = s² ⟨K_B − p_B, K_A − p_A⟩``,

and with ``Z = (UᵀB)ᵀ S (VᵀAᵀ)`` the inner product with what the subspace keeps of the displacement is
``⟨Δ, U S Vᵀ⟩ = s · tr Z``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from csulora_callback.method.penalty import BLOCKS
from csulora_callback.method.precision import as_given, small_on
from csulora_callback.method.token_space import InputGain


@dataclass(frozen=True)
class Grams:
    """The small products of ``m`` modules of one rank, ``(m, r, r)`` each, in float64 where the device has it.

    Attributes:
        whole_A: ``K_A``.
        whole_B: ``K_B``.
        kept_A: ``p_A``.
        kept_B: ``p_B``.
        pointing: ``Z``.
        moved_A: ``A' A'ᵀ`` of the input side ``A'`` that a data-aware penalty makes; that of ``A`` without one.
        change_A: ``(A' − A)(A' − A)ᵀ``.
        moved_pointing: ``Z`` with ``A'``.
    """

    whole_A: Tensor
    whole_B: Tensor
    kept_A: Tensor
    kept_B: Tensor
    pointing: Tensor
    moved_A: Tensor
    change_A: Tensor
    moved_pointing: Tensor

    @classmethod
    def of(
        cls,
        lora_A: Tensor,
        lora_B: Tensor,
        U: Tensor,
        V: Tensor,
        singular_values: Tensor,
        wide: torch.dtype,
        input_gains: Sequence[InputGain] | None = None,
    ) -> Grams:
        """Of modules with the same shapes; ``O((d_out + d_in)(k + r) r)`` each.

        Args:
            lora_A: ``(m, r, d_in)``, any floating dtype.
            lora_B: ``(m, d_out, r)``.
            U: ``(m, d_out, k)``.
            V: ``(m, d_in, k')``.
            singular_values: ``(m, min(k, k'))``.
            wide: of the products with a ``d_out`` or ``d_in``. In float32 an energy is wrong by about 1e-6 of
                :meth:`sizes`, which is the energy itself but where columns of the factors cancel.
            input_gains: by module, for a data-aware penalty.

        Example:
            >>> ones, basis = torch.ones(2, 3, 1), torch.eye(3)[:, :1].repeat(2, 1, 1)
            >>> grams = Grams.of(ones.mT, ones, basis, basis, torch.ones(2, 1), torch.float32)
            >>> grams.energies()
            tensor([[1., 2., 2., 4.],
                    [1., 2., 2., 4.]], dtype=torch.float64)
        """
        device = lora_A.device
        with as_given(device):
            A, B, U, V, sigma = (t.detach().to(device, wide) for t in (lora_A, lora_B, U, V, singular_values))
            on_input, on_output = A @ V, (U.mT @ B).mT
            pairs = sigma.shape[-1]
            weighted = on_output[..., :pairs] * sigma[:, None]
            small = {
                "whole_A": A @ A.mT,
                "whole_B": B.mT @ B,
                "kept_A": on_input @ on_input.mT,
                "kept_B": on_output @ on_output.mT,
                "pointing": weighted @ on_input[..., :pairs].mT,
            }
            small |= {"moved_A": small["whole_A"], "change_A": torch.zeros_like(small["whole_A"])}
            small["moved_pointing"] = small["pointing"]
            if input_gains is not None:
                moved = torch.stack([gain(one) for gain, one in zip(input_gains, A, strict=True)])
                change = moved - A
                small |= {"moved_A": moved @ moved.mT, "change_A": change @ change.mT}
                small["moved_pointing"] = weighted @ (moved @ V)[..., :pairs].mT
            return cls(**{name: product.to(small_on(device)) for name, product in small.items()})

    @classmethod
    def joined(cls, stacks: Sequence[Grams]) -> Grams:
        """Several stacks of one rank as one."""
        return cls(*(torch.cat([getattr(grams, part.name) for grams in stacks]) for part in fields(cls)))

    def at(self, places: list[int]) -> Grams:
        """Those of some of the modules."""
        return Grams(*(getattr(self, part.name)[places] for part in fields(self)))

    @property
    def left_A(self) -> Tensor:
        """``K_A − p_A``."""
        return self.whole_A - self.kept_A

    @property
    def left_B(self) -> Tensor:
        """``K_B − p_B``."""
        return self.whole_B - self.kept_B

    def energies(self) -> Tensor:
        """``‖Π_b Δ‖²`` for ``s = 1``, ``(m, 4)`` in the order of the blocks."""
        pairs = {
            "aligned": (self.kept_B, self.kept_A),
            "output": (self.kept_B, self.left_A),
            "input": (self.left_B, self.kept_A),
            "off": (self.left_B, self.left_A),
        }
        # A difference may fall just below the zero that it stands for.
        return torch.stack([_inner(*pairs[block]) for block in BLOCKS], dim=1).clamp(min=0.0)

    def sizes(self) -> Tensor:
        """``Σ |K_B| ∘ |K_A|``, ``(m,)``: what ``‖Δ‖²`` would be if nothing cancelled."""
        return _inner(self.whole_B.abs(), self.whole_A.abs())

    def along(self) -> Tensor:
        """``⟨Δ, U S Vᵀ⟩`` for ``s = 1``, ``(m,)``."""
        return _trace(self.pointing)

    def moved(self) -> Tensor:
        """``(m, 3)`` for ``s = 1``: ``‖X‖²``, ``‖X − Δ‖²`` and ``⟨X, U S Vᵀ⟩`` of ``X = s·B·A'``."""
        sizes = [_inner(self.whole_B, side) for side in (self.moved_A, self.change_A)]
        return torch.stack([*sizes, _trace(self.moved_pointing)], dim=1)

    def mixed(self, gain: Tensor) -> Tensor:
        """What a correction by gains of rank two and a truncation to rank ``r`` would do, for ``s = 1``.

        With square roots ``N = S Sᵀ`` of the four Gram matrices of the parts, the core ``C`` of ``X*`` has the blocks
        ``g_b S_Bᵀ S_A``, as the parts inside and outside are orthogonal.

        Args:
            gain: ``g_b``, ``(m, 4)``.

        Returns:
            ``(m, 3)``: ``‖X* − X‖²``, ``‖X − Δ‖²`` and ``⟨X, U S Vᵀ⟩``.
        """
        r = self.whole_A.shape[-1]
        (in_B, from_B), (out_B, _), (in_A, from_A), (out_A, _) = map(
            _root, (self.kept_B, self.left_B, self.kept_A, self.left_A)
        )
        before = torch.cat([torch.cat([one.mT @ in_A, one.mT @ out_A], dim=-1) for one in (in_B, out_B)], dim=-2)
        table = gain.unflatten(1, (2, 2)).repeat_interleave(r, dim=1).repeat_interleave(r, dim=2)
        closest = table * before
        squares, right = torch.linalg.eigh(closest.mT @ closest)
        right = right[..., -r:]
        cut = closest @ right @ right.mT
        pointing = from_B.mT @ self.pointing @ from_A
        return torch.stack(
            [
                squares[:, :-r].clamp(min=0.0).sum(dim=1),
                (cut - before).square().sum((-2, -1)),
                _inner(cut[:, :r, :r], pointing),
            ],
            dim=1,
        )


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` with ``S Sᵀ = gram``, and the inverse of ``Sᵀ`` on the directions that are there."""
    values, vectors = torch.linalg.eigh(gram)
    is_there = values > 1e-12 * values[:, -1:]
    root = torch.where(is_there, values, 0.0).sqrt()
    return vectors * root[:, None], vectors * torch.where(is_there, root, torch.inf).reciprocal()[:, None]


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((-2, -1))


def _trace(stack: Tensor) -> Tensor:
    return torch.diagonal(stack, dim1=-2, dim2=-1).sum(-1)
