"""A changed file is never taken for the old one, and one that only looks changed costs a reading."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from csulora_callback import SafetySubspace
from csulora_callback.models.file_state import FileState
from tests.helpers.shards import NAMES, estimate, in_place, settle


def change_one_weight(path: Path) -> None:
    state = load_file(path)
    next(iter(state.values()))[0, 0] += 0.5
    save_file(state, path)


def in_place_with_its_time_put_back(path: Path) -> None:
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """By a file of the same size and time."""
    before = path.stat()
    other = path.with_suffix(".new")
    shutil.copy2(path, other)
    in_place(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def linked_elsewhere(path: Path) -> None:
    """A link that leads to another file than before."""
    other = path.parent.parent / "elsewhere.safetensors"
    shutil.copy2(path, other)
    in_place(other)
    path.unlink()
    path.symlink_to(other)


CHANGES = [in_place, in_place_with_its_time_put_back, replaced, linked_elsewhere]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_never_gives_the_old_subspace(models, tmp_path, change, side):
    old = estimate(models, tmp_path / "cache")
    change(models[side] / "b.safetensors")
    for _ in range(2):
        new = estimate(models, tmp_path / "cache")
        assert new.fingerprint == estimate(models, None).fingerprint != old.fingerprint


def test_a_file_cut_short_is_an_error_by_name(models, tmp_path):
    estimate(models, tmp_path / "cache")
    path = models[1] / "b.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"b\.safetensors: expected a safetensors file, but it is corrupt"):
        estimate(models, tmp_path / "cache")


def test_a_touched_file_is_read_again_and_found(models, tmp_path, read):
    estimate(models, tmp_path / "cache")
    read.clear()
    os.utime(models[1] / "b.safetensors", (time.time() - 30,) * 2)
    for count in (len(NAMES), 0):
        assert estimate(models, tmp_path / "cache").from_cache
        assert len(read) == count
        read.clear()


def test_a_weight_that_moved_to_another_shard_is_read_again(models, tmp_path):
    """The files look the same; another one of them counts."""
    shard, key = models[1] / "b.safetensors", f"{NAMES[0]}.weight"
    old = estimate(models, tmp_path / "cache")
    save_file({key: torch.ones(6, 8)}, models[1] / "z.safetensors")
    index = models[1] / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, key: "z.safetensors"}}))
    settle(models[1])
    new = estimate(models, tmp_path / "cache")
    assert shard.exists()
    assert new.fingerprint == estimate(models, None).fingerprint != old.fingerprint


def test_what_was_written_a_moment_ago_is_not_believed(models, tmp_path, read):
    """A second change within the same tick of the clock would not show."""
    os.utime(models[1] / "a.safetensors")
    estimate(models, tmp_path / "cache")
    read.clear()
    assert estimate(models, tmp_path / "cache").from_cache
    assert read == [("aligned", name) for name in NAMES[::2] + NAMES[1::2]]
    settle(models[1])
    estimate(models, tmp_path / "cache")
    read.clear()
    assert estimate(models, tmp_path / "cache").from_cache
    assert not read


def test_a_clock_that_runs_ahead_only_costs_time(models, tmp_path, read):
    os.utime(models[1] / "a.safetensors", (time.time() + 1000,) * 2)
    for _ in range(2):
        assert not read or estimate(models, tmp_path / "cache").from_cache
        estimate(models, tmp_path / "cache")
    assert len(read) > 2 * len(NAMES)


@pytest.mark.parametrize("moment", ["first", "last"])
def test_a_file_that_is_written_while_it_is_read_is_refused(models, tmp_path, monkeypatch, moment):
    used = SafetySubspace.estimate.__globals__["CheckpointPair"].open.__globals__["Checkpoint"]
    weight, when = used.weight, NAMES[0 if moment == "first" else -1]

    def writing(self, name):
        found = weight(self, name)
        if name == when and Path(self.source).name == "aligned":
            change_one_weight(models[1] / "a.safetensors")
        return found

    monkeypatch.setattr(used, "weight", writing)
    with pytest.raises(ValueError, match=r"a\.safetensors was written or replaced since it was opened"):
        estimate(models, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_verify_reads_what_looks_unchanged(models, tmp_path, read):
    first = estimate(models, tmp_path / "cache")
    read.clear()
    again = estimate(models, tmp_path / "cache", verify=True)
    assert again.from_cache
    assert again.fingerprint == first.fingerprint
    assert len(read) == 2 * len(NAMES)


def test_verify_finds_a_change_that_does_not_show(models, tmp_path, monkeypatch):
    """As on a file system that keeps no time of change."""
    old = estimate(models, tmp_path / "cache")
    look = FileState.of(models[1] / "b.safetensors")
    in_place(models[1] / "b.safetensors")
    of = FileState.of.__func__
    used = SafetySubspace.estimate.__globals__["CheckpointPair"].open.__globals__["open_checkpoint"].__globals__
    state = used["FileState"]
    monkeypatch.setattr(state, "of", classmethod(lambda cls, p: look if p == look.path else of(cls, p)))
    assert estimate(models, tmp_path / "cache").fingerprint == old.fingerprint
    new = estimate(models, tmp_path / "cache", verify=True)
    assert new.fingerprint == estimate(models, None).fingerprint != old.fingerprint
    assert estimate(models, tmp_path / "cache").fingerprint == new.fingerprint  # and it is known from now on
