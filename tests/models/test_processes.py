"""What processes share outside training: the estimation of the subspace, its failures, and the launch of recipes."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csulora_callback import SafetySubspace
from csulora_callback.models.processes import Processes
from tests.helpers.lab import RANK, TARGETS, saved_pair, tiny_llama
from tests.helpers.recipes import SMALL
from tests.helpers.two import leave, run_on_two, torchrun


def dividing(folder: Path) -> None:
    """Each process reads its share, gets the whole, and the next time finds it in the first one's cache."""
    read, kind = [], SafetySubspace.estimate.__globals__["CheckpointPair"].open.__globals__["Checkpoint"]
    weight = kind.weight

    def counting(self, name):
        read.append(name)
        return weight(self, name)

    kind.weight = counting
    processes = Processes.all()
    cache = folder / f"cache-{processes.rank}"  # of two machines, say: only the first one's is used
    settings = {"rank": RANK, "progress": False, "cache_dir": cache, "processes": processes}
    subspace = SafetySubspace.estimate(folder / "base", folder / "aligned", TARGETS, **settings)
    shares = processes.gather(sorted(set(read)))
    assert [len(share) for share in shares] == [3, 3]
    assert not set(shares[0]) & set(shares[1])
    assert len(read) == 2 * 3  # of two checkpoints, once
    again = SafetySubspace.estimate(folder / "base", folder / "aligned", TARGETS, **settings)
    assert again.from_cache
    assert again.fingerprint == subspace.fingerprint
    assert processes.gather(len(list(cache.glob("subspace-*")))) == [1, 0]
    (folder / f"fingerprint-{processes.rank}").write_text(subspace.fingerprint)


def copies_of_another_form(folder: Path) -> None:
    """As on two machines: each process has files of its own, in which the weights lie in another order."""
    processes = Processes.all()
    pair = [folder / (f"{side}-in-shards" if processes.rank else side) for side in ("base", "aligned")]
    settings = {"rank": RANK, "progress": False, "processes": processes, "cache_dir": folder / "two"}
    subspace = SafetySubspace.estimate(*pair, TARGETS, **settings)
    assert SafetySubspace.estimate(*pair, TARGETS, **settings).from_cache
    assert not list((folder / "two").glob("fingerprint-*"))  # the first one has read a part of its own files
    if processes.rank:
        pair[1] = AutoModelForCausalLM.from_pretrained(folder / "aligned")
    assert SafetySubspace.estimate(*pair, TARGETS, **settings, verify=True).from_cache
    (folder / f"fingerprint-{processes.rank}").write_text(subspace.fingerprint)


def in_reversed_shards(folder: Path, target: Path) -> None:
    state, names = load_file(folder / "model.safetensors"), ("a.safetensors", "b.safetensors")
    target.mkdir()
    weight_map = {key: names[place % 2] for place, key in enumerate(reversed(state))}
    for name in names:
        save_file({key: state[key] for key in state if weight_map[key] == name}, target / name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in (*folder.iterdir(), *target.iterdir()):
        os.utime(file, (time.time() - 60,) * 2)


def failing(folder: Path) -> None:
    """One process finds NaN in a weight that only it reads: both stop, and both say why."""
    processes = Processes.all()
    broken = processes.rank == 1
    base = folder / ("broken" if broken else "base")
    other = r"process 1 of 2 failed: "
    kind, message = (ValueError, "holds NaN or Inf") if broken else (RuntimeError, f"{other}ValueError: .* holds NaN")
    with pytest.raises(kind, match=message):
        SafetySubspace.estimate(base, folder / "aligned", TARGETS, progress=False, processes=processes)
    kind, message = (ZeroDivisionError, "division") if broken else (RuntimeError, f"{other}ZeroDivisionError")
    with pytest.raises(kind, match=message):
        processes.together(lambda: 1 / (1 - processes.rank))
    assert processes.together(lambda: processes.rank) == processes.rank  # and go on from there


@pytest.mark.slow
def test_the_subspace_is_estimated_in_shares(tmp_path):
    pair = saved_pair(tmp_path)
    done = run_on_two("tests.models.test_processes", "dividing", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = SafetySubspace.estimate(*pair, TARGETS, rank=RANK, progress=False)
    for rank in (0, 1):
        assert (tmp_path / f"fingerprint-{rank}").read_text() == alone.fingerprint


@pytest.mark.slow
def test_files_of_another_form_on_each_process_give_the_same(tmp_path):
    pair = saved_pair(tmp_path)
    for folder in pair:
        in_reversed_shards(folder, folder.with_name(f"{folder.name}-in-shards"))
    done = run_on_two("tests.models.test_processes", "copies", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = SafetySubspace.estimate(*pair, TARGETS, rank=RANK, progress=False)
    for rank in (0, 1):
        assert (tmp_path / f"fingerprint-{rank}").read_text() == alone.fingerprint


@pytest.mark.slow
def test_where_one_process_fails_all_fail_and_say_why(tmp_path):
    saved_pair(tmp_path)
    broken = tiny_llama()
    for name, module in broken.named_modules():
        if name.endswith(tuple(TARGETS)):
            torch.nn.init.constant_(module.weight, float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    done = run_on_two("tests.models.test_processes", "failing", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Where the recipes' toy models are kept, so that they are trained once."""
    return [*SMALL, f"toy.cache_dir={tmp_path_factory.mktemp('lab')}"]


def launched(launcher: str, processes: int, lab: list[str], output: Path) -> tuple[list[float], list[dict]]:
    """The losses of a recipe's run with eight samples a step on so many processes, and its results."""
    settings = [*lab, f"output={output}", "training.logging_steps=1", f"training.batch_size={8 // processes}"]
    command = ["-m", "recipes.run", "recipes/quickstart.yaml", *settings]
    done = torchrun(*command, launcher=launcher, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("what the correction did") == 1
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    return losses, json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(lab, tmp_path_factory):
    return launched("torchrun", 1, lab, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launched_recipe_is_one_run(launcher, lab, alone, tmp_path):
    """Two processes with half the batch each do what one process does."""
    losses, results = launched(launcher, 2, lab, tmp_path)
    assert len(losses) == 4
    assert losses == pytest.approx(alone[0], rel=1e-4)
    for mine, other in zip(results, alone[1], strict=True):
        assert mine["method"] == other["method"]
        assert mine["task_loss"] == pytest.approx(other["task_loss"], rel=1e-4)
        assert mine["prompts"] == other["prompts"]


@pytest.mark.slow
def test_a_launched_lightning_recipe_is_one_run(lab, tmp_path):
    done = torchrun("-m", "recipes.run", "recipes/quickstart_lightning.yaml", *lab, f"output={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("what the correction did") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in results] == ["aligned", "raw", "csulora", "guard", "data_aware", "kept"]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records if "loss" in record} == {2, 4}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    {"dividing": dividing, "copies": copies_of_another_form, "failing": failing}[sys.argv[1]](Path(sys.argv[2]))
    leave()
