"""How wide the large products are computed, and that no setting of the user's makes them narrower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_IS_SET_BY_BACKEND = hasattr(torch.backends, "fp32_precision")


def width_on(device: torch.device) -> torch.dtype:
    """The dtype of a correction's large products: float64 on a CPU, float32 on an accelerator.

    Consumer GPUs have 1/64 of their speed in float64, and some accelerators have none. What is small, ``2r × 2r``, is
    in float64 everywhere but on those.

    Example:
        >>> width_on(torch.device("cpu")), width_on(torch.device("cuda"))
        (torch.float64, torch.float32)
    """
    return torch.float64 if device.type == "cpu" else torch.float32


def small_on(device: torch.device) -> torch.dtype:
    """The dtype of the small matrices: float64, where the device has it.

    Example:
        >>> small_on(torch.device("cuda")), small_on(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def full_width(device: torch.device) -> Iterator[None]:
    """Products of float32 are those of float32 inside: neither TF32, nor in parts of bfloat16, nor under autocast.

    All three are settings of the process that users make for their model's sake.

    Example:
        >>> ones = torch.full((2, 2), 1.0 + 2.0**-20)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with full_width(ones.device):
        ...         inside = ones @ ones
        ...     (ones @ ones).dtype, inside.dtype
        (torch.bfloat16, torch.float32)
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _no_reduced_precision():
        yield


@contextmanager
def _no_reduced_precision() -> Iterator[None]:
    # PyTorch 2.9 has a setting for each backend beside the one for all, and its kernels refuse a mix of the two: what
    # the user has not set by the new ones has to be changed by the old one, which does not give back the new ones.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if _IS_SET_BY_BACKEND else ()
    before = [backend.fp32_precision for backend in backends]
    try:
        for_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend
        for_all = None
    if for_all is None:
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if for_all is not None:
            torch.set_float32_matmul_precision(for_all)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
