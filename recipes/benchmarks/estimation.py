"""The start of a run: the estimate, and the start that finds it in the cache, beside what else one could do."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from csulora_callback import Penalty, SafetySubspace, correct
from csulora_callback.method.basis import Basis
from recipes.benchmarks.fresh import estimate, in_fresh_process
from recipes.benchmarks.shapes import Shape, label
from recipes.benchmarks.synthetic import displacement
from recipes.benchmarks.timing import Time, added, timed
from recipes.training.task import device

Pair = tuple[Path, Path]
_TIMES = ("reading", "estimate", "again", "load", "cold reading", "cold estimate")
PENALTIES = {"guard": Penalty.guard(10.0), "csulora": Penalty.csulora(10.0)}


def measure(shape: Shape, pair: Pair, rank: int | None, repeats: int, folder: Path) -> dict:
    """Seconds of everything that can happen at a start, and peak memory; the caches lie below ``folder``.

    The exact SVD and the products of the dense way are measured on one module of each size, and counted as often as
    the model has it.
    """
    where = {"base": str(pair[0]), "aligned": str(pair[1])}
    asked = {**where, "names": list(shape.modules), "rank": rank}
    peaks: dict[str, list] = {"start": [], "load": []}
    rounds: list[dict[str, Time]] = []
    for turn in range(repeats):
        cache = str(folder / f"cache{turn}")
        start = in_fresh_process("start", **asked, cache=cache)
        second = in_fresh_process("again", **asked, cache=cache)
        loaded = in_fresh_process("load", **where)
        cold = in_fresh_process("cold", **asked)
        peaks["start"].append(start["peak"])
        peaks["load"].append(loaded["peak"])
        times = {**start, **second, **loaded, **cold}
        rounds.append({name: times[name][0] for name in _TIMES})
        rounds[-1] |= _references(shape, pair)
    times = {name: [one[name] for one in rounds] for name in rounds[0]}
    sampled = {
        way: {label(size): times.pop(f"{way} {label(size)}") for size in shape.samples} for way in ("svd", "products")
    }
    counts = {label(size): number for size, number in shape.counts.items()}
    for way, by_size in sampled.items():
        times[way] = added([(counts[size], series) for size, series in by_size.items()])
    times["dense"] = added([(1, times["load"]), (1, times["products"])])
    products = sum(number * 4 * rows * rows for (rows, _), number in shape.counts.items())
    return {"times": times, "sampled": sampled, "counts": counts, "peaks": peaks, "dense_bytes": products}


def kept_subspace(shape: Shape, pair: Pair, rank: int | None, folder: Path) -> tuple[SafetySubspace, int]:
    """What the first start of :func:`measure` left in its cache, and the bytes of a file that holds it."""
    subspace = estimate(str(pair[0]), str(pair[1]), list(shape.modules), rank, str(folder / "cache0"))
    return subspace, bytes_on_disk(subspace, folder)


def bytes_on_disk(subspace: SafetySubspace, folder: Path) -> int:
    """Of the file that it saves."""
    file = folder / "subspace.safetensors"
    subspace.save(file)
    return file.stat().st_size


def quality(shape: Shape, pair: Pair, subspace: SafetySubspace, lora_rank: int) -> dict[str, dict]:
    """One module of each size against the exact float64 SVD of what lies in the files.

    ``energy_lost`` is the share that the worse of the two sides misses of what the best subspace of the same rank
    holds; ``guard`` and ``csulora`` are ``‖X̂* − X*‖ / ‖Δ‖`` of an update of which a part lies in the subspace.
    """
    return {
        label(size): {"module": name, **_errors(displacement(pair, name, torch.float64), subspace[name], lora_rank)}
        for size, name in shape.samples.items()
    }


def update_beside(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA factors ``(rank, d_in)``, ``(d_out, rank)`` of random directions, half of which lean into a subspace."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for basis in (U, V):
        factor = torch.randn(len(basis), rank, generator=generator, dtype=torch.float64) / len(basis) ** 0.5
        leaning = min(max(1, rank // 2), basis.shape[1])
        factor[:, :leaning] += 0.5 * basis[:, :leaning]
        sides.append(factor)
    return sides[1].T, sides[0]


def _errors(D: Tensor, basis: Basis, lora_rank: int) -> dict[str, float]:
    left, sigma, right = torch.linalg.svd(D, full_matrices=False)
    k = len(basis.singular_values)
    best, found = (left[:, :k], right[:k].T), (basis.U.double(), basis.V.double())
    most = sigma[:k].square().sum()
    held = (found[0].T @ D).square().sum(), (D @ found[1]).square().sum()
    A, B = update_beside(*best, lora_rank)
    size = (B @ A).norm()
    errors = {}
    for name, penalty in PENALTIES.items():
        exact, estimated = (correct(A, B, *sides, penalty, rank="expand") for sides in (best, found))
        errors[name] = ((estimated.lora_B @ estimated.lora_A - exact.lora_B @ exact.lora_A).norm() / size).item()
    return {"rank": k, "energy_lost": (1 - min(held) / most).clamp_min(0).item(), **errors}


def _references(shape: Shape, pair: Pair) -> dict[str, Time]:
    """By size, of one module each: its exact SVD, and ``C = D·Dᵀ / ‖D‖`` of the published Safe LoRA from the files on.

    A wide matrix is decomposed as its transpose, which is faster.
    """
    works = {}
    for size, name in shape.samples.items():
        made = []

        def products(name: str = name, made: list[Tensor] = made) -> Tensor:
            made.append(displacement(pair, name, torch.float32, device()))
            return made[0] @ made[0].T / made[0].norm()

        works[f"products {label(size)}"] = timed(products)
        tall = made[0] if size[0] >= size[1] else made[0].T.contiguous()
        works[f"svd {label(size)}"] = timed(lambda tall=tall: torch.linalg.svd(tall, full_matrices=False))
    return works
