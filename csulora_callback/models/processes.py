"""Work that the processes of a run share: they succeed together, or fail together and say which one failed, and why.

A process that raises alone leaves the others waiting in their next collective call. So whatever may fail on one of
them (a file that is missing on one machine, a corrupt shard that only one process reads) runs in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Processes:
    """The processes of a ``torch.distributed`` group; without a group, this process alone.

    All of them have to call the same methods in the same order.

    Example:
        >>> processes = Processes()
        >>> processes.rank, processes.size, processes.together(lambda: 1 + 1), processes.gather("mine")
        (0, 1, 2, ['mine'])
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)

    @classmethod
    def all(cls) -> Processes:
        """Those of the whole run, or this one alone where ``torch.distributed`` is not in use."""
        in_use = distributed.is_available() and distributed.is_initialized()
        return cls(distributed.group.WORLD if in_use else None)

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on this process; where it raises on one process, all raise.

        Raises:
            Exception: what ``work`` raised here.
            RuntimeError: with the number and message of the first process where it did, if it did not here.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"process {rank} of {self.size} failed: {message}")
        return result

    def divide(
        self, names: Sequence[str], work: Callable[[str | None, list[str]], T | None]
    ) -> Iterator[dict[str, T]]:
        """Turn by turn, what ``work(own, turn)`` returns for each name, on every process.

        In a turn each process takes one name, ``own``; in the last one it may be ``None``. ``turn`` lists the names
        that all of them take. Raises as :meth:`together` does.
        """
        for start in range(0, len(names), self.size):
            turn = list(names[start : start + self.size])
            own = turn[self.rank] if self.rank < len(turn) else None
            results = self.gather(self.together(lambda own=own, turn=turn: work(own, turn)))
            yield dict(zip(turn, results, strict=False))

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value, self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's ``value``, on every process."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, distributed.get_global_rank(self.group, 0), self.group)
        return values[0]
