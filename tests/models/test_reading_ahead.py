"""Pairs are read in their order, one ahead, by a thread that ends; and what was read leaves the memory."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from csulora_callback.models.checksum import digest
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.reading_ahead import reading_ahead

COUNT = 6


@pytest.fixture
def pair(tmp_path) -> CheckpointPair:
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        state = {f"layers.{number}.weight": torch.randn(5, 4) for number in range(COUNT)}
        save_file(state, tmp_path / side / "model.safetensors")
    return CheckpointPair.open(tmp_path / "base", tmp_path / "aligned")


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading ahead")]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_gives_what_the_files_hold(pair, device):
    with reading_ahead(pair, pair.in_order(), device) as reader:
        for name in pair.in_order():
            for (weight, said), checkpoint in zip(reader.take(name, [name]), pair.sides.values(), strict=True):
                assert torch.equal(weight, checkpoint.weight(name))
                assert (said.digest, said.dtype) == (digest(weight), "float32")


def test_weights_that_lie_in_another_order_are_read_too(tmp_path, pair):
    """As torch.save keeps them."""
    order = pair.in_order()
    (tmp_path / "turned").mkdir()
    state = {f"{name}.weight": pair.base.weight(name).T.contiguous().T for name in order}
    torch.save(state, tmp_path / "turned" / "pytorch_model.bin")
    turned = CheckpointPair.open(tmp_path / "turned", tmp_path / "aligned")
    assert not turned.base.stored(order[0]).is_contiguous()
    with reading_ahead(turned, order) as reader:
        for name in order:
            (weight, seen), _ = reader.take(name, [name])
            assert torch.equal(weight, pair.base.weight(name))
            assert seen.digest == digest(pair.base.weight(name))


def test_one_pair_is_read_ahead_and_no_more(pair, monkeypatch):
    read, parts = [], type(pair.base).parts

    def noted(self, name: str) -> list[Callable]:
        if reading() and threading.current_thread() in reading() and name not in read:
            read.append(name)
        return parts(self, name)

    monkeypatch.setattr(type(pair.base), "parts", noted)
    order = pair.in_order()
    with reading_ahead(pair, order) as reader:
        list(reader.take(order[0], order[:1]))
        time.sleep(0.3)  # for whatever more it might read
        assert read == order[:2]
        for name in order[1:]:
            list(reader.take(name, [name]))
    assert read == order


def test_the_second_weight_is_read_when_it_is_asked_for(pair, monkeypatch):
    read, weight = [], type(pair.base).weight
    monkeypatch.setattr(type(pair.base), "weight", lambda self, name: read.append(self) or weight(self, name))
    with reading_ahead(pair, ["layers.0"]) as reader:
        weights = reader.take("layers.0", ["layers.0"])
        next(weights)
        assert read == [pair.base]
        next(weights)
        assert read == [pair.base, pair.aligned]


def take_all(pair: CheckpointPair, order: list[str]) -> None:
    with reading_ahead(pair, order) as reader:
        for name in order:
            list(reader.take(name, [name]))
            assert reading()


def test_the_thread_ends_with_the_block(pair):
    take_all(pair, pair.in_order())
    assert not reading()


def test_what_is_wrong_is_said_when_its_turn_comes(tmp_path, pair):
    order = pair.in_order()
    state = {f"{name}.weight": torch.ones(5, 4) for name in order}
    state[f"{order[1]}.weight"][0, 0] = float("nan")
    (tmp_path / "broken").mkdir()
    save_file(state, tmp_path / "broken" / "model.safetensors")
    broken = CheckpointPair.open(tmp_path / "base", tmp_path / "broken")
    take_all(broken, order[:1])
    with pytest.raises(ValueError, match=f"weight of '{order[1]}' holds NaN"):
        take_all(broken, order)
    assert not reading()


MEMORY = """
import re, sys
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.reading_ahead import reading_ahead

def peak():  # unlike ru_maxrss, without what the parent had when it started this process
    return int(re.search(r"VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024

pair = CheckpointPair.open(*sys.argv[1:])
order = pair.in_order()
with reading_ahead(pair, order[:1]) as reader:  # what the first one needs beside the weights
    for weight, _ in reader.take(order[0], order[:1]):
        float(weight.sum())
        del weight
before = peak()
with reading_ahead(pair, order) as reader:
    for name in order:
        for weight, _ in reader.take(name, [name]):
            float(weight.sum())
            del weight
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process had at the most")
@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_pages_are_given_back(tmp_path, storage):
    """Of 2 × 20 tensors of 8 MB, a few are in memory at the same time, mapped pages included."""
    for side in ("base", "aligned"):
        (tmp_path / side).mkdir()
        state = {f"layers.{number}.weight": torch.randn(2048, 1024) for number in range(20)}
        if storage == "bin":
            torch.save(state, tmp_path / side / "pytorch_model.bin")
        else:
            save_file(state, tmp_path / side / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "base", tmp_path / "aligned"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 2 * 8 * 2**20  # beyond the first one
