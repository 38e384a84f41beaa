"""What holds for every test."""

import os

import pytest
import torch

from csulora_callback import SafetySubspace

# Tiny models gain nothing from threads, and several test processes on few cores lose a factor of ten to them.
torch.set_num_threads(1)


def pytest_configure(config):
    """``-m gpu`` is on a GPU where there is one; before anything reads on what device tests are, or uses cuBLAS."""
    if config.getoption("markexpr") == "gpu" and torch.cuda.is_available():
        os.environ.setdefault("CSULORA_TEST_DEVICE", "cuda")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Subspaces and toy models of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of a tiny base and aligned checkpoint."""
    from tests.helpers.lab import saved_pair

    return saved_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def subspace(pair):
    """What the callback estimates from them."""
    from tests.helpers.lab import DEVICE, RANK, TARGETS

    return SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False, device=DEVICE)
