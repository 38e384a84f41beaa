"""Costs of larger models, computed from what was measured of one and from the exponents that were fitted.

Nothing here was measured. A cost of all modules is taken to be a sum over them of ``side^a · rank^b``, where
``side`` is the root of ``d_out · d_in``, and is scaled to what the measured model took. A second start is taken to
grow with the subspace, and peak memory to be the subspace and what the largest module needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from csulora_callback.method.basis import rank_of
from recipes.benchmarks.shapes import LLAMA, Shape, Size

RANKS = 8  # processes that share the work


def larger_models(shape: Shape, rank: int | None, lora_rank: int, measured: Mapping, slopes: Mapping) -> list[dict]:
    """A row for each published model on one process and on eight.

    Args:
        shape: what was measured.
        rank: of its subspace, as a recipe says it.
        lora_rank: of the adapter.
        measured: of that shape the median ``estimate``, ``again``, ``correction``, ``log`` in seconds, and
            ``working_bytes`` and ``subspace_bytes``.
        slopes: see :func:`recipes.benchmarks.growth.slopes`.
    """
    rows = []
    for name, other in LLAMA.items():
        times = {
            cost: measured[cost] * _relative(shape, other, rank, slopes["side"][cost], slopes["rank"][cost])
            for cost in ("estimate", "correction", "log")
        }
        grown = entries(other, rank) / entries(shape, rank)
        subspace = measured["subspace_bytes"] * grown
        sides = [max(math.sqrt(d_out * d_in) for d_out, d_in in one.counts) for one in (shape, other)]
        working = measured["working_bytes"] * (sides[1] / sides[0]) ** slopes["side"]["working_bytes"]
        modules = len(other.modules)
        for processes in (1, RANKS):
            # Modules are divided; every process holds the result, reads the cache and corrects by itself.
            share = math.ceil(modules / processes) / modules
            rows.append(
                {
                    "model": name,
                    "processes": processes,
                    **times,
                    "estimate": times["estimate"] * share,
                    "again": measured["again"] * grown,
                    "peak_bytes": working + subspace,
                    "checkpoint_bytes": other.checkpoint_bytes,
                    "subspace_bytes": subspace,
                    "adapter_bytes": adapter_bytes(other, lora_rank),
                }
            )
    return rows


def entries(shape: Shape, rank: int | None) -> int:
    """Numbers in the subspace: vectors and values of all modules."""
    return sum(number * (sum(size) + 1) * rank_of(size, rank) for size, number in shape.counts.items())


def adapter_bytes(shape: Shape, lora_rank: int) -> int:
    """Of LoRA factors in float32."""
    return sum(4 * lora_rank * number * (rows + columns) for (rows, columns), number in shape.counts.items())


def _relative(shape: Shape, other: Shape, rank: int | None, by_side: float, by_rank: float) -> float:
    def cost(size: Size) -> float:
        return math.sqrt(size[0] * size[1]) ** by_side * rank_of(size, rank) ** by_rank

    whole = [sum(number * cost(size) for size, number in one.counts.items()) for one in (other, shape)]
    return whole[0] / whole[1]
