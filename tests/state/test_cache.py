"""The cache: found again by content and rule alone, and in no circumstances the reason why a training stops."""

import logging
import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from csulora_callback import CSULoRACallback, SafetySubspace, subspace_file
from csulora_callback.subspace_cache import SubspaceCache, default_cache_dir
from tests.helpers.lab import TARGETS, align

FORK = get_context("fork")
NOBODY, WITHOUT_A_NAME = 65534, 54321
KEPT, UNUSABLE = "could not be kept in the cache", "cached subspace is unusable and is estimated again"


def layers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    return base, align(base)  # two that are independent are warned of


BASE, ALIGNED = layers()


def estimate(folder: Path | None, base: Any = BASE, aligned: Any = ALIGNED, **rule) -> SafetySubspace:
    size = {} if "energy" in rule else {"rank": 2}
    return SafetySubspace.estimate(base, aligned, progress=False, cache_dir=folder, **{**size, **rule})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(work: Callable[[], Any], user: int | None = None) -> tuple[Any, list[str]]:
    """What ``work`` returns in a process of its own, under a user whom permissions bind, and the warnings there."""
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        messages, handler = [], logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logging.getLogger("csulora_callback").addHandler(handler)
        if user is not None and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        send.send((work(), messages))

    child = FORK.Process(target=run)
    child.start()
    send.close()
    try:
        return receive.recv()
    finally:
        child.join()


