"""Where PEFT keeps a module that is trained whole (``modules_to_save``): its weight under the module's own name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from csulora_callback.models.names import module_name

# PEFT's keys in an adapter file; the second one comes to it where the embeddings were resized.
_KEY, _AGAIN = "base_model.model.{name}.weight", ".modules_to_save.weight"


@dataclass(frozen=True)
class WholeSlot:
    """The weight of one module, stored as it is, maybe under several keys. See :class:`~.slots.Slot`.

    Attributes:
        names: of the one module.
        keys: of its weight in a PEFT adapter file; of a weight that is tied those of all modules that have it.

    Example:
        >>> WholeSlot.of("lm_head").keys
        ('base_model.model.lm_head.weight',)
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, *names: str) -> WholeSlot:
        """By the module's name, and those that its weight is tied to."""
        return cls(names[:1], tuple(_KEY.format(name=name) for name in names))

    def split(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """``(weight,)`` by the module's name."""
        return {self.names[0]: (tensors[0],)}

    def join(self, factors: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
        """The weight, once for each key, each in memory of its own: safetensors takes no others."""
        (weight,) = factors[self.names[0]]
        return [weight, *(weight.clone() for _ in self.keys[1:])]


def whole_slots_in(keys: Iterable[str], names: Collection[str]) -> list[WholeSlot]:
    """The slots of the modules ``names`` that are trained whole in a PEFT adapter file, by the keys in it.

    Example:
        >>> whole_slots_in(["base_model.model.lm_head.weight"], ["lm_head", "score"])[0].names
        ('lm_head',)
    """
    found: dict[str, list[str]] = {}
    for key in keys:
        if ".original_module." not in key:
            own = key.removesuffix(_AGAIN if key.endswith(_AGAIN) else ".weight")
            if own != key and (name := module_name(own)) in names:
                found.setdefault(name, []).append(key)
    return [WholeSlot((name,), tuple(sorted(own, key=len))) for name, own in found.items()]


def tied_keys(state: Mapping[str, Tensor], slot: WholeSlot) -> list[str]:
    """Keys of a saved adapter that hold the slot's weight under the names of other modules, to which it is tied.

    Example:
        >>> import torch
        >>> state = {WholeSlot.of(name).keys[0]: torch.ones(2, 2) for name in ("embed_tokens", "lm_head")}
        >>> tied_keys(state, WholeSlot.of("embed_tokens"))
        ['base_model.model.lm_head.weight']
    """
    own = state[slot.keys[0]]
    others = [key for key in state if key.endswith(".weight") and ".original_module." not in key]
    return [key for key in others if key not in slot.keys and state[key].shape == own.shape and state[key].equal(own)]
