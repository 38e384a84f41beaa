"""How long something takes and how much memory it needs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch

from recipes.schema.recipe import RecipeError

Time = dict[str, float]
"""``seconds`` on the clock, and ``cpu`` seconds of this process, which others on the machine disturb less."""


def synchronize() -> None:
    """Wait until the accelerator is done, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(work: Callable[[], object]) -> Time:
    """How long it takes, until the accelerator is done."""
    synchronize()
    started = time.perf_counter(), time.process_time()
    work()
    synchronize()
    return {"seconds": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}


def interleaved(repeats: int, works: Mapping[str, Callable[[], Time]]) -> dict[str, list[Time]]:
    """Each of ``works`` in turn, ``repeats`` times over, so that a slow minute of the machine meets them all."""
    rounds = [{name: work() for name, work in works.items()} for _ in range(repeats)]
    return {name: [one[name] for one in rounds] for name in works}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {"median": median(values), "low": min(values), "high": max(values)}


def added(times: Sequence[tuple[int, Sequence[Time]]]) -> list[Time]:
    """Round by round the sum of several times, each as often as its number says.

    Example:
        >>> added([(2, [{"seconds": 1.0, "cpu": 1.0}]), (1, [{"seconds": 0.5, "cpu": 0.25}])])
        [{'seconds': 2.5, 'cpu': 2.25}]
    """
    rounds = zip(*(series for _, series in times), strict=True)
    numbers = [number for number, _ in times]
    return [
        {clock: sum(n * one[clock] for n, one in zip(numbers, each, strict=True)) for clock in ("seconds", "cpu")}
        for each in rounds
    ]


def resident_bytes(which: str) -> int:
    """Of this process: ``"VmRSS"`` now, or ``"VmHWM"`` at most so far, pages of mapped files included.

    Raises:
        RecipeError: where there is no ``/proc``, as only on Linux there is.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            "'benchmark': expected Linux, whose /proc/self/status says how much memory was used"
        ) from None
    return 1024 * int(re.search(rf"^{which}:\s+(\d+) kB$", status, re.MULTILINE)[1])


def accelerator_peak() -> int:
    """Bytes that were allocated on the accelerator at most, so far or since the last call; 0 without one."""
    if not torch.accelerator.is_available():
        return 0
    accelerator = torch.get_device_module(torch.accelerator.current_accelerator())
    peak = accelerator.max_memory_allocated()
    accelerator.reset_peak_memory_stats()
    return peak
