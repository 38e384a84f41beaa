"""Pairs of weights, each read once, by a thread of its own while the pair before it is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from csulora_callback.models.checksum import digest
from csulora_callback.models.pair import CheckpointPair


class Seen(NamedTuple):
    """What was seen of a weight in reading it.

    Attributes:
        digest: see :func:`~csulora_callback.models.checksum.digest`.
        dtype: as in ``float32``.
    """

    digest: str
    dtype: str


class PairReader:
    """Gives the pairs of weights of a process's share of modules, in their order; made by :func:`reading_ahead`."""

    def __init__(
        self,
        pair: CheckpointPair,
        share: Sequence[str],
        device: torch.device | str | None,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._pair, self._coming = pair, iter(share)
        self._device = None if device is None else torch.device(device)
        self._thread = None if pair.collective else thread
        self._stream: torch.cuda.Stream | None = None
        self._next = self._begin()

    def take(self, own: str | None, turn: list[str]) -> tuple[list[Tensor], list[Seen]] | None:
        """The pair of the next module of the share, ``own``, while other processes take other ones of ``turn``.

        Returns:
            Base and aligned weight ``(rows, columns)`` as stored, on the device where they are computed with, in a
            list to take them out of; and what was seen of each. ``None`` where ``own`` is.

        Raises:
            ValueError: if a weight is quantized, damaged or not finite.
        """
        if self._thread is None:
            weights = self._pair.weights_for(own, turn)
            read = None if own is None else [self._look(weight, weights[1].device) for weight in weights]
        else:
            read = None if own is None else self._next.result()
            self._next = self._begin()
        if read is None:
            return None
        weights = [
            checkpoint.stored(own) if weight is None else weight
            for checkpoint, (weight, _) in zip(self._pair.sides.values(), read, strict=True)
        ]
        for weight in weights:
            if weight.is_cuda:  # made on the thread's stream, and to live until this one is done with it
                weight.record_stream(torch.cuda.current_stream(weight.device))
        return weights, [seen for _, seen in read]

    def _begin(self) -> Future[list[tuple[Tensor | None, Seen]]] | None:
        name = None if self._thread is None else next(self._coming, None)
        return None if name is None else self._thread.submit(self._read, name)

    def _read(self, name: str) -> list[tuple[Tensor | None, Seen]]:
        """Both sides, one after the other: what lies in a file and stays on the host is gone before the next."""
        device, read = self._pair.aligned.stored(name).device, []
        for checkpoint in self._pair.sides.values():
            weight, seen = self._look(checkpoint.weight(name), device)
            read.append((None if weight.device.type == "cpu" and checkpoint.files([name]) else weight, seen))
            del weight
        return read

    def _look(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Seen]:
        device = device if self._device is None else self._device
        with self._beside(device):
            placed = _to(device, weight)
            return placed, Seen(digest(placed), str(weight.dtype).removeprefix("torch."))  # a digest waits for copies

    def _beside(self, device: torch.device) -> AbstractContextManager:
        """On a GPU a stream of the thread's own, so that copies do not wait for what is computed."""
        if device.type != "cuda" or self._thread is None:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.default_stream(device))  # whatever made weights that lie there already
        return torch.cuda.stream(self._stream)


@contextmanager
def reading_ahead(
    pair: CheckpointPair, share: Sequence[str], device: torch.device | str | None = None
) -> Iterator[PairReader]:
    """A reader whose thread ends with the block.

    One pair is read ahead: on a GPU it is copied there from pinned memory; on the host what was read of a file is in
    the system's cache then, and no part of this process, so that it takes no memory beside the pair before it. Weights
    of a collective checkpoint are read when they are asked for, by all processes at once.

    Args:
        pair: the checkpoints.
        share: the modules that this process takes, in the order in which it will.
        device: where to put the weights; by default where the aligned ones are.

    Example:
        >>> from torch import nn
        >>> pair = CheckpointPair.open(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2)))
        >>> with reading_ahead(pair, ["0"]) as reader:
        ...     (base, aligned), seen = reader.take("0", ["0"])
        >>> base.shape, [side.dtype for side in seen]
        (torch.Size([2, 3]), ['float32', 'float32'])
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading ahead")
    try:
        yield PairReader(pair, share, device, thread)
    finally:
        thread.shutdown(cancel_futures=True)


def _to(device: torch.device, weight: Tensor) -> Tensor:
    """On the device; from the host to a GPU by way of pinned memory, from which it copies while others compute."""
    if device.type == "cuda" and weight.device.type == "cpu":
        return weight.pin_memory().to(device, non_blocking=True)
    return weight.to(device)
