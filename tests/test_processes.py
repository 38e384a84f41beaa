"""The promises on two processes (gloo, DDP): each worker runs this file under torchrun's environment."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.adapters import find_adapter, from_peft_state_dict, to_peft_state_dict
from tests.lab import make_trainer, saved_pair, with_lora
from tests.test_lightning import assert_same, factors_in, fit


def callback(folder: Path) -> CSULoRACallback:
    return CSULoRACallback(folder / "base", rank=3, penalty=Penalty.csulora(5.0), cache_dir=folder / "cache")


def train(folder: Path, output: Path, callbacks: list, batch: int, resume: str | None = None):
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder / "aligned"))
    trainer = make_trainer(
        model, output, callbacks, per_device_train_batch_size=batch, save_steps=4, eval_strategy="steps", eval_steps=4
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_everywhere(factors: dict[str, torch.Tensor]) -> None:
    for tensor in factors.values():
        both = [torch.empty_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(both, tensor)
        assert torch.equal(*both)


def in_the_trainer(folder: Path) -> None:
    """What each of the two processes does; rank 0 leaves what the test compares."""
    without = train(folder, folder / "without", [], batch=2)
    trainer = train(folder, folder / "with", [callback(folder)], batch=2)
    assert torch.distributed.get_world_size() == 2
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (without, trainer)]
    assert losses[0] == losses[1]
    resumed = train(folder, folder / "with", [callback(folder)], batch=2, resume=str(folder / "with" / "checkpoint-4"))
    live, again = (to_peft_state_dict(find_adapter(t.model).read()) for t in (trainer, resumed))
    assert all(torch.equal(live[key], again[key]) for key in live)
    assert_same_everywhere(live)


def in_lightning(folder: Path) -> None:
    """The same in Lightning's ``ddp``."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(name: str, callbacks: list, ckpt_path: Path | None = None):
        saving = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        pair = folder / "base", folder / "aligned"
        return fit(pair, folder, [*callbacks, saving], ckpt_path=ckpt_path, devices=2, strategy="ddp")

    without, trainer = run("without", []), run("with", [callback(folder)])
    assert torch.distributed.get_world_size() == 2
    assert trainer.losses == without.losses
    resumed = run("resumed", [callback(folder)], folder / "with/step=4.ckpt")
    twin = run("twin", [], folder / "without/step=4.ckpt")
    assert resumed.losses == twin.losses
    assert_same_everywhere(to_peft_state_dict(find_adapter(trainer.lightning_module).read()))


def run_on_two(function: str, folder: Path, module: str = "tests.test_processes") -> None:
    """Run ``python -m module function folder`` on two processes, and fail as it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", module, function, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ddp_in_the_trainer(tmp_path):
    saved_pair(tmp_path)
    run_on_two("in_the_trainer", tmp_path)
    for step in (4, 8):
        plain, ours = tmp_path / f"without/checkpoint-{step}", tmp_path / f"with/checkpoint-{step}"
        raw = load_file(ours / "csulora/raw_adapter.safetensors")
        before = load_file(plain / "adapter_model.safetensors")
        assert all(torch.equal(raw[key], before[key]) for key in raw)
        assert_same(load_file(ours / "adapter_model.safetensors"), by_one_process(tmp_path, raw))


@pytest.mark.slow
def test_ddp_in_lightning(tmp_path):
    saved_pair(tmp_path)
    run_on_two("in_lightning", tmp_path)
    for step in (2, 4, 6, 8):
        saved, raw = factors_in(tmp_path / f"with/step={step}.ckpt")
        assert_same(raw, factors_in(tmp_path / f"without/step={step}.ckpt")[0])
        assert_same(saved, by_one_process(tmp_path, raw))
        assert (tmp_path / f"with/step={step}.adapter/adapter_config.json").is_file()


def by_one_process(folder: Path, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The correction that a single process makes of the same raw factors."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder / "aligned"))
    corrector, adapter = callback(folder)._prepare(model, verbose=False), find_adapter(model)
    adapter.write(from_peft_state_dict(raw, list(adapter.layers), "raw"))
    return to_peft_state_dict(corrector.compute().corrected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"in_the_trainer": in_the_trainer, "in_lightning": in_lightning}[sys.argv[1]](Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
