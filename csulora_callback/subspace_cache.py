"""Where estimated subspaces are kept. A cache saves time and nothing else: any trouble with it is a warning."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol, TypeVar

from csulora_callback import subspace_file

logger = logging.getLogger(__name__)


SIDES = ("base", "aligned")
_UNUSABLE = "The cached subspace is unusable and is estimated again: %s"


class _Subspace(Protocol):
    metadata: dict

    def save(self, path: Path) -> None: ...


S = TypeVar("S", bound=_Subspace)


class SubspaceCache:
    """The subspaces of some modules under one rule in a cache folder, by the weights that they are of.

    A file's name is made of the rule with the modules, and of the fingerprint of each side, so that a look at the
    names says whether it is worth while to find out a side's fingerprint.

    Args:
        cache_dir: the folder; made when something is kept in it.
        names: of the modules.
        rule: all else that the result depends on: rank or energy, method, seed.

    Example:
        >>> kept, other = (SubspaceCache("cache", ["q_proj"], {"rank": rank, "energy": None}) for rank in (64, 32))
        >>> fingerprints = {"base": "0f3a", "aligned": "77b1"}
        >>> kept.path(fingerprints) == other.path(fingerprints), kept.holds({"base": "0f3a"})
        (False, False)
    """

    def __init__(self, cache_dir: str | os.PathLike, names: Sequence[str], rule: Mapping) -> None:
        self._folder, self._rule = Path(cache_dir), dict(rule)
        self._asked_for = _short(json.dumps([subspace_file.FORMAT, self._rule, sorted(names)], sort_keys=True))

    def path(self, fingerprints: Mapping[str, str]) -> Path:
        """Where the subspace of these weights is kept, or would be."""
        return self._folder / f"{'-'.join(self._parts(fingerprints))}.safetensors"

    def holds(self, fingerprints: Mapping[str, str]) -> bool:
        """Whether there is a subspace of weights with these fingerprints, of both sides or of fewer."""
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            logger.warning(_UNUSABLE, error)
            return False
        return any(fnmatch(name, f"{'-'.join(self._parts(fingerprints))}.safetensors") for name in names)

    def read(self, fingerprints: Mapping[str, str], load: Callable[[Path], S]) -> S | None:
        """What ``load`` makes of the file; ``None`` where there is none, or none that can be used and believed."""
        path = self.path(fingerprints)
        try:
            if not path.exists():
                return None
            subspace = load(path)
        except (OSError, ValueError) as error:
            logger.warning(_UNUSABLE, error)
            return None
        found = {**subspace.metadata, **_fingerprints(subspace)}
        differing = [field for field, value in {**fingerprints, **self._rule}.items() if found.get(field) != value]
        if differing:
            logger.warning(
                _UNUSABLE,
                f"{path} holds one of other weights or of another rule ({', '.join(differing)}), as if it had been "
                "renamed or copied.",
            )
            return None
        return subspace

    def write(self, subspace: S) -> bool:
        """Keep a subspace; ``False`` where that cannot be."""
        try:
            subspace.save(self.path(_fingerprints(subspace)))
        except OSError as error:
            logger.warning("The subspace could not be kept in the cache and will be estimated again: %s", error)
            return False
        return True

    def _parts(self, fingerprints: Mapping[str, str]) -> list[str]:
        sides = (_short(fingerprints[side]) if side in fingerprints else "*" for side in SIDES)
        return ["subspace", self._asked_for, *sides]


def _short(text: str) -> str:
    """Enough of a hash for a name: what the file holds is compared in full."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprints(subspace: _Subspace) -> dict[str, str]:
    return {side: subspace.metadata[side]["fingerprint"] for side in SIDES}


def default_cache_dir() -> Path | None:
    """``csulora_callback`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``None``, and a warning, where there is no home.

    Example:
        >>> default_cache_dir().name
        'csulora_callback'
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csulora_callback"
    except RuntimeError as error:  # a container whose user has no entry in /etc/passwd
        logger.warning(
            "Subspaces are not kept, and each run estimates its own: there is no home directory for a cache (%s). "
            "Set XDG_CACHE_HOME, or pass `cache_dir`.",
            error,
        )
        return None
