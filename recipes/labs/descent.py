"""Gradient descent as the Trainer does it by default, for loops that need no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


def descend(
    parameters: Sequence[nn.Parameter], learning_rate: float, steps: int, loss: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """AdamW with a linear schedule and gradients clipped at 1; yields the loss of each step once it is taken.

    ``loss`` draws a batch and computes its loss.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(steps):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield value.detach()
