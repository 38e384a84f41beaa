"""Where a model's answers to probes are kept. As with subspaces, any trouble with it is a warning and costs time."""

from __future__ import annotations

import hashlib
import json
import os

from csulora_callback.kept_json import KeptJson
from csulora_callback.models.reading import Rows

_FORMAT = 2


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
        asked_for = {"format": _FORMAT, "model": model, "prompts": asked, "tokens": tokens}
        self._kept = KeptJson(cache_dir, "answers", asked_for)
        self.path = self._kept.path

    def read(self) -> list[list[int]] | None:
        """The answers; ``None`` where there are none, or none that can be used and believed."""
        return self._kept.read("The cached answers to the probes are unusable, and the model is asked again: %s")

    def write(self, answers: Rows) -> None:
        """Keep the answers here."""
        self._kept.write(answers, "The answers to the probes could not be kept in the cache: %s")
