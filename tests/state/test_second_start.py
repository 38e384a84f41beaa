"""A second start reads no file that looks as it did, whatever happened to what is known of it."""

import logging
import shutil
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from csulora_callback import SafetySubspace
from csulora_callback.models.file_state import FileState
from csulora_callback.models.processes import Processes
from csulora_callback.subspace_origin import check_origin
from tests.helpers.shards import NAMES, estimate, in_place, settle, weights, write_shards

FORK = get_context("fork")


def in_memory(state: dict[str, torch.Tensor]) -> nn.Module:
    layers = [nn.ModuleDict({kind: nn.Linear(8, 6, bias=False) for kind in ("q_proj", "v_proj")}) for _ in range(2)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "embed": nn.Linear(8, 6, bias=False)})
    model.load_state_dict(state)
    return model


# What is read.


def test_the_first_start_reads_each_weight_once_in_the_order_of_the_aligned_files(models, tmp_path, read):
    subspace = estimate(models, tmp_path / "cache")
    keys = [*NAMES, "embed"]
    order = [name for name in (*keys[::2], *keys[1::2]) if name in NAMES]
    assert read == [(side, name) for name in order for side in ("base", "aligned")]
    assert list(subspace) == sorted(NAMES)


def test_the_second_start_reads_nothing(models, tmp_path, read, caplog):
    first = estimate(models, tmp_path / "cache")
    read.clear()
    again = estimate(models, tmp_path / "cache")
    assert again.from_cache
    assert not read
    assert again.fingerprint == first.fingerprint
    assert again.metadata == first.metadata
    assert not caplog.records


def test_the_order_of_reading_changes_nothing(models, tmp_path):
    subspace = estimate(models, None)
    shutil.rmtree(models[1])
    keys = list(weights(1))
    write_shards(models[1], weights(1), {"z.safetensors": keys[1:], "y.safetensors": keys[:1]})
    again = estimate(models, None)
    assert again.metadata == subspace.metadata
    assert again.fingerprint == subspace.fingerprint
    assert list(again) == list(subspace)


def test_a_copy_is_found_by_reading_it_once_and_then_without(models, tmp_path, read):
    estimate(models, tmp_path / "cache")
    read.clear()
    copy = shutil.copytree(models[1], tmp_path / "copy")
    settle(copy)
    for count in (len(NAMES), 0):
        assert estimate((models[0], copy), tmp_path / "cache").from_cache
        assert len(read) == count
        read.clear()


def test_what_cannot_be_in_the_cache_is_not_read_twice(models, tmp_path, read):
    estimate(models, tmp_path / "cache")
    for arguments in ({"seed": 1}, {"method": "exact"}):
        read.clear()
        assert not estimate(models, tmp_path / "cache", **arguments).from_cache
        assert len(read) == 2 * len(NAMES)
    read.clear()
    assert not estimate(models[::-1], tmp_path / "cache").from_cache  # both are known, and not this way round
    assert len(read) == 2 * len(NAMES)
    read.clear()
    other = tmp_path / "other"
    write_shards(other, weights(2), {"a.safetensors": list(weights(2))})
    assert not estimate((other, other.with_name("base")), tmp_path / "cache", seed=2).from_cache
    assert len(read) == 2 * len(NAMES)


def test_what_may_be_in_the_cache_is_read_for_its_fingerprint_first(models, tmp_path, read):
    estimate(models, tmp_path / "cache")
    other = tmp_path / "other"
    write_shards(other, weights(2), {"a.safetensors": list(weights(2))})
    read.clear()
    assert not estimate((models[0], other), tmp_path / "cache").from_cache
    assert len(read) == 3 * len(NAMES)


def test_in_memory_the_weights_themselves_count_and_no_file_is_read(models, tmp_path, read):
    model = in_memory(weights(1))
    first = estimate((models[0], model), tmp_path / "cache")
    assert first.metadata["aligned"]["fingerprint"] == estimate(models, None).metadata["aligned"]["fingerprint"]
    read.clear()
    assert estimate((models[0], model), tmp_path / "cache").from_cache
    assert read == [("ModuleDict in memory", name) for name in NAMES]
    model.get_submodule(NAMES[0]).weight.data[0, 0] += 1
    read.clear()
    again = estimate((models[0], model), tmp_path / "cache")
    assert not again.from_cache
    assert again.fingerprint != first.fingerprint
    assert len([side for side, _ in read if side == "base"]) == len(NAMES)


