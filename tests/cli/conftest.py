"""What several tests of the commands share."""

import shutil
from pathlib import Path

import pytest

from csulora_callback import SafetySubspace
from tests.helpers.huggingface import callback, checkpoints, train
from tests.helpers.lab import RANK, TARGETS


@pytest.fixture(scope="module")
def lab(pair, tmp_path_factory) -> Path:
    """A raw adapter, one that training corrected, and the file of their subspace."""
    folder = tmp_path_factory.mktemp("lab")
    train(pair, folder / "plain", [])
    train(pair, folder / "with", [callback(pair)])
    shutil.copytree(checkpoints(folder / "plain")[-1], folder / "raw")
    shutil.copytree(checkpoints(folder / "with")[-1], folder / "corrected")
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    subspace.save(folder / "subspace.safetensors")
    return folder
