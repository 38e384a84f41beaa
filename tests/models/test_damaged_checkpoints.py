"""Files that are damaged, foreign or made to harm: each gives its weights, or an error that names it."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from csulora_callback.models.checkpoint import open_checkpoint
from tests.helpers.lab import tiny_llama

ONES = torch.ones(2, 3)
LINEAR = [name for name, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)]
BIN, INDEX, CONFIG = "pytorch_model.bin", "model.safetensors.index.json", "config.json"


def assert_refused(folder, names, *parts, error=ValueError):
    """Opening, or reading one of these weights, says where the file is and what is wrong with it."""
    with pytest.raises(error) as raised:
        open_checkpoint(folder, names).fingerprint(names)
    for part in (str(folder), *parts):
        assert part in str(raised.value)


# Files of torch.save.


FOREIGN = {
    "nested": ({"state_dict": {"a.weight": ONES}}, ["expected tensors by name, but got dict of ['dict']"]),
    "a list": ([ONES], ["expected tensors by name, but got list"]),
    "a tensor": (ONES, ["expected tensors by name, but got Tensor"]),
    "a number": (3, ["expected tensors by name, but got int"]),
    "nothing": ({}, ["expected tensors by name, but got dict. Save the model's state_dict() itself"]),
    "texts": ({"a.weight": "x", "b.weight": 2}, ["expected tensors by name, but got dict of ['int', 'str']"]),
    "sparse": ({"a.weight": ONES.to_sparse()}, ["dense tensor for 'a.weight', but got one that is sparse"]),
    "without data": ({"a.weight": ONES.to("meta")}, ["dense tensor for 'a.weight', but got one that is sparse"]),
    "a list as weight": ({"a.weight": [1.0], "b": ONES}, ["expected a dense tensor for 'a.weight', but got list"]),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_bin_files_that_hold_something_else(tmp_path, case):
    content, parts = FOREIGN[case]
    torch.save(content, tmp_path / BIN)
    assert_refused(tmp_path, ["a"], f"{tmp_path / BIN}: ", *parts)


def test_what_lies_beside_the_weights_does_no_harm(tmp_path):
    beside = {"epoch": 3, "names": ["a"], 7: ONES, b"x": ONES, "optimizer": {"c.weight": ONES}, "b.weight": None}
    torch.save({"a.weight": nn.Parameter(2 * ONES), **beside}, tmp_path / BIN)
    checkpoint = open_checkpoint(tmp_path, ["a"])
    assert checkpoint.names() == ["a"]
    assert torch.equal(checkpoint.weight("a"), 2 * ONES)
    assert not checkpoint.weight("a").requires_grad


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_that_are_cut_short(tmp_path, zipped):
    torch.save({"a.weight": torch.ones(64, 64)}, tmp_path / BIN, _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / BIN).read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / BIN).write_bytes(whole[:length])
        assert_refused(tmp_path, ["a"], f"{tmp_path / BIN}: expected tensors written by torch.save", "Fetch it again")


# Indexes of shards.


INDEXES = {
    "number": ({"a.weight": 3}, "expected the name of a file in this folder for the weight 'a.weight', but got 3"),
    "null": ({"a.weight": None}, "but got None"),
    "list of names": ({"a.weight": ["x.safetensors"]}, "but got ['x.safetensors']"),
    "map that is a list": (["x.safetensors"], "expected a shard index with a weight_map"),
    "map that is a text": ("x.safetensors", "expected a shard index with a weight_map"),
    "above the folder": ({"a.weight": "../secret.safetensors"}, "but got '../secret.safetensors'. Fetch it again"),
    "above and back": ({"a.weight": "sub/../x.safetensors"}, "but got 'sub/../x.safetensors'"),
    "Windows' above": ({"a.weight": "..\\secret.safetensors"}, "but got '..\\\\secret.safetensors'"),
    "Windows' absolute": ({"a.weight": "C:\\secret.safetensors"}, "but got 'C:\\\\secret.safetensors'"),
    "empty name": ({"a.weight": ""}, "but got ''"),
    "a weight too many": (
        {"a.weight": "x.safetensors", "b.weight": "x.safetensors"},
        "expected the shard 'x.safetensors' to hold 'b.weight', as the index says, but it does not",
    ),
    "two weights swapped": (
        {"a.weight": "y.safetensors", "c.weight": "x.safetensors"},
        "expected the shard 'x.safetensors' to hold 'c.weight'",
    ),
}
MISSING = {
    "overlong": "x" * 5000,
    "NUL": "x\0.safetensors",
    "no character": "\ud800",
    "folder": "folder.safetensors",
    "dot": ".",
    "nowhere": "z.safetensors",
}


@pytest.fixture
def shards(tmp_path):
    """A folder with two shards and a folder named like one, beside a file that is not its own."""
    folder = tmp_path / "checkpoint"
    (folder / "folder.safetensors").mkdir(parents=True)
    (folder / "sub").mkdir()
    save_file({"a.weight": ONES}, folder / "x.safetensors")
    save_file({"c.weight": 3 * ONES}, folder / "y.safetensors")
    save_file({"a.weight": 7 * ONES}, tmp_path / "secret.safetensors")
    return folder


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_name_what_is_no_shard_of_theirs(shards, case):
    weight_map, message = INDEXES[case]
    (shards / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(shards, ["a"], f"{shards / INDEX}: ", message)


def test_an_index_with_an_absolute_name(shards):
    outside = str(shards.parent / "secret.safetensors")
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a.weight": outside}}))
    assert_refused(shards, ["a"], f"{shards / INDEX}: ", f"but got {outside!r}", "nothing outside the folder is read")


@pytest.mark.parametrize("case", MISSING)
def test_shards_that_are_not_there(shards, case):
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a.weight": MISSING[case]}}))
    assert_refused(shards, ["a"], f"the shard {MISSING[case]!r} that {INDEX} lists", error=FileNotFoundError)


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b"\xff\xfe", b"", b"null", b"{}", b"1" * 10_000, b'{"weight_map": null}']
)
def test_indexes_that_are_none(shards, text):
    (shards / INDEX).write_bytes(text)
    assert_refused(shards, ["a"], f"{shards / INDEX}: expected a shard index with a weight_map", "Fetch it again")


def test_shards_may_be_links_that_lead_out_and_lie_in_a_folder_of_their_own(shards):
    """As all files of the Hub's cache are links to blobs elsewhere."""
    (shards / "sub/link.safetensors").symlink_to(shards.parent / "secret.safetensors")
    (shards / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "sub/link.safetensors"}}))
    assert torch.equal(open_checkpoint(shards).weight("a"), 7 * ONES)


