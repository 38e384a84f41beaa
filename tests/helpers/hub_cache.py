"""A repository of two revisions in the Hub's cache, with no network."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

NAME = "some-org/some-model"


def keep(folders: Sequence[Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints as ``main`` and ``v2`` of ``NAME``, in a cache that is the only place to look."""
    repo = cache / "models--some-org--some-model"
    (repo / "refs").mkdir(parents=True)
    for place, (ref, folder) in enumerate(zip(("main", "v2"), folders, strict=True)):
        shutil.copytree(folder, repo / "snapshots" / (str(place) * 40))
        (repo / "refs" / ref).write_text(str(place) * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
