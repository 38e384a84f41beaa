"""The safety subspace: leading singular vectors of what alignment did to each weight, ``D = W_aligned − W_base``."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from csulora_callback import subspace_file
from csulora_callback.fingerprints import Fingerprints
from csulora_callback.method.basis import Basis, Reused, basis_of, check_basis, check_rank_rule
from csulora_callback.models.checkpoint import Source
from csulora_callback.models.checksum import fingerprint
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading_ahead import Seen, reading_ahead
from csulora_callback.subspace_cache import SubspaceCache

logger = logging.getLogger(__name__)

Method = Literal["auto", "krylov", "exact"]

_UNRELATED = 1.0  # ‖D‖ / ‖W_aligned‖: of two independent weights of one size it is √2


@dataclass(frozen=True, eq=False)
class SafetySubspace(Mapping[str, Basis]):
    """A :class:`Basis` by module name, with a record of where it came from.

    Attributes:
        bases: by module name, as in the model without PEFT.
        metadata: fingerprints and dtypes of both checkpoints, method, seed, versions, and the rank rule: ``rank`` and
            ``energy``, both None where the rank is relative.
        from_cache: whether :meth:`estimate` found it in its cache.

    Raises:
        ValueError: if a basis is none: columns that are not orthonormal, other types, values that cannot be.

    Example:
        >>> import torch
        >>> from csulora_callback import SafetySubspace
        >>> base, aligned = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> subspace["0"].U.shape, subspace["0"].V.shape, 0 < subspace.energy_kept < 1
        (torch.Size([6, 2]), torch.Size([8, 2]), True)
    """

    bases: dict[str, Basis]
    metadata: dict
    from_cache: bool = False

    def __post_init__(self) -> None:
        for name, basis in self.bases.items():
            check_basis(name, basis)

    def __getitem__(self, name: str) -> Basis:
        return self.bases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def energy_kept(self) -> float:
        """Share of the displacement's energy kept, over all modules together; 1 for a displacement of zero."""
        total = sum(basis.displacement**2 for basis in self.bases.values())
        kept = sum(basis.energy * basis.displacement**2 for basis in self.bases.values())
        return kept / total if total else 1.0

    @property
    def displaced(self) -> float | None:
        """``‖D‖ / ‖W_aligned‖`` over all modules that were estimated; None where that is not known."""
        return self.metadata.get("displaced")

    @cached_property
    def fingerprint(self) -> str:
        """Of the content of all bases."""
        return subspace_file.fingerprint(self.bases)

    def truncated(self, rank: int | None) -> SafetySubspace:
        """The subspace of a smaller ``rank``: the first singular vectors of each module.

        Args:
            rank: as for :meth:`estimate`; None is the relative one.

        Raises:
            ValueError: if ``rank`` is no whole number ≥ 1, or more than this subspace was estimated with.

        Example:
            >>> from torch import nn
            >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
            >>> subspace = SafetySubspace.estimate(base, aligned, rank=4, progress=False)
            >>> subspace.truncated(2)["0"].U.shape
            torch.Size([6, 2])
        """
        check_rank_rule(rank, None)
        by_energy, bases = self.metadata["energy"] is not None, {}
        for name, basis in self.bases.items():
            asked, held = (basis.rank_of(k) for k in (rank, self.metadata["rank"]))
            if asked > held and not by_energy:  # of what was cut by energy one cannot tell
                raise ValueError(
                    f"`rank`: expected at most the {held} that module '{name}' was estimated with, but got {asked}. "
                    "Estimate it again."
                )
            bases[name] = basis.truncated(asked)
        return SafetySubspace(bases, {**self.metadata, "rank": rank, "energy": None})

    @classmethod
    def estimate(
        cls,
        base: Source,
        aligned: Source,
        target_modules: str | Sequence[str] | None = None,
        rank: int | None = None,
        energy: float | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        method: Method = "auto",
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        processes: Processes | None = None,
        verify: bool = False,
    ) -> SafetySubspace:
        """Estimate the subspace of every target module from a base and an aligned checkpoint.

        Reads each weight once, in the order of the files, and one pair ahead of what is computed. Large matrices go
        through a randomized block Krylov space (Musco & Musco 2015) that grows until a correction by it is right to
        1e-3, small ones through an exact SVD; the global random state is not touched.

        Args:
            base: the unaligned checkpoint: a folder, a Hub id, or a module in memory.
            aligned: the aligned checkpoint, likewise.
            target_modules: full module names or their last parts (``["q_proj", "v_proj"]``), a regular expression for
                the full name, or ``None`` for every two-dimensional weight that both checkpoints have.
            rank: number ``k`` of singular vectors on each side; less where a displacement has fewer. By default a
                thirty-second of each module's smaller side (64 at 2048), at least 4.
            energy: keep instead the smallest ``k`` that holds this share of ``‖D‖²``, in ``(0, 1]``.
            device: where to compute; by default where the aligned weights are.
            progress: show a progress bar.
            method: ``"krylov"`` or ``"exact"`` for all modules, or ``"auto"`` to choose by size.
            seed: of the random start of the Krylov iteration; with the module's name it fixes the result.
            cache_dir: look up and keep the result in this folder, by the content of both checkpoints. Files that look
                as they did when they were last read (see :class:`~csulora_callback.models.file_state.FileState`) are
                not read for that. A cache that cannot be used costs a warning.
            processes: divide the modules over these (``Processes.all()``); all of them have to call and get the
                whole result, or all fail where one does. The first one's cache counts.
            verify: True reads the files although they look unchanged.

        Raises:
            ValueError: for arguments out of range; if a target is missing in a checkpoint (nearest names are given),
                shapes differ (the first differing tensor is named), weights hold NaN or Inf, a file is written to
                meanwhile, or base and aligned are equal.
            FileNotFoundError: if a checkpoint is not there.

        Example:
            >>> from torch import nn
            >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
            >>> subspace = SafetySubspace.estimate(base, aligned, ["0"], energy=1.0, progress=False)
            >>> subspace["0"].singular_values.shape, subspace.metadata["energy"]
            (torch.Size([6]), 1.0)
        """
        check_rank_rule(rank, energy)
        if method not in ("auto", "krylov", "exact"):
            raise ValueError(f"`method`: expected 'auto', 'krylov' or 'exact', but got {method!r}.")
        processes = processes or Processes()
        pair = processes.together(lambda: CheckpointPair.open(base, aligned, target_modules))
        rule = {"rank": rank if energy is None else None, "energy": energy, "method": method, "seed": seed}
        cache = None if cache_dir is None or processes.rank > 0 else SubspaceCache(cache_dir, pair.names, rule)
        fingerprints = Fingerprints(cache_dir, processes)
        origin = fingerprints.of_both(pair, cache and cache.holds, verify)
        cached = processes.together(lambda: cache.read(origin, cls._cached) if cache and origin else None)
        if processes.from_first(cached is not None):
            bases = {name: processes.from_first(cached and cached[name]) for name in pair.names}
            metadata = processes.from_first(cached and pair.named_in(cached.metadata))
            return cls(bases, metadata, from_cache=True)._checked()

        subspace = cls._estimate(pair, rule, device, progress, processes)
        if processes.from_first(cache is not None and cache.write(subspace)):
            for side, checkpoint in pair.sides.items():
                fingerprints.remember(checkpoint, pair.names, subspace.metadata[side]["fingerprint"])
        return subspace._checked()

    @classmethod
    def _estimate(
        cls, pair: CheckpointPair, rule: dict, device: object, progress: bool, processes: Processes
    ) -> SafetySubspace:
        # The first one's order, as another process may have other files of the same weights.
        order, results, space = processes.from_first(pair.in_order()), {}, Reused()
        with (
            reading_ahead(pair, order[processes.rank :: processes.size], device) as reader,
            tqdm(total=len(order), desc="safety subspace", unit="module", disable=not progress) as bar,
        ):

            def estimate(own: str | None, turn: list[str]) -> tuple[Basis, list[Seen]] | None:
                seen, weights = [], reader.take(own, turn)
                if own is None:
                    return list(weights) or None  # others may need this process for theirs
                return basis_of(own, _noting(seen, weights), rule, device, space), seen

            for part in processes.divide(order, estimate):
                results |= part
                bar.update(len(part))
        processes.together(lambda: pair.check_unwritten(order))
        bases = {name: results[name][0] for name in pair.names}
        origin = {
            side: {
                "source": checkpoint.source,
                "fingerprint": fingerprint({name: seen[number].digest for name, (_, seen) in results.items()}),
                "dtypes": sorted({seen[number].dtype for _, seen in results.values()}),
            }
            for number, (side, checkpoint) in enumerate(pair.sides.items())
        }
        if all(basis.displacement == 0.0 for basis in bases.values()):
            raise ValueError(
                f"`base`: base equal to aligned, no displacement: none of the {len(bases)} target modules differs "
                f"between {pair.base.source} and {pair.aligned.source}. Pass the checkpoint from before alignment as "
                "base."
            )
        dtypes = [origin[side]["dtypes"] for side in pair.sides]
        if dtypes[0] != dtypes[1]:
            logger.warning(
                "The base weights are %s and the aligned ones %s: what the narrower dtype rounded away counts as "
                "displacement. Pass both checkpoints in one dtype.",
                *map("/".join, dtypes),
            )
        share = _share(bases, {name: seen[-1].norm for name, (_, seen) in results.items()})
        versions = {package: version(package) for package in ("csulora-callback", "torch")}
        return cls(bases, {**origin, **rule, "displaced": share, "versions": versions})

    def _checked(self) -> SafetySubspace:
        """Itself, and a warning where the two checkpoints look as if they had nothing to do with each other."""
        if self.displaced is not None and self.displaced > _UNRELATED:
            logger.warning(
                "%s is %.0f%% of the aligned weights' size away from %s, as far as one that was trained by itself. "
                "Is it what the aligned model was made from? If not, no correction by it means anything.",
                self.metadata["base"]["source"],
                100 * self.displaced,
                self.metadata["aligned"]["source"],
            )
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; it appears whole or not at all.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if the metadata does not say which weights it is of, or JSON cannot hold it.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
            >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     subspace.save(f"{folder}/subspace.safetensors")
            ...     loaded = SafetySubspace.load(f"{folder}/subspace.safetensors")
            >>> loaded.fingerprint == subspace.fingerprint
            True
        """
        subspace_file.write(self.bases, self.metadata, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike) -> SafetySubspace:
        """Read a file that :meth:`save` wrote; see there for an example.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is corrupt, not a safety subspace, of an unknown format, if its content does not have the
                fingerprint it states, or if a basis in it is none.
        """
        return cls(*subspace_file.read(Path(path)))._checked()

    @classmethod
    def _cached(cls, path: Path) -> SafetySubspace:
        return cls(*subspace_file.read(path), from_cache=True)


def _noting(seen: list[Seen], weights: Iterable[tuple[Tensor, Seen]]) -> Iterator[Tensor]:
    for weight, one in weights:
        seen.append(one)
        yield weight
        del weight  # which has to be out of memory before the next is read


def _share(bases: Mapping[str, Basis], norms: Mapping[str, float]) -> float | None:
    """``‖D‖ / ‖W_aligned‖`` over all modules, rounded; None where weights are zero or too large for their dtype."""
    displaced, whole = (math.hypot(*of) for of in ([b.displacement for b in bases.values()], norms.values()))
    return float(f"{displaced / whole:.4g}") if 0.0 < whole < math.inf else None
