"""Which weights a model has, as one short text: the key of what is kept of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from csulora_callback.models.sharding import gather

_CHUNK = 1 << 18
_ODD = 0x1E3779B97F4A7C15


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes. Computed where the tensors lie: on a GPU it takes as long as reading them.

    It tells apart weights that differ by training or rounding. It is no cryptographic digest: whoever wants to can
    make two sets of weights that have the same. Collective where tensors are sharded.

    Example:
        >>> checksum({"a": torch.tensor([1.0, 2.0])}) == checksum({"a": torch.tensor([2.0, 1.0])})
        False
    """
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        (whole,) = gather([tensor])
        sha.update(f"{name} {whole.dtype} {tuple(whole.shape)} {_sum_of(whole)}\n".encode())
    return sha.hexdigest()


def weights_besides(model: nn.Module, parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, without some of them.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> list(weights_besides(layer, [layer.bias]))
        ['weight']
    """
    left_out = {id(parameter) for parameter in parameters}
    return {
        name: tensor
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
        if id(tensor) not in left_out
    }


def _sum_of(tensor: Tensor) -> str:
    """A weighted sum of each chunk of the bytes, modulo 2⁶⁴, hashed: odd weights lose no difference of one element."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    numbers = flat.view(torch.int32) if len(flat) % 4 == 0 else flat
    weights = (2 * torch.arange(min(_CHUNK, len(numbers)), device=tensor.device) + 1) * _ODD
    sums = [(chunk.long() * weights[: len(chunk)]).sum() for chunk in numbers.split(_CHUNK)]
    return hashlib.sha256(str(torch.stack(sums).tolist()).encode()).hexdigest()
