"""Where PEFT keeps the factors of which modules: in a file by key, in a live model by parameter, in the same order.

One slot is what PEFT stores together. For LoRA on a layer it is a pair of matrices, and the pair are the factors of
one module. Where PEFT stores something else, a slot says how factors are made of it, and it of factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from csulora_callback.models.names import module_name
from csulora_callback.models.whole_slots import whole_slots_in

Factors = dict[str, tuple[Tensor, ...]]
"""By module name ``(lora_A, lora_B)``, shapes ``(r, d_in)`` and ``(d_out, r)``; of one trained whole ``(weight,)``."""

# PEFT's key of a factor inside an adapter file, fixed by its documented checkpoint format.
_KEY = "base_model.model.{name}.lora_{factor}.weight"


@dataclass(frozen=True)
class Slot:
    """The two factors of one module, stored as they are.

    Attributes:
        names: of the modules whose factors it holds.
        keys: of its tensors in a PEFT adapter file.

    Example:
        >>> Slot.of_linear("q_proj").keys
        ('base_model.model.q_proj.lora_A.weight', 'base_model.model.q_proj.lora_B.weight')
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]

    @classmethod
    def of_linear(cls, name: str) -> Slot:
        """That of LoRA on a layer, by the module's name."""
        return cls((name,), tuple(_KEY.format(name=name, factor=factor) for factor in "AB"))

    def split(self, tensors: Sequence[Tensor]) -> Factors:
        """The factors of its modules out of its tensors; without copies where that goes."""
        return {self.names[0]: tuple(tensors)}

    def join(self, factors: Factors) -> list[Tensor]:
        """Its tensors out of the factors of its modules, with the values that :meth:`split` would make them of."""
        return list(factors[self.names[0]])


def slots_in(keys: Iterable[str], names: Collection[str] | None = None) -> list[Slot]:
    """The slots of a PEFT adapter file that hold factors, by the keys in it. Of a damaged file not all may be there.

    Args:
        keys: all of the file.
        names: of the modules whose factors are looked for, in the order of the model that they are of; all of LoRA by
            default: only who knows the names can tell a module that was trained whole from what PEFT saves beside.

    Example:
        >>> slots_in([f"base_model.model.q_proj.lora_{factor}.weight" for factor in "AB"])[0].names
        ('q_proj',)
    """
    keys = list(keys)
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        for factor in "AB":
            prefix, end, rest = key.partition(f".lora_{factor}.weight")
            if end and not rest:
                found.setdefault(module_name(prefix), {})[factor] = key
    slots = [
        Slot((name,), tuple(pair.get(factor, _KEY.format(name=name, factor=factor)) for factor in "AB"))
        for name, pair in found.items()
        if names is None or name in names
    ]
    return slots + whole_slots_in(keys, set(names or ()) - found.keys())


def split_all(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> Factors:
    """The factors out of the tensors of several slots, in their order.

    Example:
        >>> import torch
        >>> list(split_all([Slot.of_linear("q_proj")], [torch.ones(1, 2), torch.ones(3, 1)]))
        ['q_proj']
    """
    factors, rest = {}, iter(tensors)
    for slot in slots:
        factors |= slot.split([next(rest) for _ in slot.keys])
    return factors


def join_all(slots: Sequence[Slot], factors: Factors) -> list[Tensor]:
    """The tensors of several slots, in their order, out of factors.

    Example:
        >>> import torch
        >>> [tuple(t.shape) for t in join_all([Slot.of_linear("q")], {"q": (torch.ones(1, 2), torch.ones(3, 1))})]
        [(1, 2), (3, 1)]
    """
    return [tensor for slot in slots for tensor in slot.join(factors)]
