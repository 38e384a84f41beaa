"""What the tests of a second start share."""

from pathlib import Path

import pytest

from csulora_callback import SafetySubspace
from tests.helpers.shards import weights, write_shards


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    """Two checkpoints, sharded in different ways."""
    state = weights(1)
    keys = list(state)
    write_shards(tmp_path / "base", weights(0), {"a.safetensors": keys[:2], "b.safetensors": keys[2:]})
    write_shards(tmp_path / "aligned", state, {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]})
    return tmp_path / "base", tmp_path / "aligned"


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, str]]:
    """What is read from now on: the folder and the module."""
    used = SafetySubspace.estimate.__globals__["CheckpointPair"].open.__globals__["Checkpoint"]
    weight, seen = used.weight, []

    def counting(self, name):
        seen.append((Path(self.source).name, name))
        return weight(self, name)

    monkeypatch.setattr(used, "weight", counting)
    return seen
