"""Refused rows on two processes over gloo, sharded or not; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import RANK, assert_same, raw, saved, with_lora
from tests.helpers.refusing import RESTRICTED, Answered, is_refused, save_pair
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import assert_sharded, logged, make


def train(engine: str, pair: Path, output: Path, callbacks: list, resume: str | None = None):
    trainer = make(engine, with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned")), output, callbacks)
    trainer.train_dataset = trainer.eval_dataset = Answered()
    trainer.train(resume_from_checkpoint=resume)
    assert_sharded(engine, trainer.model)
    return trainer


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""

    def callback() -> CSULoRACallback:
        settings = {"penalty": Penalty.data_aware(4.0), "probes": RESTRICTED, "cache_dir": pair / "cache"}
        return CSULoRACallback(base_model=pair / "base", rank=RANK, **settings)

    without = train(engine, pair, folder / "without", [])
    trainer = train(engine, pair, folder / "with", [callback()])
    assert logged(trainer, "loss") == logged(without, "loss")
    shares = logged(trainer, "eval_csulora/refused_rows")
    both = [None, None]
    torch.distributed.all_gather_object(both, shares)
    assert both[0] == both[1]
    again = train(engine, pair, folder / "with", [callback()], str(folder / "with/checkpoint-4"))
    assert logged(again, "eval_csulora/refused_rows") == shares
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(shares))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full", "zero3"])
def test_engine(engine, pair, tmp_path):
    shares = run_worker("tests.trainers.test_processes_refused_rows", engine, pair, tmp_path)
    for step in (4, 8):
        folder = tmp_path / f"with/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / "without" / folder.name))
        texts = Sidecar.load(folder).texts
        prompts = [row[:start] for row, start in zip(texts.task, texts.starts, strict=True)]
        refused = [place for place, verdict in enumerate(is_refused(pair / "aligned", prompts)) if verdict]
        assert texts.refused == refused != []
        assert shares[step // 2 - 1] == len(refused) / len(prompts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
