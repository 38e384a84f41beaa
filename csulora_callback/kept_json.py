"""A small thing that a cache folder keeps as JSON. A cache saves time and nothing else: any trouble is a warning."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csulora_callback.models.whole_files import write_whole

logger = logging.getLogger(__name__)


class KeptJson:
    """The place of one thing in a cache folder: of what was asked for.

    Args:
        cache_dir: the folder; made when something is kept in it.
        kind: how the file's name begins.
        asked_for: all that the thing depends on; it stands in the file, too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = KeptJson(folder, "answer", {"question": 6})
        ...     kept.write({"is": 42}, "The answer is lost: %s")
        ...     kept.read("The answer is no good: %s")
        {'is': 42}
    """

    def __init__(self, cache_dir: str | os.PathLike, kind: str, asked_for: Mapping) -> None:
        self._asked_for = json.loads(json.dumps(asked_for))  # as it will be read
        self.path = Path(cache_dir) / f"{kind}-{_digest(self._asked_for)[:32]}.json"

    def read(self, unusable: str) -> Any | None:
        """What was kept; ``None`` where there is nothing, or, with a warning, nothing to be believed."""
        try:
            if not self.path.exists():
                return None
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["asked_for"] != self._asked_for or kept["sha256"] != _digest(kept["value"]):
                raise ValueError(f"{self.path} is of something else, or was changed")
            return kept["value"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning(unusable, error)
            return None

    def write(self, value: Any, lost: str) -> None:
        """Keep a value here, whole or, with a warning, not at all."""
        content = json.dumps({"asked_for": self._asked_for, "value": value, "sha256": _digest(value)})
        try:
            write_whole(self.path, lambda path: path.write_text(content, encoding="utf-8"))
        except OSError as error:
            logger.warning(lost, error)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
