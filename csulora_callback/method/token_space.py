r"""The data-aware closest safe update, in token space: closeness is measured on the task, harm on probes.

With ``T (n_T, d_in)`` token vectors that entered a module while the task was trained and ``H (n_H, d_in)`` those of
prompts that are to be refused, both scaled to ``‖·‖² = d_in``, the second moments are

    ``C_T = (TᵀT + ε I) / (1 + ε)``,  ``C_H = HᵀH``,

and the closest safe update is

    ``X* = argmin_X ‖(X − Δ) C_T^½‖² + λ ‖X C_H^½‖² = Δ · C_T (C_T + λ C_H)⁻¹``.

It acts on the right: ``A`` alone changes, and the rank is kept exactly. By Woodbury's identity, twice,

    ``C_T (C_T + λ C_H)⁻¹ = I − Hᵀ (I/λ + K)⁻¹ H C_T⁻¹``,  ``K = H C_T⁻¹ Hᵀ``,
    ``H C_T⁻¹ = (1 + ε)/ε · (H − M T)``,  ``M = H Tᵀ (ε I + T Tᵀ)⁻¹``,

so that only ``n × n`` systems are solved and no ``d_in × d_in`` matrix is formed. ``M`` and ``K``, a
:class:`TokenSystem`, do not depend on ``λ``: another strength factorizes ``I/λ + K`` anew, and that is all. Nothing
larger than these is kept beside the tokens: an :class:`InputGain` multiplies ``A`` by one factor after the other.

All of it is in float64, on an accelerator too: where the task explains the probes ``H − M T`` is a small difference of
large numbers, and the systems' condition grows with ``d_in λ/ε``.

This is the project's own; CSULoRA's penalties (:mod:`csulora_callback.method.correction`) know weights only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1
MAX_STRENGTH = 1e6


_CHUNK = 2**27
"""Bytes of token vectors and their products in float64 that are on a device at once, at most about."""


@dataclass(frozen=True)
class ScaledTokens:
    """Token vectors ``(n, d_in)`` as they were given, and what scales them to ``‖·‖² = d_in``, so ``tr C = d_in``.

    Where all are zero, it is 1.
    """

    vectors: Tensor
    scale: float

    def on(self, device: torch.device) -> Tensor:
        """Not scaled, in float64; they travel in the dtype that they have."""
        return self.vectors.to(device).double()


@dataclass(frozen=True)
class TokenSystem:
    """What the closest safe update of one input is computed from, whatever the strength.

    Attributes:
        task: ``T (n_T, d_in)``.
        probes: ``H (n_H, d_in)``.
        explained: ``M (n_H, n_T)``, float64.
        inner: ``K (n_H, n_H)``, float64.
        factor: ``(1 + ε)/ε``, or 1 where nothing is known of the task.
    """

    task: ScaledTokens
    probes: ScaledTokens
    explained: Tensor
    inner: Tensor
    factor: float


@dataclass(frozen=True)
class InputGain:
    """The map ``I − Hᵀ (I/λ + K)⁻¹ H C_T⁻¹`` from the input side of an update to that of the closest safe one.

    Attributes:
        system: what does not depend on ``λ``.
        cholesky: the lower factor of ``I/λ + K``, ``(n_H, n_H)``, float64; ``None`` for ``λ = 0``, the identity.

    Example:
        >>> import torch
        >>> gain = input_gain(torch.eye(3)[:2], torch.eye(3)[1:], strength=1.0)
        >>> stacked = torch.ones(2, 3)  # modules that share an input are corrected together
        >>> torch.equal(gain(stacked)[:1], gain(stacked[:1]))
        True
    """

    system: TokenSystem
    cholesky: Tensor | None

    @property
    def probes(self) -> Tensor:
        """The token vectors ``(n_H, d_in)`` that are attenuated."""
        return self.system.probes.vectors

    def __call__(self, lora_A: Tensor) -> Tensor:
        """The map of ``A (r, d_in)``, in its dtype and on its device.

        Costs ``O((d_in · n + n²) r)``, in float64. Rows are mapped one by one, so that those of several modules may be
        stacked.
        """
        if self.cholesky is None or not len(self.probes):
            return lora_A.clone()
        device, own = _device_of_float64(lora_A.device), self.system
        H, T, A = own.probes.on(device), own.task.on(device), lora_A.to(device, torch.float64)
        weights = torch.cholesky_solve((A @ H.T).T * own.probes.scale, self.cholesky.to(device)).T  # A Hᵀ (I/λ + K)⁻¹
        explained = weights @ own.explained.to(device)
        change = (weights * own.probes.scale) @ H - (explained * own.task.scale) @ T
        return (A - own.factor * change).to(lora_A.device, lora_A.dtype)


def input_gain(task: Tensor, probes: Tensor, strength: float, ridge: float = RIDGE) -> InputGain:
    r"""The input side of the data-aware closest safe update, for one module.

    Costs ``O(d_in · n² + n³)`` with ``n = max(n_T, n_H)``, in float64.

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
        >>> task, probes = torch.eye(3)[:2], torch.eye(3)[1:]  # the second input is excited by both
        >>> gain = input_gain(task, probes, strength=1.0)
        >>> [round(value, 2) for value in gain(torch.ones(1, 3))[0].tolist()]
        [1.0, 0.49, 0.06]
    """
    return input_gains({"": task}, {"": probes}, strength, ridge, probes.device)[""]


def input_gains(
    task: Mapping[str, Tensor],
    probes: Mapping[str, Tensor],
    strength: float,
    ridge: float = RIDGE,
    device: torch.device | str = "cpu",
) -> dict[str, InputGain]:
    """:func:`input_gain` of every module in ``probes``: :func:`token_systems`, and :func:`gains_of` them.

    Example:
        >>> import torch
        >>> tokens = torch.eye(3)
        >>> gains = input_gains({}, {"q_proj": tokens, "k_proj": tokens}, strength=1.0)
        >>> gains["q_proj"] is gains["k_proj"]
        True
    """
    _check_strength(strength)
    return gains_of(token_systems(task, probes, ridge, device), strength, device)


def token_systems(
    task: Mapping[str, Tensor],
    probes: Mapping[str, Tensor],
    ridge: float = RIDGE,
    device: torch.device | str = "cpu",
) -> dict[str, TokenSystem]:
    """The systems of every module in ``probes``, to take gains of any strength from.

    Those of the same shapes are computed together, as many at a time as fit a bounded memory. Each is kept where its
    probes lie, as all together are large: ``n²`` numbers twice beside the tokens, of which nothing is copied. Modules
    that share a tensor of probes, because they get the same input, share the system. Of a module that is not in
    ``task`` nothing is known of the task.

    Args:
        task: ``(n_T, d_in)`` by module, see :func:`input_gain`.
        probes: ``(n_H, d_in)`` by module.
        ridge: ``ε``.
        device: where to compute.

    Raises:
        ValueError: as :func:`input_gain`; where there are several modules it is named.

    Example:
        >>> import torch
        >>> systems = token_systems({"q_proj": torch.eye(3)[:2]}, {"q_proj": torch.eye(3)[1:]})
        >>> for strength in (1.0, 3.0):
        ...     gain = gains_of(systems, strength)["q_proj"]
        ...     print([round(value, 2) for value in gain(torch.ones(1, 3))[0].tolist()])
        [1.0, 0.49, 0.06]
        [1.0, 0.24, 0.02]
    """
    if not 0.0 < ridge < math.inf:
        raise ValueError(f"`ridge`: expected a finite number > 0, but got {ridge!r}.")
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    for name, own in probes.items():
        if id(own) not in inputs:
            inputs[id(own)] = task.get(name, own[:0]).detach(), own.detach()
            _check_tokens(name, *inputs[id(own)])
    solved: dict[int, TokenSystem] = {}
    for chunk in _chunks({key: (T.shape, H.shape) for key, (T, H) in inputs.items()}):
        tasks, harms = zip(*(inputs[key] for key in chunk), strict=True)
        solved.update(zip(chunk, _solve(tasks, harms, ridge, _device_of_float64(device)), strict=True))
    return {name: solved[id(own)] for name, own in probes.items()}


def gains_of(
    systems: Mapping[str, TokenSystem], strength: float, device: torch.device | str = "cpu"
) -> dict[str, InputGain]:
    """The gains of one strength; modules that share a system share the gain, which is kept where the system lies.

    Raises:
        ValueError: if ``strength`` is negative or too large.

    Example:
        >>> import torch
        >>> systems = token_systems({}, {"q_proj": torch.eye(3)})
        >>> gains_of(systems, 1.0)["q_proj"](torch.ones(1, 3))
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    _check_strength(strength)
    distinct, device = {id(system): system for system in systems.values()}, _device_of_float64(device)
    gains = {key: InputGain(system, None) for key, system in distinct.items()}
    for chunk in _chunks({key: (system.inner.shape,) for key, system in distinct.items()} if strength else {}):
        inner = torch.stack([distinct[key].inner for key in chunk]).to(device)
        inner.diagonal(dim1=-2, dim2=-1).add_(1.0 / strength)
        for key, cholesky in zip(chunk, torch.linalg.cholesky(inner), strict=True):
            # A copy, as a part of the stack would keep all of it.
            gains[key] = InputGain(distinct[key], cholesky.to(distinct[key].inner.device, copy=True))
    return {name: gains[id(system)] for name, system in systems.items()}


