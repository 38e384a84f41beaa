"""Where no rank is named every front door takes the relative one: both trainers, the commands, the post-hoc call."""

import json
import re

import pytest

from csulora_callback import SafetySubspace, correct_adapter
from tests.helpers import huggingface, lightning
from tests.helpers.command_line import run
from tests.helpers.lab import (
    DEVICE,
    PENALTY,
    TARGETS,
    assert_same,
    corrected_by_hand,
    raw,
    saved,
    saved_pair,
    tiny_llama,
)

RANKS = {"q_proj": 8, "v_proj": 4, "down_proj": 6}  # of 256 × 256, 128 × 256 and 256 × 200


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Wide enough that modules differ in their ranks."""
    return saved_pair(tmp_path_factory.mktemp("pair"), tiny_llama(hidden_size=256, intermediate_size=200))


@pytest.fixture(scope="module")
def expected(pair):
    """The subspace of each kind of module from an absolute rank, put together."""
    return put_together(pair, DEVICE)


def put_together(pair, device):
    bases = {}
    for kind, rank in RANKS.items():
        estimated = SafetySubspace.estimate(*pair, target_modules=[kind], rank=rank, progress=False, device=device)
        bases |= estimated.bases
    return bases


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """A checkpoint of a run whose callback was given no rank."""
    output = tmp_path_factory.mktemp("trained")
    huggingface.train(pair, output, [huggingface.callback(pair, rank=None)])
    return huggingface.checkpoints(output)[-1]


def test_what_the_trainer_saves(trained, expected):
    assert {basis.U.shape[1] for basis in expected.values()} == {4, 6, 8}
    assert_same(saved(trained), corrected_by_hand(raw(trained), expected))
    subspace = json.loads((trained / "csulora/correction.json").read_text())["subspace"]
    assert (subspace["rank"], subspace["energy"]) == (None, None)


def test_what_lightning_saves(pair, expected, tmp_path):
    lightning.fit(pair, tmp_path, [lightning.callback(pair, rank=None)], max_epochs=1)
    (path,) = tmp_path.rglob("*.ckpt")
    lightning.assert_corrected(path, expected)


def test_what_a_rank_that_is_named_saves(pair, trained, tmp_path):
    huggingface.train(pair, tmp_path, [huggingface.callback(pair, rank=64)])
    found = huggingface.checkpoints(tmp_path)[-1]
    truth = SafetySubspace.estimate(*pair, TARGETS, 64, progress=False, device=DEVICE)
    assert {basis.U.shape[1] for basis in truth.values()} == {64}
    assert_same(raw(found), raw(trained))
    assert_same(saved(found), corrected_by_hand(raw(found), truth))


def test_what_the_start_table_says(pair, tmp_path, capsys):
    for rank, shown, asked in ((None, "4–8", "a thirty-second of each module's smaller side"), (5, "5", "5")):
        huggingface.train(pair, tmp_path, [huggingface.callback(pair, rank=rank)], max_steps=1)
        table = capsys.readouterr().out
        assert re.search(rf"safety subspace\W+rank {shown}, \d\d\.\d% of the energy of", table)
        assert re.search(rf"rank asked for\W+{asked}\s", table)


def test_what_the_commands_do(pair, trained, tmp_path):
    file, targets = tmp_path / "subspace.safetensors", ("--target-modules", ",".join(TARGETS))
    status, output, error = run("subspace", *pair, "-o", file, *targets, "--json")
    assert status == 0, error
    modules = json.loads(output)["modules"]
    assert {name.split(".")[-1]: module["rank"] for name, module in modules.items()} == RANKS
    rule = ("--penalty", "csulora", "--strength", PENALTY.parameters["strength"])
    for name, source in (("by file", ("--subspace", file)), ("by base", ("--base", pair[0]))):
        status, _, error = run("correct", trained, "-o", tmp_path / name, *source, *rule)
        assert status == 0, error
    correct_adapter(trained, file, tmp_path / "by call", PENALTY)
    by_hand = SafetySubspace(put_together(pair, None), SafetySubspace.load(file).metadata)  # as the command
    correct_adapter(trained, by_hand, tmp_path / "expected", PENALTY)
    for name in ("by file", "by base", "by call"):
        assert_same(saved(tmp_path / name), saved(tmp_path / "expected"))
    status, output, _ = run("subspace", "--show", file)
    assert "4–8 (asked for: a thirty-second of each module's smaller side)" in output
