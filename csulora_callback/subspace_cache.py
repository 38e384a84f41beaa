"""Where estimated subspaces are kept. A cache saves time and nothing else: any trouble with it is a warning."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from csulora_callback import subspace_file

logger = logging.getLogger(__name__)


class _WithMetadata(Protocol):
    metadata: dict


S = TypeVar("S", bound=_WithMetadata)


class CachedSubspace:
    """The place of one subspace in a cache folder: that of these weights under this rule.

    Args:
        cache_dir: the folder; made when something is kept in it.
        origin: sides ``"base"`` and ``"aligned"``, each with its ``fingerprint``.
        rule: all else that the result depends on: rank or energy, method, seed.

    Example:
        >>> origin = {"base": {"fingerprint": "0f3a"}, "aligned": {"fingerprint": "77b1"}}
        >>> kept = CachedSubspace("cache", origin, {"rank": 64, "energy": None, "method": "auto", "seed": 0})
        >>> other = CachedSubspace("cache", origin, {"rank": 32, "energy": None, "method": "auto", "seed": 0})
        >>> kept.path == other.path
        False
    """

    def __init__(self, cache_dir: str | os.PathLike, origin: Mapping[str, Mapping], rule: Mapping) -> None:
        self._asked_for = {**{side: origin[side]["fingerprint"] for side in ("base", "aligned")}, **rule}
        key = json.dumps({"format": subspace_file.FORMAT, **self._asked_for}, sort_keys=True)
        self.path = Path(cache_dir) / f"subspace-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def read(self, load: Callable[[Path], S]) -> S | None:
        """What ``load`` makes of the file; ``None`` where there is none, or none that can be used and believed."""
        try:
            if not self.path.exists():
                return None
            subspace = load(self.path)
        except (OSError, ValueError) as error:
            logger.warning("The cached subspace is unusable and is estimated again: %s", error)
            return None
        found = subspace.metadata
        found = {**found, **{side: found[side]["fingerprint"] for side in ("base", "aligned")}}
        differing = [field for field, value in self._asked_for.items() if found.get(field) != value]
        if differing:
            logger.warning(
                "The cached subspace is unusable and is estimated again: %s holds one of other weights or of another "
                "rule (%s), as if it had been renamed or copied.",
                self.path,
                ", ".join(differing),
            )
            return None
        return subspace

    def write(self, save: Callable[[Path], object]) -> None:
        """Let ``save`` keep the subspace here."""
        try:
            save(self.path)
        except OSError as error:
            logger.warning("The subspace could not be kept in the cache and will be estimated again: %s", error)


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
