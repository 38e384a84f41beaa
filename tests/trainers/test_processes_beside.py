"""An ``lm_head`` that is trained whole, on two processes over gloo; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.beside import by_hand, key, saved
from tests.helpers.lab import PENALTY, assert_same, raw, saved_pair, with_lora
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import callback, logged, make

WORKER = "tests.trainers.test_processes_beside"


def train(engine: str, pair: Path, output: Path, callbacks: list, resume: Path | None = None):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"), modules_to_save=["lm_head"])
    trainer = make(engine, model, output, callbacks)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does."""
    without = train(engine, pair, folder / "without", [])
    trainer = train(engine, pair, folder / "with", [callback(pair)])
    last = folder / "with" / "checkpoint-8"
    if torch.distributed.get_rank() == 0:
        last.rename(folder / "last")
    torch.distributed.barrier()
    again = train(engine, pair, folder / "with", [callback(pair)], folder / "with" / "checkpoint-4")
    if torch.distributed.get_rank() == 0:
        runs = {"without": without, "with": trainer, "again": again}
        report = {name: logged(run, "loss") for name, run in runs.items()}
        (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full", "zero2", "zero3"])
def test_a_head_is_corrected_as_by_one_process(tmp_path, engine):
    pair = saved_pair(tmp_path)
    report = run_worker(WORKER, engine, tmp_path, tmp_path)
    assert report["with"] == report["without"] == report["again"]
    checkpoint = tmp_path / "last"
    trained, written = raw(checkpoint), saved(checkpoint)
    assert_same(trained, saved(tmp_path / "without/checkpoint-8"))
    expected = by_hand("lm_head", trained[key("lm_head")], pair, PENALTY)
    torch.testing.assert_close(written[key("lm_head")].double(), expected, atol=2e-6, rtol=0)
    assert_same(saved(tmp_path / "with/checkpoint-8"), written)
    assert_same(raw(tmp_path / "with/checkpoint-8"), trained)


if __name__ == "__main__":
    engine, pair, folder = sys.argv[1:]
    worker(engine, Path(pair), Path(folder))
    leave()
