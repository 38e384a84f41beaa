"""A content-aware penalty on two processes over gloo; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.models.activations import Activations
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict, to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import RANK, assert_same, live, raw, saved, saved_pair, with_lora
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import Probe, logged, train

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
PENALTY = Penalty.content_aware(4.0)


def callback(pair: Path) -> CSULoRACallback:
    cache = pair / "cache"
    return CSULoRACallback(base_model=pair / "base", rank=RANK, penalty=PENALTY, probes=PROBES, cache_dir=cache)


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    probe, plain_probe = Probe(), Probe()
    without = train(engine, pair, folder / "without", [plain_probe])
    trainer = train(engine, pair, folder / "with", [callback(pair), probe])
    assert logged(trainer, "loss") == logged(without, "loss")
    for step, (values, trained) in probe.seen.items():
        assert_same(values, plain_probe.seen[step][0])
        assert_same(trained, plain_probe.seen[step][1])
    shipped = live(trainer.model)
    for tensor in shipped.values():
        both = [torch.empty_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(both, tensor)
        assert torch.equal(*both)

    again = train(engine, pair, folder / "with", [callback(pair)], folder / "with" / "checkpoint-4")
    assert_same(live(again.model), shipped)
    if torch.distributed.get_rank() == 0:
        torch.save(shipped, folder / "shipped.pt")
        (folder / "report.json").write_text(json.dumps({"eval": logged(trainer, "eval_loss")}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    saved_pair(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full", "zero3"])
def test_engine(engine, pair, tmp_path):
    run_worker("tests.trainers.test_processes_data_aware", engine, pair, tmp_path)
    for folder in (tmp_path / "with/checkpoint-4", tmp_path / "with/checkpoint-8"):
        assert_same(raw(folder), saved(tmp_path / "without" / folder.name))
        texts = Sidecar.load(folder).texts
        step = int(folder.name.split("-")[1])
        assert (texts.seen, texts.probes) == (2 * step, PROBES)  # the first process's rows
        expected = by_one_process(pair, raw(folder), texts)
        for key, value in saved(folder).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
    assert_same(torch.load(tmp_path / "shipped.pt"), saved(folder))


def by_one_process(pair: Path, factors: dict[str, torch.Tensor], texts) -> dict[str, torch.Tensor]:
    """The correction that a single process makes of the same raw factors and texts."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"))
    adapter = find_adapter(model)
    subspace = SafetySubspace.estimate(pair / "base", model, list(adapter.layers), rank=RANK, progress=False)
    adapter.write(from_peft_state_dict(factors, list(adapter.layers), "raw"))
    activations = Activations.read(adapter, texts, PENALTY.skips_prefix)
    return to_peft_state_dict(SafetyCorrector(model, subspace, PENALTY, activations).compute().corrected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
