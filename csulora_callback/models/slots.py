"""Where PEFT keeps the factors of which modules: in a file by key, in a live model by parameter, in the same order.

One slot is what PEFT stores together. For LoRA on a layer it is a pair of matrices, and the pair are the factors of
one module. Where PEFT stores something else, a slot says how factors are made of it, and it of factors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.models.fused_experts import by_parameter, join_experts, split_experts
from csulora_callback.models.names import bias_name, fused_parameter, module_name, owner_of_bias
from csulora_callback.models.whole_slots import whole_slots_in

Factors = dict[str, tuple[Tensor, ...]]
"""By module name ``(lora_A, lora_B)``, shapes ``(r, d_in)`` and ``(d_out, r)``; of one trained whole ``(weight,)``."""

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

    @classmethod
    def of_parameter(cls, names: Sequence[str], path: str) -> Slot:
        """That of LoRA on a parameter, by the names of its modules and the path of PEFT's wrapper in a model.

        Example:
            >>> Slot.of_parameter(["experts.up[0]"], "base_model.model.experts.base_layer").keys[0]
            'base_model.model.experts.base_layer.lora_A.weight'
        """
        kind = cls if fused_parameter(names[0])[1] is None else FusedSlot
        where = module_name(path) + ".base_layer" * path.split(".").count("base_layer")
        return kind(tuple(names), tuple(f"{_PREFIX}{where}{end}" for end in _LINEAR))

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


class FusedSlot(Slot):
    """The two factors of all experts of a fused weight, see :mod:`~csulora_callback.models.fused_experts`.

    Example:
        >>> import torch
        >>> slot = FusedSlot(("up[0]", "up[1]"), ("A", "B"))
        >>> factors = slot.split([torch.arange(4.0)[:, None], torch.arange(4.0)[None]])
        >>> factors["up[1]"]
        (tensor([[2.],
                [3.]]), tensor([[1., 3.]]))
        >>> [tensor.flatten().tolist() for tensor in slot.join(factors)]
        [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
    """

    def split(self, tensors: Sequence[Tensor]) -> Factors:
        """See :class:`Slot`: views."""
        return dict(zip(self.names, split_experts(*tensors, experts=len(self.names)), strict=True))

    def join(self, factors: Factors) -> list[Tensor]:
        """See :class:`Slot`; where ranks differ, all get the largest."""
        return list(join_experts([factors[name] for name in self.names]))


_KINDS = (Slot, _LINEAR), (EmbeddingSlot, _EMBEDDING), (BiasSlot, _BIAS)


def slots_in(keys: Iterable[str], names: Collection[str] | None = None) -> list[Slot]:
    """The slots of a PEFT adapter file that hold factors, by the keys in it. Of a damaged file not all may be there.

    Args:
        keys: all of the file.
        names: of the modules whose factors are looked for, in the order of the model that they are of; by default all
            of LoRA but experts of fused weights: only who knows the names can tell these, and a module that was
            trained whole from what PEFT saves beside.

    Example:
        >>> slots_in([f"base_model.model.q_proj.lora_{factor}.weight" for factor in "AB"])[0].names
        ('q_proj',)
    """
    found: dict[tuple[type[Slot], str], dict[int, str]] = {}  # by kind and prefix, its keys by their places
    for key in (keys := list(keys)):
        for kind, ends in _KINDS:
            for place, end in enumerate(ends):
                if key.endswith(end):
                    found.setdefault((kind, key.removesuffix(end)), {})[place] = key
    wrapped = [prefix for kind, prefix in found if kind is Slot]
    held = {prefix: (module_name(prefix),) for prefix in wrapped} if names is None else _held(wrapped, names)
    slots = []
    for (kind, prefix), there in found.items():
        own = held.get(prefix) if kind is Slot else kind.of(module_name(prefix)).names
        if not own or (names is not None and own[0] not in names):
            continue
        kept = kind if fused_parameter(own[0])[1] is None else FusedSlot
        slots.append(kept(own, tuple(there.get(place, prefix + end) for place, end in enumerate(dict(_KINDS)[kind]))))
    return slots + whole_slots_in(keys, set(names or ()) - {name for slot in slots for name in slot.names})


def _held(prefixes: Sequence[str], names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Of each prefix of keys the modules whose factors lie there.

    PEFT wraps a module anew for each of its parameters, the last one outermost. So does the order of names go, which
    is that of a live model, or of a record that was written of one.
    """
    nested: dict[str, list[str]] = {}
    for prefix in sorted(prefixes, key=len):
        nested.setdefault(module_name(prefix), []).append(prefix)
    held: dict[str, tuple[str, ...]] = {}
    for parameter, own in by_parameter(name for name in names if owner_of_bias(name) is None).items():
        is_of_module = parameter in nested or fused_parameter(own[0])[1] is None
        path = parameter if is_of_module else parameter.rpartition(".")[0]
        if nested.get(path):
            held[nested[path].pop(0)] = own
    return held


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
