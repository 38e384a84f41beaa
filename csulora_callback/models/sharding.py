"""Whole tensors out of parameters that an engine divides over processes, and back into them.

Three kinds of parameters look the same from here: plain ones, DTensors (FSDP2, tensor parallelism), and DeepSpeed's,
which under ZeRO-3 are empty except while gathered and under every ZeRO stage have a float32 copy in the optimizer that
overwrites them at the next step. Everything here is collective for sharded parameters: each process has to call it,
with the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # torch built without distributed: nothing is sharded
    DTensor = FSDPModule = ()


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of the parameter.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return isinstance(parameter, DTensor) or _is_zero_3(parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; not collective.

    Example:
        >>> full_shape(torch.ones(2, 3))
        (2, 3)
    """
    return tuple(parameter.ds_shape if _is_zero_3(parameter) else parameter.shape)


def own_part(parameter: Tensor) -> Tensor:
    """What lies in this process of a DTensor, of the class that it has there; any other parameter itself.

    Example:
        >>> own_part(torch.ones(2))
        tensor([1., 1.])
    """
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def gather(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the whole parameters, on this process's device.

    Example:
        >>> gather([torch.ones(1, 2)])
        [tensor([[1., 1.]])]
    """
    with _gathered(parameters), torch.no_grad():
        # Of one process, or where a parameter is replicated, full_tensor() is the parameter itself.
        return [(p.full_tensor() if isinstance(p, DTensor) else p.detach()).clone() for p in parameters]


def gather_trained(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Like :func:`gather`, but of what the optimizer steps: DeepSpeed's float32 copies where it has them.

    Example:
        >>> gather_trained([torch.ones(1, 2)])
        [tensor([[1., 1.]])]
    """
    if not any(_has_optimizer_copy(parameter) for parameter in parameters):
        return gather(parameters)
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(p) if _has_optimizer_copy(p) else gather([p])[0] for p in parameters]


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy whole ``values`` into the parameters in place; those of the first process count where they are sharded.

    Example:
        >>> parameter = torch.zeros(2)
        >>> write([parameter], [torch.ones(2)])
        >>> parameter
        tensor([1., 1.])
    """
    with _gathered(parameters, modifier_rank=0):
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(like(parameter, value))


def held(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of the parameters, sharing their memory: its shards, where they are divided.

    Under ZeRO-3, where a parameter may be empty at the moment, copies of the whole ones; collective there.

    Example:
        >>> held([torch.ones(1, 2)])
        [tensor([[1., 1.]])]
    """
    if any(_is_zero_3(parameter) for parameter in parameters):
        return gather(parameters)
    return [_local(parameter) for parameter in parameters]


def as_held(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`held` would return if the parameters had these whole ``values``; collective where they are sharded.

    Example:
        >>> as_held([torch.zeros(2, dtype=torch.float64)], [torch.ones(2)])
        [tensor([1., 1.], dtype=torch.float64)]
    """
    return [_local(like(parameter, value)) for parameter, value in zip(parameters, values, strict=True)]


@torch.no_grad()
def hold(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write what :func:`held` returned, or a copy of it, or :func:`as_held`; collective under ZeRO-3 only.

    Example:
        >>> parameter = torch.zeros(2)
        >>> hold([parameter], [torch.ones(2)])
        >>> parameter
        tensor([1., 1.])
    """
    if any(_is_zero_3(parameter) for parameter in parameters):
        write(parameters, values)
    else:
        for parameter, value in zip(parameters, values, strict=True):
            _local(parameter).copy_(value)


def write_trained(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Like :func:`write`, and into DeepSpeed's float32 copies too: an optimizer step then goes on from ``values``.

    Example:
        >>> parameter = torch.zeros(2)
        >>> write_trained([parameter], [torch.ones(2)])
        >>> parameter
        tensor([1., 1.])
    """
    write(parameters, values)
    if any(_has_optimizer_copy(parameter) for parameter in parameters):
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in zip(parameters, values, strict=True):
            safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """The whole ``value`` with the dtype and device of ``parameter``, and divided over processes as it is.

    Example:
        >>> like(torch.zeros(2, dtype=torch.float64), torch.ones(2))
        tensor([1., 1.], dtype=torch.float64)
    """
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def reshard(modules: Sequence[nn.Module]) -> None:
    """Bring the sharded parameters of FSDP2 modules back into place.

    A forward pass without a backward one (an evaluation) may leave copies of the whole parameters in the module: what
    is written into those is lost.

    Example:
        >>> reshard([])
    """
    for module in modules:
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that FSDP2 manages.

    Example:
        >>> fsdp_modules(nn.Linear(2, 2))
        []
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before FSDP2 gave it one of its own.

    Example:
        >>> unsharded_class(nn.Linear(2, 2)).__name__
        'Linear'
    """
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies in this process, sharing its memory."""
    return own_part(parameter).detach()


def _is_zero_3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # set by DeepSpeed on the parameters that it partitions


def _has_optimizer_copy(parameter: Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def _gathered(parameters: Sequence[Tensor], modifier_rank: int | None = None) -> AbstractContextManager:
    if not any(_is_zero_3(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)
