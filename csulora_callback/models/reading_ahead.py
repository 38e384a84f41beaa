"""Pairs of weights, each read once, by a thread of its own while the pair before it is computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from csulora_callback.models.checksum import digest
from csulora_callback.models.pair import CheckpointPair

_PAGE, _PART = 4096, 2**20


class Seen(NamedTuple):
    """What was seen of a weight in reading it.

    Attributes:
        digest: see :func:`~csulora_callback.models.checksum.digest`.
        dtype: as in ``float32``.
        norm: Frobenius norm, to three digits; infinite where the dtype does not hold that of a row.
    """

    digest: str
    dtype: str
    norm: float


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

    def take(self, own: str | None, turn: list[str]) -> Iterator[tuple[Tensor, Seen]]:
        """The pair of the next module of the share, ``own``, while other processes take other ones of ``turn``.

        Base first, then aligned, each ``(rows, columns)`` as stored, on the device where they are computed with, and
        what was seen of it. The second is read when it is asked for. Nothing where ``own`` is ``None``.

        Raises:
            ValueError: if a weight is quantized, damaged or not finite.
        """
        read: Iterable[tuple[Tensor, Seen]] = ()
        if self._thread is None:
            weights = self._pair.weights_for(own, turn)
            read = () if own is None else [self._look(weight, weights[1].device) for weight in weights]
        elif own is not None:
            ahead, self._next = self._next.result(), self._begin()
            read = self._read(own) if ahead is None else ahead
        for weight, seen in read:
            if weight.is_cuda:  # made on the thread's stream, and to live until this one is done with it
                weight.record_stream(torch.cuda.current_stream(weight.device))
            yield weight, seen
            del weight

    def _begin(self) -> Future[list[tuple[Tensor, Seen]] | None] | None:
        name = None if self._thread is None else next(self._coming, None)
        return None if name is None else self._thread.submit(self._read_ahead, name)

    def _read_ahead(self, name: str) -> list[tuple[Tensor, Seen]] | None:
        if self._placed(name).type != "cpu":
            return list(self._read(name))
        for checkpoint in self._pair.sides.values():
            if checkpoint.files([name]):
                for part in checkpoint.parts(name):
                    _have_in_cache(part)
        return None

    def _read(self, name: str) -> Iterator[tuple[Tensor, Seen]]:
        device = self._placed(name)
        return (self._look(checkpoint.weight(name), device) for checkpoint in self._pair.sides.values())

    def _placed(self, name: str) -> torch.device:
        return self._pair.aligned.parts(name)[0]().device if self._device is None else self._device

    def _look(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Seen]:
        device = device if self._device is None else self._device
        with self._beside(device):
            placed = _to(device, weight)
            dtype = str(weight.dtype).removeprefix("torch.")
            return placed, Seen(digest(placed), dtype, _norm(placed))  # a digest waits for copies

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
        ...     (base, _), (aligned, seen) = reader.take("0", ["0"])
        >>> base.shape, seen.dtype
        (torch.Size([2, 3]), 'float32')
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reading ahead")
    try:
        yield PairReader(pair, share, device, thread)
    finally:
        thread.shutdown(cancel_futures=True)


def _have_in_cache(stored: Callable[[], Tensor]) -> None:
    """Have the system read the file that a weight is mapped from, by a look at each page, some of them at a time.

    Not by PyTorch: the threads that its operations wait with on this thread would take the cores from the computation.
    """
    weight = stored()
    place, size = 0, weight.nbytes if weight.is_contiguous() else 0  # the few that are not are read when they are used
    del weight
    while place < size:  # mapped anew for each part, so that those before it are no part of this process any more
        part = stored().detach().view(-1).view(torch.uint8)[place : place + _PART]
        part.numpy()[::_PAGE].max(initial=0)
        place += _PART


def _to(device: torch.device, weight: Tensor) -> Tensor:
    """On the device; from the host to a GPU by way of pinned memory, from which it copies while others compute."""
    if device.type == "cuda" and weight.device.type == "cpu":
        return weight.pin_memory().to(device, non_blocking=True)
    return weight.to(device)


def _norm(weight: Tensor) -> float:
    """Of each row in the weight's own dtype, as a copy in a wider one takes longer than all else here."""
    return torch.linalg.vector_norm(weight, dim=1).cpu().double().norm().item()
