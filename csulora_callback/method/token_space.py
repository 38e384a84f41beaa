r"""The data-aware closest safe update, in token space: closeness is measured on the task, harm on probes.

With ``T (n_T, d_in)`` token vectors that entered a module while the task was trained and ``H (n_H, d_in)`` those of
prompts that are to be refused, both scaled to ``‖·‖² = d_in``, the second moments are

    ``C_T = (TᵀT + ε I) / (1 + ε)``,  ``C_H = HᵀH``,

and the closest safe update is

    ``X* = argmin_X ‖(X − Δ) C_T^½‖² + λ ‖X C_H^½‖² = Δ · C_T (C_T + λ C_H)⁻¹``.

It acts on the right: ``A`` alone changes, and the rank is kept exactly. By Woodbury's identity, twice,

    ``C_T (C_T + λ C_H)⁻¹ = I − Hᵀ R``,  ``R = (I/λ + H C_T⁻¹ Hᵀ)⁻¹ H C_T⁻¹``,
    ``H C_T⁻¹ = (1 + ε)/ε · (H − H Tᵀ (ε I + T Tᵀ)⁻¹ T)``,

so that only ``n × n`` systems are solved and no ``d_in × d_in`` matrix is formed. This is the project's own; CSULoRA's
penalties (:mod:`csulora_callback.method.correction`) know weights only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1
MAX_STRENGTH = 1e6


@dataclass(frozen=True)
class InputGain:
    """The map ``I − Hᵀ R`` that takes the input side of an update to that of the closest safe one.

    Attributes:
        probes: ``H (n_H, d_in)``, scaled; float32.
        response: ``R (n_H, d_in)``; float32.
    """

    probes: Tensor
    response: Tensor

    def __call__(self, lora_A: Tensor) -> Tensor:
        """``A (I − Hᵀ R)``, shape ``(r, d_in)``, in the dtype and on the device of ``A``; ``O(d_in · n_H · r)``."""
        probes, response = (side.to(lora_A.device, lora_A.dtype) for side in (self.probes, self.response))
        return lora_A - (lora_A @ probes.T) @ response


def input_gain(task: Tensor, probes: Tensor, strength: float, ridge: float = RIDGE) -> InputGain:
    r"""The input side of the data-aware closest safe update, for one module.

    Computes in float64; costs ``O(d_in · n² + n³)`` with ``n = max(n_T, n_H)``.

    Args:
        task: ``T (n_T, d_in)``, token vectors of the task, any floating dtype and scale; ``n_T = 0``, nothing known of
            the task, leaves ``C_T = I``.
        probes: ``H (n_H, d_in)``, token vectors of the probes; without any, nothing is attenuated.
        strength: ``λ``, at most ``MAX_STRENGTH``, beyond which float64 cannot tell; 0 gives the identity.
        ridge: ``ε``, the weight of closeness in directions that the task does not excite. The smaller it is, the more
            the update may grow there: ``‖X* − Δ‖`` is bounded by ``‖Δ‖`` as ``ε → ∞`` and is not for small ``ε``.

    Raises:
        ValueError: if shapes do not fit together, values are NaN or Inf, ``strength`` is negative or too large, or
            ``ridge`` is not positive.

    Example:
        >>> import torch
        >>> from csulora_callback.method.token_space import input_gain
        >>> task, probes = torch.eye(3)[:2], torch.eye(3)[1:]  # the second input is excited by both
        >>> gain = input_gain(task, probes, strength=1.0)
        >>> [round(value, 2) for value in gain(torch.ones(1, 3))[0].tolist()]
        [1.0, 0.49, 0.06]
    """
    _check_arguments(task, probes, strength, ridge)
    device = "cpu" if probes.device.type == "mps" else probes.device  # which has no float64, and that is needed here
    T, H = (_scaled(tokens.detach().to(device, torch.float64)) for tokens in (task, probes))
    if len(T):
        system = torch.linalg.cholesky(T @ T.T + ridge * _identity(T))
        explained = torch.cholesky_solve(T @ H.T, system).T @ T
        whitened = (1.0 + ridge) / ridge * (H - explained)
    else:
        whitened = H
    if strength == 0.0:
        return InputGain(H[:0].float(), H[:0].float())
    inner = whitened @ H.T
    inner = (inner + inner.T) / 2.0 + _identity(H) / strength
    response = torch.cholesky_solve(whitened, torch.linalg.cholesky(inner))
    return InputGain(H.float(), response.float())


def input_gains(
    task: Mapping[str, Tensor],
    probes: Mapping[str, Tensor],
    strength: float,
    ridge: float = RIDGE,
    device: torch.device | str = "cpu",
) -> dict[str, InputGain]:
    """:func:`input_gain` of every module in ``probes``, kept on the CPU, as all together are large.

    Modules that share a tensor of probes, because they get the same input, share the gain. Of a module that is not in
    ``task`` nothing is known of the task.

    Example:
        >>> import torch
        >>> tokens = torch.eye(3)
        >>> gains = input_gains({}, {"q_proj": tokens, "k_proj": tokens}, strength=1.0)
        >>> gains["q_proj"] is gains["k_proj"]
        True
    """
    by_input: dict[int, InputGain] = {}
    for name, own in probes.items():
        if id(own) not in by_input:
            gain = input_gain(task.get(name, own[:0]).to(device), own.to(device), strength, ridge)
            by_input[id(own)] = InputGain(gain.probes.cpu(), gain.response.cpu())
    return {name: by_input[id(own)] for name, own in probes.items()}


def _identity(tokens: Tensor) -> Tensor:
    return torch.eye(len(tokens), dtype=tokens.dtype, device=tokens.device)


def _scaled(tokens: Tensor) -> Tensor:
    """Scaled to ``‖·‖² = d_in``, that is ``tr C = d_in``; tokens that are all zero stay."""
    norm = tokens.norm()
    return tokens * (math.sqrt(tokens.shape[1]) / norm) if norm > 0 else tokens


def _check_arguments(task: Tensor, probes: Tensor, strength: float, ridge: float) -> None:
    for name, tokens in (("task", task), ("probes", probes)):
        if tokens.ndim != 2 or not tokens.is_floating_point():
            raise ValueError(
                f"`{name}`: expected token vectors (n, d_in) of a floating dtype, but got shape {tuple(tokens.shape)} "
                f"of {tokens.dtype}."
            )
        if not torch.isfinite(tokens).all():
            raise ValueError(f"`{name}`: expected finite values, but got NaN or Inf.")
    if task.shape[1] != probes.shape[1]:
        raise ValueError(
            f"`probes`: expected vectors of d_in = {task.shape[1]} as `task` has, but got {probes.shape[1]}."
        )
    if not 0.0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"`strength`: expected a number from 0 to {MAX_STRENGTH:g}, but got {strength!r}.")
    if not 0.0 < ridge < math.inf:
        raise ValueError(f"`ridge`: expected a finite number > 0, but got {ridge!r}.")
