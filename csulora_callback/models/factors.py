"""An adapter's factors by module name, apart from any model, and under the keys of PEFT's files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csulora_callback.models.slots import Factors, Slot, join_all, slot_named, slots_in, split_all


def digest(factors: Factors) -> str:
    """SHA-256 over names and values of all factors.

    Values are hashed in float32 at least: PEFT loads a 16-bit adapter file into float32 parameters, and these are the
    same weights.
    """
    sha = hashlib.sha256()
    for name in sorted(factors):
        sha.update(name.encode())
        for tensor in factors[name]:
            wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous()
            sha.update(wide.numpy().tobytes())
    return sha.hexdigest()


def all_finite(factors: Factors) -> bool:
    """Whether no factor holds NaN or Inf, with one wait for the device.

    Example:
        >>> all_finite({"q_proj": (torch.ones(1, 2), torch.tensor([[1.0], [float("nan")]]))})
        False
    """
    # NaN is both the least and the greatest entry.
    flags = [torch.isfinite(torch.stack(torch.aminmax(tensor))).all() for pair in factors.values() for tensor in pair]
    return not flags or all(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist())


def equal(left: Factors, right: Factors) -> bool:
    """Whether both hold the same values, bit for bit in the same dtypes.

    Example:
        >>> factors = {"q_proj": (torch.ones(1, 2), torch.ones(3, 1))}
        >>> equal(factors, {"q_proj": (torch.ones(1, 2), torch.ones(3, 1))})
        True
    """
    if left.keys() != right.keys():
        return False
    pairs = [(x, y) for name in left for x, y in zip(left[name], right[name], strict=True)]
    if any(x.shape != y.shape or x.dtype != y.dtype for x, y in pairs):
        return False
    # What a step of training has changed differs in the first already.
    return all(equal_each(*zip(*pairs[:1], strict=True))) and all(equal_each(*zip(*pairs[1:], strict=True)))


def equal_each(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[bool]:
    """Which of the tensors hold the same values, with one wait for the device.

    Example:
        >>> equal_each([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)])
        [True, False]
    """
    flags = [(x == y.to(x.device)).all() for x, y in zip(left, right, strict=True)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()


def cast_alike(factors: Factors, original: Factors, others: Factors) -> Factors | None:
    """``others`` cast as ``original`` was cast to become ``factors``; ``None`` if these are no cast of it.

    Weights keep their identity through ``model.half()``, and through a resume in another dtype: PEFT may round what it
    loads to the dtype of the parameters and then make these float32.

    Example:
        >>> original = {"q_proj": (torch.rand(1, 2), torch.rand(3, 1))}
        >>> halves = {name: (A.half(), B.half()) for name, (A, B) in original.items()}
        >>> cast_alike(halves, original, original)["q_proj"][0].dtype
        torch.float16
        >>> cast_alike(original, halves, halves) is None
        True
    """
    if factors.keys() != original.keys():
        return None
    for narrow in (None, torch.bfloat16, torch.float16):
        if equal(factors, _cast(original, factors, narrow)):
            return _cast(others, factors, narrow)
    return None


def is_cast(factors: Factors, original: Factors) -> bool:
    """Whether ``factors`` are the values of ``original``, as they are or rounded by a cast to 16 bits on the way.

    Example:
        >>> original = {"q_proj": (torch.rand(1, 2), torch.rand(3, 1))}
        >>> is_cast({"q_proj": tuple(factor.half() for factor in original["q_proj"])}, original)
        True
    """
    return cast_alike(factors, original, original) is not None


def to_peft_state_dict(factors: Factors, slots: Sequence[Slot] | None = None) -> dict[str, Tensor]:
    """Factors under the keys of a PEFT adapter file (``adapter_model.safetensors``), contiguous and on the CPU.

    Args:
        factors: by module.
        slots: where PEFT keeps them; by default as of LoRA on layers.
    """
    slots = [slot_named(name) for name in factors] if slots is None else slots
    keys = (key for slot in slots for key in slot.keys)
    return {key: tensor.cpu().contiguous() for key, tensor in zip(keys, join_all(slots, factors), strict=True)}


def from_peft_state_dict(state: Mapping[str, Tensor], names: Sequence[str], source: str) -> Factors:
    """The factors of the modules ``names`` out of a PEFT adapter state dict.

    Raises:
        ValueError: if one of the modules' is missing; ``source`` names the file in the message.
    """
    slots = {name: slot for slot in slots_in(state, names) for name in slot.names}
    for name in names:
        for key in slots.get(name, slot_named(name)).keys:
            if key not in state:
                raise ValueError(f"{source}: expected the LoRA factor '{key}', but the file does not hold it.")
    held = list(dict.fromkeys(slots.values()))
    factors = split_all(held, [state[key] for slot in held for key in slot.keys])
    return {name: factors[name] for name in names}


def _cast(original: Factors, like: Factors, narrow: torch.dtype | None) -> Factors:
    def one(value: Tensor, target: Tensor) -> Tensor:
        return (value if narrow is None else value.to(narrow)).to(target.device, target.dtype)

    return {n: tuple(map(one, tensors, like[n])) for n, tensors in original.items()}
