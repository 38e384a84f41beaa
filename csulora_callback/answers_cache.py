"""Where a model's answers to probes are kept. As with subspaces, any trouble with it is a warning and costs time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from csulora_callback.models.reading import Rows
from csulora_callback.models.whole_files import write_whole

logger = logging.getLogger(__name__)

_FORMAT = 1


class CachedAnswers:
    """The place of the greedy answers of one model to some prompts in a cache folder.

    Args:
        cache_dir: the folder; made when something is kept in it.
        model: which weights it has, see :func:`~csulora_callback.models.checksum.checksum`.
        prompts: as token ids.
        tokens: how many of each answer.

    Example:
        >>> kept = CachedAnswers("cache", "0f3a", [[5, 6], [7]], tokens=16)
        >>> CachedAnswers("cache", "0f3a", [[5, 6], [8]], tokens=16).path == kept.path
        False
        >>> kept.read() is None
        True
    """

    def __init__(self, cache_dir: str | os.PathLike, model: str, prompts: Rows, tokens: int) -> None:
        asked = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()
        self._asked_for = {"format": _FORMAT, "model": model, "prompts": asked, "tokens": tokens}
        key = hashlib.sha256(json.dumps(self._asked_for, sort_keys=True).encode()).hexdigest()
        self.path = Path(cache_dir) / f"answers-{key[:32]}.json"

    def read(self) -> list[list[int]] | None:
        """The answers; ``None`` where there are none, or none that can be used and believed."""
        try:
            if not self.path.exists():
                return None
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["asked_for"] != self._asked_for or kept["sha256"] != _digest(kept["answers"]):
                raise ValueError(f"{self.path} holds answers to something else, or was changed")
            return kept["answers"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("The cached answers to the probes are unusable, and the model is asked again: %s", error)
            return None

    def write(self, answers: Rows) -> None:
        """Keep the answers here."""
        content = json.dumps({"asked_for": self._asked_for, "answers": answers, "sha256": _digest(answers)})
        try:
            write_whole(self.path, lambda path: path.write_text(content, encoding="utf-8"))
        except OSError as error:
            logger.warning("The answers to the probes could not be kept in the cache: %s", error)


def _digest(answers: Rows) -> str:
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()
