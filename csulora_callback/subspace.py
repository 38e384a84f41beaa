"""The safety subspace: leading singular vectors of what alignment did to each weight, ``D = W_aligned − W_base``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from csulora_callback.pair import CheckpointPair
from csulora_callback.processes import Processes
from csulora_callback.singular import leading_singular_triplets
from csulora_callback.weights import Source

logger = logging.getLogger(__name__)

Method = Literal["auto", "krylov", "exact"]

_FORMAT = "3"  # also part of the cache key: raise it whenever the same weights would give another file


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by; see SafetySubspace.fingerprint
class Basis:
    """The safety subspace of one module, in the orientation in which its weight is stored.

    Attributes:
        U: ``(rows, k)`` float32, orthonormal columns; the output side of an ``nn.Linear``.
        V: ``(columns, k)`` float32, orthonormal columns; the input side of an ``nn.Linear``.
        singular_values: ``(k,)`` float32, descending.
        displacement: ``‖D‖``, Frobenius norm of the whole displacement; 0 where alignment left the module alone.

    Example:
        >>> import torch
        >>> U, V = torch.eye(3)[:, :1], torch.eye(4)[:, :1]
        >>> basis = Basis(U, V, singular_values=torch.ones(1), displacement=2.0)
        >>> basis.energy
        0.25
    """

    U: Tensor
    V: Tensor
    singular_values: Tensor
    displacement: float

    @property
    def energy(self) -> float:
        """Share of ``‖D‖²`` that the subspace keeps, in ``[0, 1]``; 1 for a displacement of zero."""
        if self.displacement == 0.0:
            return 1.0
        return min(1.0, self.singular_values.double().square().sum().item() / self.displacement**2)


@dataclass(frozen=True, eq=False)
class SafetySubspace(Mapping[str, Basis]):
    """A :class:`Basis` by module name, with a record of where it came from.

    Attributes:
        bases: by module name, as in the model without PEFT.
        metadata: fingerprints and dtypes of both checkpoints, rank rule, method, seed, versions.
        from_cache: whether :meth:`estimate` found it in its cache.

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

    def __getitem__(self, name: str) -> Basis:
        return self.bases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def energy_kept(self) -> float:
        """Share of the displacement's energy kept, over all modules together."""
        total = sum(basis.displacement**2 for basis in self.bases.values())
        return sum(basis.energy * basis.displacement**2 for basis in self.bases.values()) / total

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all bases."""
        sha = hashlib.sha256()
        for name in sorted(self.bases):
            basis = self.bases[name]
            sha.update(f"{name}:{tuple(basis.U.shape)}:{tuple(basis.V.shape)}:{basis.displacement!r}".encode())
            for part in (basis.U, basis.V, basis.singular_values):
                sha.update(part.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def truncated(self, rank: int) -> SafetySubspace:
        """The subspace of a smaller ``rank``: the first singular vectors of each module.

        Raises:
            ValueError: if ``rank`` is no whole number ≥ 1.

        Example:
            >>> from torch import nn
            >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
            >>> subspace = SafetySubspace.estimate(base, aligned, rank=4, progress=False)
            >>> subspace.truncated(2)["0"].U.shape
            torch.Size([6, 2])
        """
        check_rank_rule(rank, None)
        bases = {
            name: Basis(basis.U[:, :rank], basis.V[:, :rank], basis.singular_values[:rank], basis.displacement)
            for name, basis in self.bases.items()
        }
        return SafetySubspace(bases, {**self.metadata, "rank": rank, "energy": None})

    @classmethod
    def estimate(
        cls,
        base: Source,
        aligned: Source,
        target_modules: str | Sequence[str] | None = None,
        rank: int = 64,
        energy: float | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        method: Method = "auto",
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        processes: Processes | None = None,
    ) -> SafetySubspace:
        """Estimate the subspace of every target module from a base and an aligned checkpoint.

        Reads one pair of tensors at a time. Large matrices go through a randomized block Krylov iteration with extra
        blocks (Musco & Musco 2015), small ones through an exact SVD; the global random state is not touched.

        Args:
            base: the unaligned checkpoint: a folder, a Hub id, or a module in memory.
            aligned: the aligned checkpoint, likewise.
            target_modules: full module names or their last parts (``["q_proj", "v_proj"]``), a regular expression for
                the full name, or ``None`` for every two-dimensional weight that both checkpoints have.
            rank: number ``k`` of singular vectors on each side; less where a displacement has fewer.
            energy: keep instead the smallest ``k`` that holds this share of ``‖D‖²``, in ``(0, 1]``.
            device: where to compute; by default where the aligned weights are.
            progress: show a progress bar.
            method: ``"krylov"`` or ``"exact"`` for all modules, or ``"auto"`` to choose by size.
            seed: of the random start of the Krylov iteration; with the module's name it fixes the result.
            cache_dir: look up and keep the result in this folder, by the content of both checkpoints.
            processes: divide the modules over these (``Processes.all()``); all of them have to call and get the
                whole result, or all fail where one does. The first one's cache counts.

        Raises:
            ValueError: for arguments out of range; if a target is missing in a checkpoint (nearest names are given),
                shapes differ (the first differing tensor is named), weights hold NaN or Inf, or base and aligned are
                equal.
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
        origin = pair.origin(processes)
        rule = {"rank": rank if energy is None else None, "energy": energy, "method": method, "seed": seed}
        path = None if cache_dir is None or processes.rank > 0 else _cache_file(cache_dir, origin, rule)
        cached = processes.together(lambda: None if path is None else cls._from_cache(path))
        if processes.from_first(cached is not None):
            bases = {name: processes.from_first(cached and cached[name]) for name in pair.names}
            return cls(bases, processes.from_first(cached and cached.metadata), from_cache=True)

        subspace = cls._estimate(pair, origin, rule, device, progress, processes)
        if path is not None:
            try:
                subspace.save(path)
            except OSError as error:
                logger.warning("The subspace could not be kept in the cache and will be estimated again: %s", error)
        return subspace

    @classmethod
    def _from_cache(cls, path: Path) -> SafetySubspace | None:
        try:
            return cls.load(path) if path.is_file() else None
        except ValueError as error:
            logger.warning("The cached subspace is unusable and is estimated again: %s", error)
            return None

    @classmethod
    def _estimate(
        cls,
        pair: CheckpointPair,
        origin: dict,
        rule: dict,
        device: object,
        progress: bool,
        processes: Processes,
    ) -> SafetySubspace:
        def estimate(own: str | None, turn: list[str]) -> tuple[Basis, str, str] | None:
            weights = pair.weights_for(own, turn)
            if own is None:
                return None
            dtypes = (str(weight.dtype).removeprefix("torch.") for weight in weights)
            return (_basis(own, *weights, rule, device), *dtypes)

        results = {}
        with tqdm(total=len(pair.names), desc="safety subspace", unit="module", disable=not progress) as bar:
            for part in processes.divide(pair.names, estimate):
                results |= part
                bar.update(len(part))
        bases = {name: results[name][0] for name in pair.names}
        dtypes = [sorted({result[side] for result in results.values()}) for side in (1, 2)]
        if all(basis.displacement == 0.0 for basis in bases.values()):
            raise ValueError(
                f"`base`: base equal to aligned, no displacement: none of the {len(bases)} target modules differs "
                f"between {pair.base.source} and {pair.aligned.source}. Pass the checkpoint from before alignment as "
                "base."
            )
        if dtypes[0] != dtypes[1]:
            logger.warning(
                "The base weights are %s and the aligned ones %s: what the narrower dtype rounded away counts as "
                "displacement. Pass both checkpoints in one dtype.",
                *map("/".join, dtypes),
            )
        metadata = {
            **{side: {**origin[side], "dtypes": seen} for side, seen in zip(origin, dtypes, strict=True)},
            **rule,
            "versions": {package: version(package) for package in ("csulora-callback", "torch")},
        }
        return cls(bases, metadata)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; it appears whole or not at all.

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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, basis in self.bases.items():
            tensors[f"{name}.U"] = basis.U.contiguous()
            tensors[f"{name}.V"] = basis.V.contiguous()
            tensors[f"{name}.singular_values"] = basis.singular_values.contiguous()
        header = {
            "csulora_subspace": _FORMAT,
            "metadata": json.dumps(self.metadata),
            "displacement": json.dumps({name: basis.displacement for name, basis in self.bases.items()}),
        }
        header["sha256"] = _content_hash(self.fingerprint, header)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SafetySubspace:
        """Read a file that :meth:`save` wrote; see there for an example.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is corrupt, not a safety subspace, of an unknown format, or if its content does not
                have the fingerprint it states.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"`subspace`: expected a file that SafetySubspace.save wrote, but {path} is not there."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("csulora_subspace") != _FORMAT:
                    raise ValueError(
                        f"`subspace`: expected a safety subspace of format {_FORMAT}, but {path} is "
                        f"{'another safetensors file' if 'csulora_subspace' not in header else 'of another format'}. "
                        "Estimate it again with SafetySubspace.estimate(...).save(path)."
                    )
                bases = {
                    name: Basis(*(file.get_tensor(f"{name}.{part}") for part in ("U", "V", "singular_values")), norm)
                    for name, norm in json.loads(header["displacement"]).items()
                }
            subspace = cls(bases, json.loads(header["metadata"]))
            expected = header["sha256"]
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"`subspace`: {path} is corrupt ({error}). Estimate it again.") from error
        found = _content_hash(subspace.fingerprint, header)
        if found != expected:
            raise ValueError(
                f"`subspace`: {path} is corrupt: its content has the fingerprint {found[:12]}…, but "
                f"{expected[:12]}… was expected. Estimate it again."
            )
        return subspace


def default_cache_dir() -> Path:
    """``csulora_callback`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Example:
        >>> default_cache_dir().name
        'csulora_callback'
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csulora_callback"


def _content_hash(fingerprint: str, header: Mapping[str, str]) -> str:
    """Covers the tensors, through their fingerprint, and what the header says of them."""
    return hashlib.sha256("\n".join((fingerprint, header["metadata"], header["displacement"])).encode()).hexdigest()


def _cache_file(cache_dir: str | os.PathLike, origin: dict, rule: dict) -> Path:
    key = {"format": _FORMAT, **{side: origin[side]["fingerprint"] for side in origin}, **rule}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / f"subspace-{digest[:32]}.safetensors"


def check_rank_rule(rank: int, energy: float | None) -> None:
    """Refuse a rank that is no whole number ≥ 1 and an energy outside ``(0, 1]``, with a ValueError.

    Example:
        >>> check_rank_rule(64, 1.5)
        Traceback (most recent call last):
        ValueError: `energy`: expected a share in (0, 1] or None, but got 1.5.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"`rank`: expected a whole number ≥ 1, but got {rank!r}.")
    if energy is not None and not (isinstance(energy, (int, float)) and 0.0 < energy <= 1.0):
        raise ValueError(f"`energy`: expected a share in (0, 1] or None, but got {energy!r}.")


def _basis(name: str, base: Tensor, aligned: Tensor, rule: dict, device: object) -> Basis:
    device = aligned.device if device is None else device
    wide = torch.promote_types(torch.promote_types(base.dtype, aligned.dtype), torch.float32)
    D = aligned.to(device, wide) - base.to(device, wide)
    # Rows first, then float64: one float32 sum over 4096 × 4096 squares is wrong by 1e-3, and with it every energy.
    norm = torch.linalg.vector_norm(D, dim=1).cpu().double().norm().item()
    if norm == 0.0:
        return Basis(torch.zeros(D.shape[0], 0), torch.zeros(D.shape[1], 0), torch.zeros(0), 0.0)
    U, sigma, V = leading_singular_triplets(name, D / norm, rule)
    return Basis(U.float().cpu().contiguous(), V.float().cpu().contiguous(), (sigma * norm).float().cpu(), norm)
