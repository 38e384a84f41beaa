"""Which weights a model or a checkpoint has, as one short text: the key of what is kept of them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from csulora_callback.models.sharding import gather, is_sharded

_CHUNK = 1 << 18
_WIDTHS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes, computed where the tensor lies: on a GPU it takes as long as reading it there.

    Of each MiB the numbers of four bytes are summed modulo 2⁶⁴, each by an odd 64-bit weight of its own, and the sums
    hashed in their order. So one number that differs always shows, and several that differ, by training, rounding or
    damage, cancel out by a chance of 2⁻³³ at the most (where nothing but the highest bits differ; 2⁻⁶⁴ else). It is
    **no cryptographic digest**: the weights are no secret, and whoever wants to can make two tensors that have the
    same. Words of eight bytes would be summed twice as fast, but lose every even number of flipped signs in them.

    Example:
        >>> digest(torch.tensor([1.0, 2.0])) == digest(torch.tensor([2.0, 1.0]))
        False
        >>> digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0]))
        False
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    width = next(width for width in _WIDTHS if len(flat) % width == 0)
    if flat.storage_offset() % width:  # a part of another tensor, which cannot be looked at in this width
        flat = flat.clone()
    numbers, weights = flat.view(_WIDTHS[width]), _weights(flat.device)
    products = _products.on(flat.device)
    sums = [products[: len(chunk)].copy_(chunk).mul_(weights[: len(chunk)]).sum() for chunk in numbers.split(_CHUNK)]
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {torch.stack(sums).tolist()}".encode()).hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """One digest of several by name, in their order.

    Example:
        >>> combine({"a": "0f3a", "b": "77b1"}) == combine({"a": "77b1", "b": "0f3a"})
        False
    """
    return hashlib.sha256("".join(f"{name} {each}\n" for name, each in digests.items()).encode()).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Of a checkpoint's modules, from the :func:`digest` of each one's weight by name, in any order.

    It tells apart checkpoints that differ by training, rounding or damage. It is no defence against somebody who makes
    two that have the same.

    Example:
        >>> fingerprint({"b": "77b1", "a": "0f3a"}) == fingerprint({"a": "0f3a", "b": "77b1"})
        True
    """
    return combine(dict(sorted(digests.items())))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and of each tensor's :func:`digest`. Collective where tensors are sharded.

    Example:
        >>> checksum({"a": torch.tensor([1.0, 2.0])}) == checksum({"b": torch.tensor([1.0, 2.0])})
        False
    """
    return combine(
        {name: _digest_of(gather([tensor])[0] if is_sharded(tensor) else tensor) for name, tensor in tensors.items()}
    )


def weights_besides(model: nn.Module, parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, without some of them, and what else its state dict has in tensors.

    That is what libraries that quantize keep beside packed numbers: bitsandbytes the scales, without which they say
    nothing.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> list(weights_besides(layer, [layer.bias]))
        ['weight']
    """
    # First, as bitsandbytes undoes here what it packed again for the CPU, and FSDP2 gathering.
    state = model.state_dict(keep_vars=True)
    left_out = {id(parameter) for parameter in parameters}
    held = {name: tensor for named in (model.named_parameters(), model.named_buffers()) for name, tensor in named}
    known = {id(tensor) for tensor in held.values()}
    held |= {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in known}
    return {name: tensor for name, tensor in held.items() if id(tensor) not in left_out}


def _digest_of(tensor: Tensor) -> str:
    """Of a plain tensor its :func:`digest`; of one that is made of others, as torchao's, of its class and of these."""
    if not is_traceable_wrapper_subclass(tensor):
        return digest(tensor)
    parts = {name: _digest_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]}
    return combine({f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}": "", **parts})


@lru_cache
def _weights(device: torch.device) -> Tensor:
    """Odd numbers without a pattern, by which differences that have one would cancel: those of SplitMix64."""
    mixed = torch.arange(1, _CHUNK + 1, device="cpu") * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        high = (mixed >> shift) & ((1 << (64 - shift)) - 1)  # without the sign, which >> repeats
        mixed = (mixed ^ high) * _signed(factor)
    return (mixed | 1).to(device)


class _Products(threading.local):
    """Where a thread multiplies: one buffer, as one made anew for every tensor leaves its heap in pieces."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._buffers:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                self._buffers[device] = torch.empty(_CHUNK, dtype=torch.int64, device=device)
        return self._buffers[device]


_products = _Products()


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
