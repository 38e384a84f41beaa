"""What several tests of the trainers share."""

import pytest

from tests.helpers.hub import running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fake Hub."""
    with running_hub(monkeypatch, tmp_path / "hub-cache") as server:
        yield server
