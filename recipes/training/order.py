"""In which order rows are trained on: one of each epoch's own, whose place a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler


class EpochOrder(Sampler[int]):
    """The rows of one of several processes in an order that follows from seed and epoch alone.

    Args:
        rows: how many there are. All processes get as many, so some rows come twice where they do not divide.
        seed: of the order.
        processes: among which they are divided.
        process: the number of this one.
    """

    def __init__(self, rows: int, seed: int, processes: int, process: int) -> None:
        self.rows, self.seed, self.processes, self.process = rows, seed, processes, process
        self.epoch = self.taken = 0
        self._begin = (0, 0)  # an epoch, and how many of its rows were taken before

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is one of this epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.processes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        order += order[: len(self) * self.processes - self.rows]
        epoch, before = self._begin
        self.taken = before if epoch == self.epoch else 0
        for row in order[self.process :: self.processes][self.taken :]:
            self.taken += 1
            yield row

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.taken = self._begin = state["epoch"], state["taken"]


class ResumableLoader(DataLoader):
    """The batches of another loader in an :class:`EpochOrder`; Lightning keeps its state in checkpoints."""

    def __init__(self, like: DataLoader, seed: int, processes: int, process: int) -> None:
        order = EpochOrder(len(like.dataset), seed, processes, process)
        super().__init__(like.dataset, like.batch_size, sampler=order, collate_fn=like.collate_fn)

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.sampler.load_state_dict(state)
