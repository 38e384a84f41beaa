"""A target on two processes over gloo, sharded or not: both find the one strength. Each worker runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace
from tests.helpers.lab import RANK, TARGETS, saved_pair
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import Probe, assert_same, logged, train
from tests.trainers.test_target import PROBES, SHARE, assert_smallest


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    probe, plain_probe = Probe(), Probe()
    without = train(engine, pair, folder / "without", [plain_probe])
    settings = {"rank": RANK, "probes": PROBES, "target": SHARE, "cache_dir": pair / "cache"}
    trainer = train(engine, pair, folder / "with", [CSULoRACallback(base_model=pair / "base", **settings), probe])
    assert logged(trainer, "loss") == logged(without, "loss")
    for step, (values, trained) in probe.seen.items():
        assert_same(values, plain_probe.seen[step][0])
        assert_same(trained, plain_probe.seen[step][1])
    found = [logged(trainer, "csulora/strength"), logged(trainer, "eval_csulora/strength")]
    both = [None, None]
    torch.distributed.all_gather_object(both, found)
    assert both[0] == both[1]
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full"])
def test_engine(engine, tmp_path):
    folder = tmp_path / "pair"
    pair = saved_pair(folder)
    _, evaluated = run_worker("tests.trainers.test_processes_target", engine, folder, tmp_path)
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    for step in (4, 8):
        checkpoint = tmp_path / f"with/checkpoint-{step}"
        strength = assert_smallest(pair, subspace, checkpoint, Penalty.data_aware, tmp_path)
        assert evaluated[step // 2 - 1] == strength


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
