"""How wide the large products are computed, and that no setting of the user's makes them narrower."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_IS_SET_BY_BACKEND = hasattr(torch.backends, "fp32_precision")


def width_on(device: torch.device) -> torch.dtype:
    """The dtype of a correction's large products: float64 on a CPU, :func:`width_of_logs` on an accelerator.

    Consumer GPUs have 1/64 of their speed in float64, and some accelerators have none. What is small, ``2r × 2r``, is
    in float64 everywhere but on those.

    Example:
        >>> width_on(torch.device("cpu")), width_on(torch.device("cuda"))
        (torch.float64, torch.float32)
    """
    return torch.float64 if device.type == "cpu" else width_of_logs(device)


def width_of_logs(device: torch.device) -> torch.dtype:
    """The dtype of a measurement's large products: float32, but float64 while the process allows TF32 or the like.

    That is allowed or not for all threads of a process. So it is let be: another thread may be training.

    Example:
        >>> width_of_logs(torch.device("cpu"))
        torch.float32
    """
    return small_on(device) if _allows_less() else torch.float32


def small_on(device: torch.device) -> torch.dtype:
    """The dtype of the small matrices: float64, where the device has it.

    Example:
        >>> small_on(torch.device("cuda")), small_on(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def as_given(device: torch.device) -> Iterator[None]:
    """Products are of the dtypes that they are given, whatever autocast would make of them, and without gradients.

    Example:
        >>> ones = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with as_given(ones.device):
        ...         inside = ones @ ones
        ...     (ones @ ones).dtype, inside.dtype
        (torch.bfloat16, torch.float32)
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def full_width(device: torch.device) -> Iterator[None]:
    """:func:`as_given`, and those of float32 are neither in TF32 nor in parts of bfloat16, in all of the process.

    For what is done before training, and is large.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_width(torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    with as_given(device), _FORBIDDING_LESS:
        yield


def _allows_less() -> bool:
    if not _IS_SET_BY_BACKEND:
        return torch.get_float32_matmul_precision() != "highest"
    return any(backend.fp32_precision in ("tf32", "bf16") for backend in _backends())


def _backends() -> tuple:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


class _ForbiddingLess:
    """From the first thread that comes in to the last one that leaves: what was set before is put back once."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._put_back: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = _forbid_less()
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


_FORBIDDING_LESS = _ForbiddingLess()


def _forbid_less() -> Callable[[], None]:
    """Returns what puts back what was set before."""
    # PyTorch 2.9 has a setting for each backend beside the one for all, and its kernels refuse a mix of the two: what
    # the user has not set by the new ones has to be changed by the old one, which does not give back the new ones.
    backends = _backends() if _IS_SET_BY_BACKEND else ()
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

    def put_back() -> None:
        if for_all is not None:
            torch.set_float32_matmul_precision(for_all)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

    return put_back
