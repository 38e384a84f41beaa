"""Where PEFT keeps the factors of which modules: in a file by key, in a live model by parameter, in the same order.

One slot is what PEFT stores together. For LoRA on a layer it is a pair of matrices, and the pair are the factors of
one module. Where PEFT stores something else, a slot says how factors are made of it, and it of factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csulora_callback.models.names import bias_name, module_name, owner_of_bias

Factors = dict[str, tuple[Tensor, ...]]
"""By module name ``(lora_A, lora_B)``, shapes ``(r, d_in)`` and ``(d_out, r)``."""

# PEFT's keys inside an adapter file, fixed by its documented checkpoint format.
_PREFIX = "base_model.model."
_LINEAR = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = ".lora_embedding_A", ".lora_embedding_B"
_BIAS = (".lora_B.bias",)


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
        return cls((name,), tuple(f"{_PREFIX}{name}{end}" for end in _LINEAR))

    def split(self, tensors: Sequence[Tensor]) -> Factors:
        """The factors of its modules out of its tensors; without copies where that goes."""
        return {self.names[0]: tuple(tensors)}

    def join(self, factors: Factors) -> list[Tensor]:
        """Its tensors out of the factors of its modules, with the values that :meth:`split` would make them of."""
        return list(factors[self.names[0]])


class EmbeddingSlot(Slot):
    """LoRA on an embedding: two matrices too, though in no modules. The weight is stored as ``(d_in, d_out)``.

    Example:
        >>> EmbeddingSlot.of("embed_tokens").keys
        ('base_model.model.embed_tokens.lora_embedding_A', 'base_model.model.embed_tokens.lora_embedding_B')
    """

    @classmethod
    def of(cls, name: str) -> EmbeddingSlot:
        """That of LoRA on an embedding, by the module's name."""
        return cls((name,), tuple(f"{_PREFIX}{name}{end}" for end in _EMBEDDING))


class BiasSlot(Slot):
    """With ``lora_bias=True`` the bias ``β (d_out,)`` of ``lora_B``: the module's own bias is changed by ``s·β``.

    Its factors are ``A = [[1]]`` and ``B = β``, as a column: the weight of an input that is always one.

    Example:
        >>> slot = BiasSlot.of("q_proj")
        >>> slot.keys, slot.split([torch.ones(2)])
        (('base_model.model.q_proj.lora_B.bias',), {'q_proj.bias': (tensor([[1.]]), tensor([[1.],
                [1.]]))})
    """

    @classmethod
    def of(cls, module: str) -> BiasSlot:
        """That of a module's bias, by the module's name."""
        return cls((bias_name(module),), tuple(f"{_PREFIX}{module}{end}" for end in _BIAS))

    def split(self, tensors: Sequence[Tensor]) -> Factors:
        """See :class:`Slot`."""
        (beta,) = tensors
        return {self.names[0]: (beta.new_ones(1, 1), beta[:, None])}

    def join(self, factors: Factors) -> list[Tensor]:
        """See :class:`Slot`."""
        return [bias_of(*factors[self.names[0]])[1][:, 0]]


def bias_of(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a bias's update as they are kept: all of it in ``B (d_out, 1)``, and ``A = [[1]]``.

    Example:
        >>> bias_of(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
        (tensor([[1.]]), tensor([[6.]]))
    """
    return torch.ones_like(lora_A), lora_B * lora_A


def slot_named(name: str) -> Slot:
    """Where LoRA on a layer keeps the factors of that name.

    Example:
        >>> slot_named("q_proj.bias").keys
        ('base_model.model.q_proj.lora_B.bias',)
    """
    owner = owner_of_bias(name)
    return Slot.of_linear(name) if owner is None else BiasSlot.of(owner)


def slots_in(keys: Iterable[str], names: Collection[str] | None = None) -> list[Slot]:
    """The slots of a PEFT adapter file that hold factors, by the keys in it. Of a damaged file not all may be there.

    Args:
        keys: all of the file.
        names: of the modules whose factors are looked for, in the order of the model that they are of; all by default.

    Example:
        >>> slots_in([f"base_model.model.q_proj.lora_{factor}.weight" for factor in "AB"])[0].names
        ('q_proj',)
    """
    found: dict[Slot, dict[str, str]] = {}  # of each the keys that it has in the file, by those that it would have
    for key in keys:
        for ends, kind in (_LINEAR, Slot.of_linear), (_EMBEDDING, EmbeddingSlot.of), (_BIAS, BiasSlot.of):
            for place, end in enumerate(ends):
                if key.endswith(end):
                    slot = kind(module_name(key.removesuffix(end)))
                    found.setdefault(slot, {})[slot.keys[place]] = key
    return [
        replace(slot, keys=tuple(there.get(key, key) for key in slot.keys))
        for slot, there in found.items()
        if names is None or slot.names[0] in names
    ]


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