@pytest.fixture
def shared():
    """A folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in (folder, *folder.glob("cache"), *folder.glob("cache/*")):
        path.chmod(0o700)
    shutil.rmtree(folder)


# What is found.


def test_is_keyed_by_both_checkpoints_by_the_rule_and_by_the_format(pair, tmp_path, caplog, monkeypatch):
    cache, moved = tmp_path / "cache", [tmp_path / "base", tmp_path / "aligned"]
    for folder, copy in zip(pair, moved, strict=True):
        shutil.copytree(folder, copy)
    first, found = (estimate(cache, *folders, target_modules=TARGETS) for folders in (pair, moved))
    assert (first.from_cache, found.from_cache) == (False, True)  # content counts, and not where it lies
    named = [[found.metadata[side]["source"] for side in ("base", "aligned")] for found in (first, found)]
    assert named == [list(map(str, pair)), list(map(str, moved))]  # as whoever asks calls them
    assert first.metadata == {**found.metadata, **{side: first.metadata[side] for side in ("base", "aligned")}}
    others = [{"rank": 3}, {"energy": 0.9}, {"energy": 0.8}, {"seed": 1}, {"method": "exact"}, {"method": "krylov"}]
    others.append({"target_modules": TARGETS[:2]})
    for rule in others:
        assert [estimate(cache, *pair, **{"target_modules": TARGETS, **rule}).from_cache for _ in range(2)] == [0, 1]
    for folder in moved:
        file, state = folder / "model.safetensors", load_file(folder / "model.safetensors")
        state["model.layers.1.self_attn.q_proj.weight"][0, 0] += 0.1
        save_file(state, file, metadata={"format": "pt"})
        new, again, true = (estimate(where, *moved, target_modules=TARGETS) for where in (cache, cache, None))
        assert (new.from_cache, again.from_cache) == (False, True)
        assert new.fingerprint == again.fingerprint == true.fingerprint != first.fingerprint
    monkeypatch.setattr(subspace_file, "FORMAT", "next")
    assert not estimate(cache, *pair, target_modules=TARGETS).from_cache
    monkeypatch.undo()
    assert estimate(cache, *pair, target_modules=TARGETS).from_cache
    # One file for each: none has taken another's place, and none had to be looked into to be told apart.
    kept = [name for name in names(cache) if name.startswith("subspace-")]
    assert len(kept) == 1 + len(others) + len(moved) + 1
    assert not caplog.records


@pytest.mark.parametrize("field", ["base", "aligned", "names", "rank", "energy", "method", "seed"])
def test_every_part_of_the_key_makes_another_name(field):
    sides = {"base": "0f3a", "aligned": "77b1"}
    key = {**sides, "names": ["q_proj"], "rank": 64, "energy": None, "method": "auto", "seed": 0}

    def path(key: dict) -> Path:
        rule = {name: key[name] for name in key if name not in (*sides, "names")}
        return SubspaceCache("cache", key["names"], rule).path({side: key[side] for side in sides})

    assert path(key) == path(dict(key))
    assert path({**key, field: "other"}) != path(key)
    assert path({**key, "base": key["aligned"], "aligned": key["base"]}) != path(key)


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}, {"seed": 1}, {"method": "krylov"}, "base", "aligned"])
def test_a_file_under_the_name_of_another_is_not_believed(tmp_path, caplog, rule):
    third = align(BASE, seed=2)
    other = {rule: third} if isinstance(rule, str) else rule
    estimate(tmp_path, **other)
    (foreign,) = tmp_path.iterdir()
    truth = estimate(tmp_path)
    (own,) = set(tmp_path.iterdir()) - {foreign}
    os.replace(foreign, own)
    with caplog.at_level(logging.WARNING):
        again = estimate(tmp_path)
    assert not again.from_cache
    assert again.fingerprint == truth.fingerprint
    assert UNUSABLE in caplog.text
    assert "of other weights or of another rule" in caplog.text
    assert next(iter(other)) in caplog.text.partition("another rule")[2]
    assert estimate(tmp_path).from_cache


def test_a_corrupt_file_is_estimated_again(tmp_path, caplog):
    first = estimate(tmp_path)
    (path,) = tmp_path.iterdir()
    for content in (path.read_bytes()[:-100], b"", b"\xff" * 1000):
        path.write_bytes(content)
        caplog.clear()
        again = estimate(tmp_path)
        assert not again.from_cache
        assert again.fingerprint == first.fingerprint
        assert UNUSABLE in caplog.text
        assert estimate(tmp_path).from_cache


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        estimate(tmp_path / "cache")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


# Trouble.


def no_rights(folder: Path) -> None:
    folder.chmod(0o555)


def no_entry(folder: Path) -> None:
    estimate(folder)
    folder.chmod(0o000)


def no_folder(folder: Path) -> None:
    folder.rmdir()
    folder.parent.chmod(0o555)


def a_file_instead(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("not a folder")


def the_file_of_a_colleague(folder: Path) -> None:
    estimate(folder)
    (file,) = folder.iterdir()
    file.chmod(0o000)
    folder.chmod(0o555)


def a_folder_instead_of_the_file(folder: Path) -> None:
    estimate(folder)
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    (file / "something").write_text("in it")


TROUBLE = {
    no_rights: [KEPT],
    no_entry: [UNUSABLE, KEPT],
    no_folder: [KEPT],
    a_file_instead: [KEPT],
    the_file_of_a_colleague: [UNUSABLE, KEPT],
    a_folder_instead_of_the_file: [UNUSABLE, KEPT],
}


@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda trouble: trouble.__name__)
def test_trouble_is_a_warning_and_an_estimate(shared, trouble):
    cache = shared / "cache"
    cache.mkdir()
    trouble(cache)
    (fingerprint, from_cache), messages = in_child(
        lambda: (estimate(cache).fingerprint, estimate(cache).from_cache), NOBODY
    )
    assert fingerprint == estimate(None).fingerprint
    assert not from_cache
    assert len(messages) == 2 * len(TROUBLE[trouble])
    for message, expected in zip(messages, 2 * TROUBLE[trouble], strict=True):
        assert expected in message
        assert str(cache) in message


def test_the_unreadable_file_of_a_colleague_is_replaced_where_that_is_allowed(shared):
    estimate(shared)
    (file,) = shared.iterdir()
    file.chmod(0o000)
    results, messages = in_child(lambda: [estimate(shared).from_cache for _ in range(2)], NOBODY)
    assert results == [False, True]
    assert len(messages) == 1
    assert UNUSABLE in messages[0]


def test_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path):
    def on_a_full_disk() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        return estimate(tmp_path).fingerprint

    fingerprint, messages = in_child(on_a_full_disk)
    assert fingerprint == estimate(None).fingerprint
    assert len(messages) == 1
    assert KEPT in messages[0]
    assert "File too large" in messages[0]
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home_is_told_once(shared):
    def construct() -> tuple[Path | None, Path | None, Path | None]:
        for variable in ("HOME", "XDG_CACHE_HOME"):
            os.environ.pop(variable, None)
        callbacks = (
            CSULoRACallback(base_model="org/base"),
            CSULoRACallback(base_model="org/base", cache_dir=shared),
            CSULoRACallback(subspace="subspace.safetensors"),
        )
        return tuple(callback.cache_dir for callback in callbacks)

    caches, messages = in_child(construct, WITHOUT_A_NAME)
    assert caches == (None, shared, None)
    assert len(messages) == 1
    assert "no home directory for a cache" in messages[0]
    assert "Set XDG_CACHE_HOME, or pass `cache_dir`" in messages[0]


def test_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == CSULoRACallback(base_model="org/base").cache_dir == tmp_path / "csulora_callback"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "csulora_callback"


# Several writers.


def test_many_at_once_agree(tmp_path):
    children = [FORK.Process(target=estimate, args=(tmp_path,)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert len(names(tmp_path)) == 1
    assert estimate(tmp_path).from_cache


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path, monkeypatch):
    def die(tensors: dict, place: Path, metadata: dict) -> None:
        place.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(subspace_file, "save_file", die)
    child = FORK.Process(target=estimate, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    monkeypatch.undo()
    assert not estimate(tmp_path, rank=1).from_cache  # not the same subspace, only the same cache
    assert left.name not in names(tmp_path)
    assert len(names(tmp_path)) == 1