@pytest.mark.parametrize("name", [INDEX, BIN, "model.safetensors"])
def test_folders_in_the_place_of_files(tmp_path, name):
    (tmp_path / name).mkdir()
    assert_refused(tmp_path, ["a"], "expected one of", "as a file", error=FileNotFoundError)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "a/b/c", "../x"])
def test_names_that_are_no_source(name):
    with pytest.raises(FileNotFoundError, match="expected a folder with a checkpoint or a Hub id"):
        open_checkpoint(name)


# Configs, which are read where names differ.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model in every storage that is read, by the file to damage."""
    folder, model = tmp_path_factory.mktemp("saved"), tiny_llama()
    model.save_pretrained(folder / "model.safetensors")
    model.save_pretrained(folder / INDEX, max_shard_size="4KB")
    for name, zipped in ((BIN, True), (f"old {BIN}", False)):
        shutil.copytree(folder / "model.safetensors", folder / name)
        state = load_file(folder / name / "model.safetensors")
        (folder / name / "model.safetensors").unlink()
        torch.save(state, folder / name / BIN, _use_new_zipfile_serialization=zipped)
    return folder


CONFIGS = {
    "numbers": ({"architectures": [3]}, "of transformers in `architectures`, but got [3]"),
    "text": ({"architectures": "LlamaForCausalLM"}, "but got 'LlamaForCausalLM'"),
    "object": ({"architectures": {}}, "but got {}"),
    "none": ({"architectures": []}, "but got []"),
    "nothing": ({"architectures": None}, "but got None"),
    "no model": ({"architectures": ["pipeline"]}, "but got ['pipeline']"),
    "a config": ({"architectures": ["LlamaConfig"]}, "but got ['LlamaConfig']"),
    "unknown": ({"architectures": ["Nowhere"]}, "but got ['Nowhere']"),
    "sizes of other weights": ({"hidden_size": 32}, "(RuntimeError: "),
    "sizes that are none": ({"hidden_size": "x"}, "'hidden_size'"),
    "model of nobody's": ({"model_type": "nobody"}, "`nobody`"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_transformers_cannot_load(saved, tmp_path, case):
    changed, message = CONFIGS[case]
    folder = shutil.copytree(saved / "model.safetensors", tmp_path / "checkpoint")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changed}))
    said = "expected a weight for the module 'elsewhere', but the checkpoint has none"
    assert_refused(folder, ["elsewhere"], said, "Nor can transformers, which renames on load, load it", message)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"3", b"[" * 200_000])
def test_configs_that_are_none(saved, tmp_path, text):
    folder = shutil.copytree(saved / "model.safetensors", tmp_path / "checkpoint")
    (folder / CONFIG).write_bytes(text)
    assert_refused(folder, ["elsewhere"], "expected a weight for the module 'elsewhere'", "Nor can transformers")


def test_code_beside_the_weights_is_not_run_and_nobody_is_asked(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved / "model.safetensors", tmp_path / "checkpoint")
    own = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.Config"}}
    (folder / CONFIG).write_text(json.dumps(own))
    (folder / "own.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    said = "contains custom code which must be executed to correctly load the model"
    assert_refused(folder, ["elsewhere"], said, "Code that lies beside the weights is never run.")


# Any damage at all.


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut short, or with a few bits flipped, most of them where the file says what it holds: near its ends."""
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        near = chance.randrange(min(3000, len(content)))
        where = chance.choice([near, near, len(content) - 1 - near, chance.randrange(len(content))])
        changed[where] ^= 1 << chance.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("model.safetensors",) * 2, (INDEX,) * 2, (BIN,) * 2, (f"old {BIN}", BIN), ("model.safetensors", CONFIG)],
)
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_damage_gives_weights_or_an_error_by_name(saved, tmp_path, kind, file, times):
    folder = shutil.copytree(saved / kind, tmp_path / "checkpoint")
    names = LINEAR if file != CONFIG else ["elsewhere"]  # which makes it be read
    content, chance, said, read = (folder / file).read_bytes(), random.Random(0), [], 0
    for _ in range(times):
        (folder / file).write_bytes(damaged(content, chance))
        try:
            open_checkpoint(folder, names).fingerprint(names)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            said.append(str(error))
    assert len(said) + read == times
    assert said
    assert all(str(folder) in message for message in said)
    assert read or file == CONFIG
