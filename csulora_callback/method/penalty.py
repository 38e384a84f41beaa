"""What a correction attenuates, and how much: the multipliers ``λ_b`` of :mod:`csulora_callback.method.correction`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from csulora_callback.method.token_space import MAX_STRENGTH

BLOCKS = ("aligned", "output", "input", "off")
"""The four orthogonal parts of an update, see the table in :mod:`csulora_callback.method.correction`."""

# A gain table whose determinant vanishes to rounding factors over the two sides and keeps the rank.
_RANK_ONE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Penalty:
    """The table of multipliers ``λ_b ≥ 0`` that says how much each block of an update is attenuated.

    Use one of the constructors; ``strength=0`` is always the identity, and ``math.inf`` is allowed.

    Example:
        >>> from csulora_callback import Penalty
        >>> Penalty.csulora(10.0).gain({"aligned": 0.2, "output": 0.1, "input": 0.1, "off": 0.6})
        {'aligned': 1.0, 'output': 0.3333333333333333, 'input': 0.3333333333333333, 'off': 0.14285714285714285}
        >>> Penalty.projection()
        Penalty(name='projection', parameters={})
    """

    name: str
    parameters: dict[str, float] = field(hash=False)
    _table: Callable[..., dict[str, float]] = field(repr=False, compare=False)
    on_probes: float | None = field(default=None, repr=False)  # λ of a data-aware penalty, which is not in the table
    skips_prefix: bool = field(default=False, repr=False)  # whether it reads no token of the prefix that probes share

    def __str__(self) -> str:
        return in_words({"name": self.name, **self.parameters})

    @classmethod
    def csulora(cls, strength: float = 10.0) -> Penalty:
        """The paper's orientation: ``λ_partial = strength·ρ_partial``, ``λ_off = strength·ρ_off``, nothing on aligned.

        ``ρ_b`` is the block's share of ``‖Δ‖²``. The rank of the result can reach twice that of the update.
        """
        return cls("csulora", {"strength": _checked_multiplier("strength", strength)}, _csulora)

    @classmethod
    def separable(cls, strength: float = 10.0) -> Penalty:
        """Each half by its own energy, ``λ_output = strength·ρ_output`` and ``λ_input = strength·ρ_input``.

        ``1 + λ_off = (1 + λ_output)(1 + λ_input)``, so that the table of gains has rank one and the rank is kept.
        """
        return cls("separable", {"strength": _checked_multiplier("strength", strength)}, _separable)

    @classmethod
    def guard(cls, strength: float = 10.0) -> Penalty:
        """The opposite orientation: protects the subspace and lets the task live outside it. Rank is kept.

        ``λ_aligned = (1 + strength)² − 1``, ``λ_partial = strength``, ``λ_off = 0``.
        """
        return cls("guard", {"strength": _checked_multiplier("strength", strength)}, _guard)

    @classmethod
    def projection(cls) -> Penalty:
        """The hard limit: only the fully aligned block is kept. Rank is kept."""
        return cls("projection", {}, _projection)

    @classmethod
    def data_aware(cls, strength: float = 10.0) -> Penalty:
        """Measures by activations: what the update does to the task is kept, what it does to the probes attenuated.

        ``argmin_X ‖(X − Δ) C_T^½‖² + strength · ‖X C_H^½‖²``, with ``C_T`` and ``C_H`` the second moments of a
        module's inputs on the task and on prompts that are to be refused (:mod:`csulora_callback.method.token_space`).
        Nothing is taken from the displacement; rank is kept. ``strength`` is at most 1e6.
        """
        strength = _checked_on_probes(strength)
        return cls("data_aware", {"strength": strength}, _nothing, on_probes=strength)

    @classmethod
    def content_aware(cls, strength: float = 300.0) -> Penalty:
        """As :meth:`data_aware`, where ``C_H`` is of what comes after the prefix that all probes share.

        The prefix is a chat template's, its system prompt and markers: any prompt begins with it, harmless ones too.
        What is left tells probes from these, and the model refuses fewer of them; it takes greater strengths,
        at most 1e6.
        """
        strength = _checked_on_probes(strength)
        return cls("content_aware", {"strength": strength}, _nothing, on_probes=strength, skips_prefix=True)

    @classmethod
    def table(cls, aligned: float = 0.0, output: float = 0.0, input: float = 0.0, off: float = 0.0) -> Penalty:
        """A free table of constant multipliers ``λ_b``, each in ``[0, ∞]``."""
        multipliers = {"aligned": aligned, "output": output, "input": input, "off": off}
        return cls("table", {b: _checked_multiplier(b, m) for b, m in multipliers.items()}, _constant)

    def multipliers(self, relative_energy: Mapping[str, float]) -> dict[str, float]:
        """``λ_b`` by block for an update whose blocks hold the shares ``relative_energy`` of its energy."""
        return self._table(relative_energy, **self.parameters)

    def gain(self, relative_energy: Mapping[str, float]) -> dict[str, float]:
        """``g_b = 1/(1 + λ_b)`` by block, each in ``[0, 1]``."""
        return {block: 1.0 / (1.0 + m) for block, m in self.multipliers(relative_energy).items()}

    def to_json(self) -> dict:
        """``{"name": …, parameter: …}`` with infinity as the string ``"inf"``, which JSON has no number for."""
        return {"name": self.name, **{k: v if math.isfinite(v) else str(v) for k, v in self.parameters.items()}}


def _checked_multiplier(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
        raise ValueError(f"`{name}`: expected a number ≥ 0 (math.inf is allowed), but got {value!r}.")
    return float(value)


def _checked_on_probes(strength: float) -> float:
    strength = _checked_multiplier("strength", strength)
    if strength > MAX_STRENGTH:
        raise ValueError(
            f"`strength`: expected at most {MAX_STRENGTH:g} for a data-aware penalty, but got {strength!r}."
        )
    return strength


def _scaled(strength: float, share: float) -> float:
    # ∞·0 is a block without energy under an infinite strength: nothing to attenuate, not NaN.
    return strength * share if share else 0.0


def _csulora(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    partially = _scaled(strength, relative_energy["output"] + relative_energy["input"])
    off = _scaled(strength, relative_energy["off"])
    return {"aligned": 0.0, "output": partially, "input": partially, "off": off}


def _separable(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    output = _scaled(strength, relative_energy["output"])
    input_ = _scaled(strength, relative_energy["input"])
    return {"aligned": 0.0, "output": output, "input": input_, "off": (1 + output) * (1 + input_) - 1}


def _guard(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    # A product, not a power: Python's ** raises where it overflows, and infinity is what is meant.
    return {"aligned": (1 + strength) * (1 + strength) - 1, "output": strength, "input": strength, "off": 0.0}


def _projection(relative_energy: Mapping[str, float]) -> dict[str, float]:
    return {"aligned": 0.0, "output": math.inf, "input": math.inf, "off": math.inf}


def _nothing(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    return dict.fromkeys(BLOCKS, 0.0)


def _constant(relative_energy: Mapping[str, float], **multipliers: float) -> dict[str, float]:
    return dict(multipliers)


def rank_one(gain: Mapping[str, float]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Gains of the two sides, each ``(inside, outside)``, if the table of block gains is their outer product.

    Example:
        >>> rank_one({"aligned": 0.25, "output": 0.5, "input": 0.5, "off": 1.0})
        ((0.5, 1.0), (0.5, 1.0))
        >>> rank_one({"aligned": 1.0, "output": 0.5, "input": 0.5, "off": 1.0}) is None
        True
    """
    table = [[gain["aligned"], gain["output"]], [gain["input"], gain["off"]]]
    largest = max(gain.values())
    if largest == 0.0:
        return (0.0, 0.0), (1.0, 1.0)
    if abs(gain["aligned"] * gain["off"] - gain["output"] * gain["input"]) > _RANK_ONE_TOLERANCE * largest**2:
        return None
    i, j = next((i, j) for i in (0, 1) for j in (0, 1) if table[i][j] == largest)
    root = math.sqrt(largest)  # shared between the sides, so that neither factor shrinks alone
    return (table[0][j] / root, table[1][j] / root), (table[i][0] / root, table[i][1] / root)


def in_words(penalty: Mapping[str, object]) -> str:
    """A penalty's name and parameters, also of one that was written as JSON.

    Example:
        >>> in_words({"name": "guard", "strength": 10.0}), in_words({"name": "projection"}), str(Penalty.guard(3.0))
        ('guard (strength 10)', 'projection', 'guard (strength 3)')
    """
    said = {name: f"{value:g}" if isinstance(value, int | float) else str(value) for name, value in penalty.items()}
    name = said.pop("name")
    return f"{name} ({', '.join(map(' '.join, said.items()))})" if said else name
