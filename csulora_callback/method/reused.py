"""Memory for large matrices that is used again: new memory for each costs as much as filling it, and leaves holes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Reused:
    """One piece of memory for each use.

    Example:
        >>> space = Reused()
        >>> first = space.matrix("D", (2, 3), torch.float32, "cpu")
        >>> first.data_ptr() == space.matrix("D", (3, 1), torch.float32, "cpu").data_ptr()
        True
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def matrix(self, use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Uninitialized and contiguous. The one that was given before for this use must not be needed any more."""
        flat, size = self._flat.get(use), math.prod(shape)
        device = torch.empty(0, device=device).device  # of "cuda" the one that it stands for
        if flat is None or flat.numel() < size or flat.dtype != dtype or flat.device != device:
            self._flat.pop(use, None)  # before there is a larger one
            self._flat[use] = flat = torch.empty(size, dtype=dtype, device=device)
        return flat[:size].view(shape)