def test_other_modules_of_the_same_files_are_known_beside_them(models, tmp_path, read):
    few = ["layers.0.q_proj", "layers.1.v_proj"]
    settings = {"rank": 2, "progress": False, "cache_dir": tmp_path / "cache"}
    estimate(models, tmp_path / "cache")
    SafetySubspace.estimate(*models, few, **settings)
    read.clear()
    assert SafetySubspace.estimate(*models, few, **settings).from_cache
    assert estimate(models, tmp_path / "cache").from_cache
    assert not read


# The Hub's cache.


@pytest.fixture
def hub(models, tmp_path) -> Callable[[str], Path]:
    """Puts the aligned checkpoint into a cache of the Hub's form, and says where the snapshot is."""

    def put(where: str) -> Path:
        repo = tmp_path / where / "models--org--name"
        snapshot = repo / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir()
        for number, file in enumerate(sorted(models[1].iterdir())):
            blob = repo / "blobs" / (f"{number}" * 64)
            shutil.copy2(file, blob)
            (snapshot / file.name).symlink_to(blob)
        return snapshot

    return put


def test_a_blob_is_known_by_its_name_wherever_the_cache_lies(models, hub, tmp_path, read):
    estimate((models[0], hub("cache of one")), tmp_path / "cache")
    read.clear()
    assert estimate((models[0], hub("cache of another")), tmp_path / "cache").from_cache
    assert not read


def test_a_blob_that_was_written_into_is_read_again(models, hub, tmp_path):
    snapshot = hub("hub")
    old = estimate((models[0], snapshot), tmp_path / "cache")
    in_place(snapshot / "b.safetensors")
    new = estimate((models[0], snapshot), tmp_path / "cache")
    assert new.fingerprint == estimate((models[0], snapshot), None).fingerprint != old.fingerprint


def test_other_files_are_no_blobs(tmp_path):
    for name in ("0" * 64, "0" * 40, "model.safetensors"):
        for folder in (tmp_path / "blobs", tmp_path / "models--org--name" / "snapshots"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
            assert FileState.of(folder / name).where == str(folder / name)


# The records.


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed", "a folder", "a list", "not text"])
def test_a_record_that_cannot_be_believed_costs_a_warning(models, tmp_path, read, caplog, damage):
    good = estimate(models, tmp_path / "cache")
    one, other = (tmp_path / "cache").glob("fingerprint-*")
    if damage == "cut":
        one.write_text(one.read_text()[:-9])
    elif damage == "changed":
        one.write_text(one.read_text().replace(good.metadata["base"]["fingerprint"], "0" * 64))
        other.write_text(other.read_text().replace(good.metadata["base"]["fingerprint"], "0" * 64))
    elif damage == "renamed":
        shutil.copy(other, one)
    elif damage == "a folder":
        one.unlink()
        one.mkdir()
    else:
        one.write_bytes(b"[1]" if damage == "a list" else b"\xff\xfe")
    read.clear()
    with caplog.at_level(logging.WARNING):
        again = estimate(models, tmp_path / "cache")
    assert again.from_cache
    assert again.fingerprint == good.fingerprint
    assert len({side for side, _ in read}) == 1  # only the one that is no longer known
    assert "What is known of the files of a checkpoint is unusable, and they are read again" in caplog.text
    if damage != "a folder":
        read.clear()
        assert estimate(models, tmp_path / "cache").from_cache
        assert not read  # mended


def test_records_of_runs_at_the_same_time_are_whole(models, tmp_path, read):
    children = [FORK.Process(target=estimate, args=(models, tmp_path / "cache")) for _ in range(5)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 5
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert estimate(models, tmp_path / "cache").from_cache
    assert not read


# A subspace that was saved.


def test_the_origin_of_a_saved_subspace_is_checked_without_reading_files_again(models, tmp_path, read):
    subspace = estimate(models, None)
    read.clear()
    for count in (len(NAMES), 0):
        check_origin(subspace, models[1], Processes(), tmp_path / "cache")
        assert len(read) == count
        read.clear()
    in_place(models[1] / "b.safetensors")
    with pytest.raises(ValueError, match="the fingerprint of the weights it was estimated from"):
        check_origin(subspace, models[1], Processes(), tmp_path / "cache")
