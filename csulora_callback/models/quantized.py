"""Whether a weight is quantized, whatever library stores it: judged by what lies there, not by who made it."""

from __future__ import annotations

from torch import Tensor, nn

from csulora_callback.models.sharding import full_shape, own_part


def storage(weight: Tensor) -> str | None:
    """How a weight is stored, if not as plain floating-point numbers of two bytes or more; ``None`` if it is.

    Of a weight that is divided over processes, the part that lies in this one tells. One of a class of its own holds
    something else than it shows: bitsandbytes' two numbers in each byte of a bfloat16, torchao's has the dtype and
    shape of what it stands for.

    Example:
        >>> import torch
        >>> storage(nn.Parameter(torch.ones(4, 4))) is None
        True
        >>> storage(torch.ones(8, 1, dtype=torch.uint8))
        'torch.uint8'
        >>> class Packed(nn.Parameter): ...
        >>> storage(Packed(torch.ones(8, 1)))
        'Packed of torch.float32'
    """
    part = own_part(weight)
    if type(part) not in (Tensor, nn.Parameter):
        return f"{type(part).__name__} of {part.dtype}"
    plain = part.is_floating_point() and part.dtype.itemsize > 1  # float8 needs scales that lie elsewhere
    return None if plain else str(part.dtype)


def layer_storage(layer: nn.Module, shape: tuple[int, int]) -> str | None:
    """How a layer stores its weight, if not as a plain floating-point matrix; ``None`` if it does.

    Layers of GPTQ, AWQ, HQQ and others have no weight, or one that is empty or packed, and further tensors under names
    of their own.

    Args:
        layer: a linear layer, as it is without an adapter.
        shape: ``(d_out, d_in)`` of the weight that it stands for, in either order.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 2)
        >>> layer_storage(layer, (2, 3)) is None
        True
        >>> del layer.weight
        >>> layer.register_buffer("qweight", torch.zeros(1, 2, dtype=torch.int32))
        >>> layer_storage(layer, (2, 3))
        'Linear with bias, qweight'
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        stored = storage(weight)
        if stored is not None or sorted(full_shape(weight)) == sorted(shape):
            return stored
    held = [name for tensors in (layer.named_parameters, layer.named_buffers) for name, _ in tensors(recurse=False)]
    return f"{type(layer).__name__} with {', '.join(held) or 'no tensors'}"