def _solve(tasks: Sequence[Tensor], probes: Sequence[Tensor], ridge: float, device: torch.device) -> list[TokenSystem]:
    """The systems of inputs of the same shapes, at once."""
    (T, task_scales), (H, probe_scales) = (_stacked(tokens, device) for tokens in (tasks, probes))
    across, inner, factor = H @ T.mT, H @ H.mT, 1.0
    explained = across  # of no task: (n_H, 0)
    if T.shape[1]:
        system = T @ T.mT
        system.diagonal(dim1=-2, dim2=-1).add_(ridge)
        explained = torch.cholesky_solve(across.mT, torch.linalg.cholesky(system)).mT
        factor = (1.0 + ridge) / ridge
        inner = factor * (inner - explained @ across.mT)
    inner = (inner + inner.mT) / 2.0
    tokens = zip(map(ScaledTokens, tasks, task_scales), map(ScaledTokens, probes, probe_scales), strict=True)
    home = _device_of_float64(probes[0].device)
    return [
        TokenSystem(*both, own.to(home, copy=True), own_inner.to(home, copy=True), factor)
        for both, own, own_inner in zip(tokens, explained, inner, strict=True)
    ]


def _stacked(tokens: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[float]]:
    """Scaled token vectors ``(b, n, d_in)`` in float64, and their scales."""
    stack = torch.stack([own.to(device) for own in tokens]).double()
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True)
    scales = torch.where(norms > 0, math.sqrt(stack.shape[2]) / norms, 1.0)
    return stack.mul_(scales), scales.flatten().tolist()


