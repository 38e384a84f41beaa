"""A drift budget on two processes over gloo: they stop together; each worker process runs this file."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from csulora_callback import CSULoRACallback
from csulora_callback.sidecar import read_own_record
from tests.helpers.huggingface import callback
from tests.helpers.lab import assert_same, raw, saved
from tests.helpers.poison import PROBES, fit, poisoned_pair, train
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import by_one_process

NORM = "csulora/update_norm"


def stopper(pair: Path, rank: int, **limits) -> CSULoRACallback:
    """One that on the second process finds nothing: only the first one's numbers count, or both would hang."""
    settings = {"probes": PROBES, "cache_dir": pair / "cache", "on_exceed": "stop"}
    ours = callback((pair / "base", pair / "aligned"), **settings, **limits)
    check = ours.budget.check
    if rank == 1:
        ours.budget.check = lambda measured, step: check(dict.fromkeys(measured, 0.5), step)
    return ours


def worker(trainer: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    files, steps = (pair / "base", pair / "aligned"), {}
    for name, limits in (("drift", {"max_drift": {NORM: 10.0}}), ("refusal", {"min_refusal": 0.4})):
        if trainer == "transformers":
            evaluated = {"eval_strategy": "steps", "eval_steps": 2}
            done = train(files, folder / name, [stopper(pair, rank(), **limits)], **evaluated).state
        else:
            settings = {"devices": 2, "strategy": "ddp", "enable_checkpointing": False, "val_check_interval": 2}
            done = fit(files, folder / name, [stopper(pair, rank(), **limits)], **settings)
        steps[name] = done.global_step
    both = [None, None]
    torch.distributed.all_gather_object(both, steps)
    assert both[0] == both[1]
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(steps))


def rank() -> int:
    """As the launcher says: no group is there before a trainer makes one."""
    return int(os.environ["RANK"])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_two_processes_stop_together(trainer, tmp_path):
    poisoned_pair(tmp_path)
    steps = run_worker("tests.trainers.test_processes_budget", trainer, tmp_path, tmp_path)
    for name, step in steps.items():
        assert 1 < step < 8
        made = f"checkpoint-{step}" if trainer == "transformers" else f"csulora-exceeded-step={step}.adapter"
        folder = tmp_path / name / made
        assert_same(saved(folder), by_one_process(tmp_path, raw(folder)))
        (reason,) = read_own_record(folder)["budget"]["exceeded"]
        assert reason.endswith(f"at step {step}")
        assert ("max_drift" if name == "drift" else "min_refusal") in reason


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
