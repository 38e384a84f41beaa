r"""The data-aware closest safe update of an embedding, whose inputs are one-hot: no systems are solved.

The second moments of :mod:`csulora_callback.method.token_space` are diagonal then. With ``t_v`` and ``h_v`` the counts
of token ``v`` in task and probes, scaled as there to ``Σ t = Σ h = d_in``,

    ``X* = Δ · diag(g)``,  ``g_v = c_v / (c_v + λ h_v)``,  ``c_v = (t_v + ε) / (1 + ε)``,

so that each column of ``A`` is scaled, and the rank is kept exactly. What the probes do not hold stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.method.token_space import RIDGE, InputGain, TokenSystem, gains_of, token_systems


@dataclass(frozen=True)
class OneHotSystem:
    """What the closest safe update of an embedding is computed from, whatever the strength.

    Attributes:
        task: ``c (d_in,)``, float64.
        probes: ``h (d_in,)``, float64.
    """

    task: Tensor
    probes: Tensor

    @classmethod
    def of(cls, task: Tensor | None, probes: Tensor, ridge: float) -> OneHotSystem:
        """From counts ``(d_in,)``; of no task is known what :func:`~.token_space.input_gain` says.

        Example:
            >>> system = OneHotSystem.of(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), ridge=1.0)
            >>> system.task, system.probes
            (tensor([1.5000, 0.5000], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
        """
        known = None if task is None or not task.any() else (_scaled(task) + ridge) / (1.0 + ridge)
        return cls(torch.ones_like(probes, dtype=torch.float64) if known is None else known, _scaled(probes))


@dataclass(frozen=True)
class OneHotGain:
    """The map from the input side of an embedding's update to that of the closest safe one.

    Attributes:
        system: what does not depend on ``λ``.
        strength: ``λ``.

    Example:
        >>> system = OneHotSystem.of(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), ridge=1.0)
        >>> OneHotGain(system, strength=0.5)(torch.ones(1, 2))
        tensor([[0.7500, 0.5000]])
    """

    system: OneHotSystem
    strength: float

    @property
    def probes(self) -> Tensor:
        """How much each token is attenuated ``(d_in,)``, for ``λ = 1``."""
        return self.system.probes

    def __call__(self, lora_A: Tensor) -> Tensor:
        """The map of ``A (r, d_in)``, in its dtype and on its device."""
        gains = self.system.task / (self.system.task + self.strength * self.system.probes)
        if lora_A.device.type == "mps":  # has no float64
            return (lora_A.cpu().double() * gains).to(lora_A.device, lora_A.dtype)
        return (lora_A.double() * gains.to(lora_A.device)).to(lora_A.dtype)


def input_systems(
    task: Mapping[str, Tensor], probes: Mapping[str, Tensor], ridge: float = RIDGE, device: torch.device | str = "cpu"
) -> dict[str, TokenSystem | OneHotSystem]:
    """:func:`~.token_space.token_systems`, and of modules whose probes are counts ``(d_in,)`` those of one-hot inputs.

    Example:
        >>> systems = input_systems({}, {"embed_tokens": torch.ones(4), "q_proj": torch.eye(3)})
        >>> [type(system).__name__ for system in systems.values()]
        ['TokenSystem', 'OneHotSystem']
    """
    counts = {name: own for name, own in probes.items() if own.ndim == 1}
    vectors = {name: own for name, own in probes.items() if name not in counts}
    systems: dict[str, TokenSystem | OneHotSystem] = dict(token_systems(task, vectors, ridge, device))
    return systems | {name: OneHotSystem.of(task.get(name), own, ridge) for name, own in counts.items()}


def input_gains_of(
    systems: Mapping[str, TokenSystem | OneHotSystem], strength: float, device: torch.device | str = "cpu"
) -> dict[str, InputGain | OneHotGain]:
    """:func:`~.token_space.gains_of` systems of either kind.

    Example:
        >>> gains = input_gains_of(input_systems({}, {"embed_tokens": torch.tensor([2.0, 0.0])}), strength=0.5)
        >>> gains["embed_tokens"](torch.ones(1, 2))
        tensor([[0.5000, 1.0000]])
    """
    tokens = {name: system for name, system in systems.items() if isinstance(system, TokenSystem)}
    gains: dict[str, InputGain | OneHotGain] = dict(gains_of(tokens, strength, device))
    return gains | {name: OneHotGain(system, strength) for name, system in systems.items() if name not in tokens}


def _scaled(counts: Tensor) -> Tensor:
    counts = counts.double()
    return counts * (len(counts) / counts.sum().clamp(min=1.0))