def _device_of_float64(device: torch.device | str) -> torch.device:
    """The device, or the CPU where it has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def _chunks(shapes: Mapping[int, tuple[torch.Size, ...]]) -> Iterator[list[int]]:
    """Keys of same-shaped matrices, as many together as fit a bounded memory, or one."""
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for key, own in shapes.items():
        alike.setdefault(own, []).append(key)
    for own, keys in alike.items():
        bytes_of_one = 8 * sum(n * (width + 3 * n) for n, width in own)  # with three products, n × n
        size = max(1, _CHUNK // max(1, bytes_of_one))
        for start in range(0, len(keys), size):
            yield keys[start : start + size]


def _check_strength(strength: float) -> None:
    if not 0.0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"`strength`: expected a number from 0 to {MAX_STRENGTH:g}, but got {strength!r}.")


def _check_tokens(module: str, task: Tensor, probes: Tensor) -> None:
    of = f" of module '{module}'" if module else ""
    for name, tokens in (("task", task), ("probes", probes)):
        if tokens.ndim != 2 or not tokens.is_floating_point():
            raise ValueError(
                f"`{name}`: expected token vectors{of} (n, d_in) of a floating dtype, but got shape "
                f"{tuple(tokens.shape)} of {tokens.dtype}."
            )
        if not torch.isfinite(tokens).all():
            raise ValueError(f"`{name}`: expected finite values{of}, but got NaN or Inf.")
    if task.shape[1] != probes.shape[1]:
        raise ValueError(
            f"`probes`: expected vectors{of} of d_in = {task.shape[1]} as `task` has, but got {probes.shape[1]}."
        )
