r"""The mathematics of the correction, as pure functions on tensors.

A LoRA update ``Δ = s·B·A`` is split by a safety subspace with output side ``U`` and input side ``V`` into four
orthogonal blocks,

====================  =================  ============================
name                  block              meaning
====================  =================  ============================
``aligned``           ``P_U Δ P_V``      fully aligned
``output``            ``P_U Δ Q_V``      partially aligned, output half
``input``             ``Q_U Δ P_V``      partially aligned, input half
``off``               ``Q_U Δ Q_V``      off-subspace
====================  =================  ============================

with ``P = basis·basisᵀ`` and ``Q = I − P``. The closest safe update is

    ``X* = argmin_X ‖X − Δ‖² + Σ_b λ_b ‖Π_b X‖²``,  hence  ``Π_b X* = g_b Π_b Δ``  with  ``g_b = 1/(1 + λ_b)``.

A :class:`~csulora_callback.Penalty` is the table of the ``λ_b``; :func:`correct` returns ``X*`` as LoRA factors.
No ``d_out × d_in`` or ``d × d`` matrix is ever formed. A data-aware penalty measures the input side by activations
instead of by ``V``: see :mod:`csulora_callback.method.token_space`. The split and the idea of attenuating by relative
energy are those of CSULoRA (arXiv 2605.30640, abstract); the concrete scales and the treatment of rank are this
project's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from csulora_callback.method.closest import Correction, correct_each
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.precision import width_on
from csulora_callback.method.token_space import InputGain


def correct(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    scaling: float = 1.0,
    rank: Literal["truncate", "expand"] = "truncate",
    input_gain: InputGain | None = None,
) -> Correction:
    r"""Closest safe update of ``Δ = scaling · lora_B · lora_A``, again as LoRA factors.

    With the gains in a table ``G = [[g_aligned, g_output], [g_input, g_off]]``, a table of rank one is written into
    the factors exactly, in the gauge they came in. Otherwise ``X*`` can have rank ``2r``: ``"truncate"`` keeps its
    best rank-``r`` approximation (Eckart–Young), in the gauge closest to the old factors (orthogonal Procrustes) so
    that optimizer moments keep their meaning; ``"expand"`` keeps all of it, at rank ``min(2r, d_out, d_in)``.

    Computes in float64 on a CPU, whatever the factors' dtype; on an accelerator the large products are in float32, and
    ``X*`` is right to about 1e-6 of ``‖s·B‖·‖A‖``. Costs ``O((d_out + d_in)(k + r) r)`` time.

    Args:
        lora_A: ``(r, d_in)``, any floating dtype.
        lora_B: ``(d_out, r)``.
        U: ``(d_out, k)`` orthonormal columns, output side of the safety subspace; ``k = 0`` means no subspace.
        V: ``(d_in, k')`` orthonormal columns, input side.
        penalty: the table of ``λ_b``.
        scaling: PEFT's ``scaling`` of the layer.
        rank: what to do when ``X*`` does not fit rank ``r``.
        input_gain: what :func:`~csulora_callback.method.token_space.input_gain` makes of the module's activations; a
            data-aware penalty needs it, no other has it.

    Returns:
        The corrected factors, for the same ``scaling``, with energies and gains.

    Raises:
        ValueError: if shapes do not fit together, ``penalty`` or ``rank`` is of no known kind, a factor, a basis or
            ``scaling`` is NaN or Inf, or ``input_gain`` is missing or not used.
        CorrectionOverflowError: a ``ValueError`` of its own, if the corrected update has entries that the factors'
            dtype cannot hold, however its size is shared between them, or if its energy overflows.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, correct
        >>> A, B = torch.ones(1, 2), torch.ones(3, 1)
        >>> U, V = torch.eye(3)[:, :1], torch.eye(2)[:, :1]  # first output, first input
        >>> result = correct(A, B, U, V, Penalty.projection())
        >>> result.lora_B @ result.lora_A
        tensor([[1., 0.],
                [0., 0.],
                [0., 0.]])
        >>> {block: round(share, 3) for block, share in result.relative_energy.items()}
        {'aligned': 0.167, 'output': 0.167, 'input': 0.333, 'off': 0.333}
    """
    _check_arguments(lora_A, lora_B, U, V, penalty, scaling, rank, input_gain)
    factors, sides = (lora_A[None], lora_B[None]), (U.to(lora_A.device)[None], V.to(lora_A.device)[None])
    gains = None if input_gain is None else [input_gain]
    (result,) = correct_each(*factors, *sides, penalty, [scaling], rank, gains, wide=width_on(lora_A.device))
    return result


def _check_arguments(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    scaling: float,
    rank: str,
    input_gain: InputGain | None,
) -> None:
    for name, tensor, axes in (
        ("lora_A", lora_A, "(r, d_in)"),
        ("lora_B", lora_B, "(d_out, r)"),
        ("U", U, "(d_out, k)"),
        ("V", V, "(d_in, k)"),
    ):
        if tensor.ndim != 2:
            raise ValueError(f"`{name}`: expected a matrix {axes}, but got shape {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}`: expected a floating-point matrix, but got {tensor.dtype}.")
    (r, d_in), (d_out, _) = lora_A.shape, lora_B.shape
    for name, tensor, axis, expected, source in (
        ("lora_B", lora_B, 1, r, "the rank r of `lora_A`"),
        ("U", U, 0, d_out, "d_out of `lora_B`"),
        ("V", V, 0, d_in, "d_in of `lora_A`"),
    ):
        if tensor.shape[axis] != expected:
            rows = ("rows", "columns")[axis]
            raise ValueError(f"`{name}`: expected {expected} {rows}, {source}, but got shape {tuple(tensor.shape)}.")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("U", U), ("V", V)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}`: expected finite values, but got NaN or Inf.")
    if not isinstance(penalty, Penalty):
        raise ValueError(f"`penalty`: expected a Penalty such as Penalty.guard(3.0), but got {penalty!r}.")
    if (penalty.on_probes is None) != (input_gain is None):
        raise ValueError(
            f"`input_gain`: expected {'one' if input_gain is None else 'none'} for the penalty {penalty}, but got "
            f"{'none' if input_gain is None else 'one'}. A data-aware penalty needs token_space.input_gain(task, "
            "probes, strength) of the module's activations, and no other can use it."
        )
    if input_gain is not None and input_gain.probes.shape[-1] != d_in:
        raise ValueError(
            f"`input_gain`: expected one of {d_in} inputs, d_in of `lora_A`, but got {input_gain.probes.shape[-1]}."
        )
    if not math.isfinite(scaling):
        raise ValueError(f"`scaling`: expected a finite number, but got {scaling!r}.")
    if rank not in ("truncate", "expand"):
        raise ValueError(f"`rank`: expected 'truncate' or 'expand', but got {rank!r}.")
