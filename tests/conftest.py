"""What holds for every test."""

import pytest
import torch

from csulora_callback import SafetySubspace
from tests.helpers.lab import DEVICE, RANK, TARGETS, saved_pair

# Tiny models gain nothing from threads, and several test processes on few cores lose a factor of ten to them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Subspaces and toy models of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a tiny base and aligned checkpoint."""
    return saved_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def subspace(pair):
    """What the callback estimates from them."""
    return SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False, device=DEVICE)
