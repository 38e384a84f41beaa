"""Lightning's promises on two processes over gloo, for every engine; each worker process runs this file."""

import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import Tokens, assert_same, live, saved, saved_pair
from tests.helpers.lightning import Module, callback, fit
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import assert_sharded, by_one_process, factors_of

WORKER = "tests.trainers.test_processes_lightning"
ENGINES = ("ddp", "fsdp2-sharded", "fsdp2-full", "fsdp2-unwrapped", "zero2", "zero3")


class Sharded(Module):
    """As Lightning documents FSDP2: the module shards itself."""

    def __init__(self, aligned: Path, layers: bool) -> None:
        super().__init__(aligned, late=True)
        self.layers = layers

    def configure_model(self) -> None:
        if self.network is None:
            super().configure_model()
            mesh = self.device_mesh["data_parallel"]
            if self.layers:
                for layer in self.network.base_model.model.model.layers:
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning asks for a CUDA GPU; DeepSpeed itself does not."""

    def setup_environment(self) -> None:
        self.parallel_devices = [torch.device("cpu", index) for index in range(2)]
        super(DeepSpeedStrategy, self).setup_environment()


def strategy(engine: str) -> Strategy | str:
    if engine.startswith("fsdp2"):
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=engine == "fsdp2-sharded")
    if engine.startswith("zero"):
        config = {
            # Otherwise parameters as small as these are not partitioned at all.
            "zero_optimization": {"stage": int(engine[4]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 4,
        }
        return DeepSpeedOnCPU(config=config, process_group_backend="gloo")
    return engine


class Probe(Callback):
    """At the start of each step: the live factors, and what the optimizer will step."""

    def __init__(self) -> None:
        self.seen = {}

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(12)  # the engines build their modules at different times: the same draws of dropout for all

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        adapter = find_adapter(pl_module)
        self.seen[trainer.global_step] = [to_peft_state_dict(read()) for read in (adapter.read, adapter.read_trained)]


class Validation(Callback):
    """The losses of the validations inside a fit."""

    def __init__(self) -> None:
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(trainer.callback_metrics["val_loss"].item())


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    files = pair / "base", pair / "aligned"

    def module() -> Module:
        if engine.startswith("fsdp2"):
            return Sharded(files[1], layers=engine != "fsdp2-unwrapped")
        return Module(files[1])

    def run(name: str, callbacks: list[Callback], ckpt_path: Path | None = None) -> L.Trainer:
        probe, validation = Probe(), Validation()
        saving = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        settings = {"devices": 2, "strategy": strategy(engine), "ckpt_path": ckpt_path}
        trainer = fit(files, folder, [*callbacks, probe, validation, saving], module(), **settings)
        assert torch.distributed.get_world_size() == 2
        assert_sharded(engine, trainer.lightning_module)
        trainer.probed, trainer.validated = probe.seen, validation.seen
        return trainer

    def ours(**settings) -> CSULoRACallback:
        return callback(files, cache_dir=pair / "cache", **settings)

    without, trainer = run("without", []), run("with", [ours()])
    assert trainer.losses == without.losses
    assert_same_steps(trainer.probed, without.probed)
    resumed = run("resumed", [ours()], folder / "with/step=4.ckpt")
    twin = run("twin", [], folder / "without/step=4.ckpt")
    assert resumed.losses == twin.losses
    assert resumed.probed.keys() == {4, 5, 6, 7}
    assert_same_steps(resumed.probed, twin.probed)
    stepped = run("steps", [ours(every_n_steps=3)])
    for values, trained in stepped.probed.values():
        assert_same(values, trained)  # the step is not lost on the optimizer's own copy
    shipped = live(trainer.lightning_module)

    evaluated = trainer.lightning_module
    if engine != "zero3":  # without an optimizer DeepSpeed 0.19 cannot load such a checkpoint, with or without us
        evaluated = module()
        settings = {"accelerator": "cpu", "devices": 2, "strategy": strategy(engine), "logger": False}
        data = DataLoader(Tokens(count=8, seed=4), 4)
        L.Trainer(**settings, callbacks=[ours()]).validate(evaluated, data, folder / "with/step=8.ckpt", verbose=False)
    report = {
        "losses": trainer.losses,
        "steps": stepped.losses,
        "validation": trainer.validated,
        "validation_without": without.validated,
    }
    validated = live(evaluated)
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
        torch.save({"shipped": shipped, "validated": validated}, folder / "live.pt")
        torch.save({step: values[0] for step, values in trainer.probed.items()}, folder / "raw.pt")


def assert_same_steps(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for step in left:
        for mine, other in zip(left[step], right[step], strict=True):
            assert_same(mine, other)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    saved_pair(folder)
    return folder


@pytest.fixture(scope="module")
def ddp(pair, tmp_path_factory):
    """The engine that the others are compared with, and the folder of its run."""
    folder = tmp_path_factory.mktemp("ddp")
    return run_worker(WORKER, "ddp", pair, folder), folder


def factors_in(engine: str, path: Path, whole: Path) -> dict[str, torch.Tensor]:
    """What is in the engine's own files, under the keys of a PEFT adapter."""
    if engine == "fsdp2-sharded":
        dcp_to_torch_save(path, whole)
        state = torch.load(whole)["state_dict"]
    elif engine == "zero2":
        state = torch.load(path / "checkpoint/mp_rank_00_model_states.pt", weights_only=False)["module"]
    else:
        state = torch.load(path)["state_dict"]
    return factors_of({key.removeprefix("network."): value for key, value in state.items()})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engine(engine, pair, ddp, tmp_path):
    report, output = ddp if engine == "ddp" else (run_worker(WORKER, engine, pair, tmp_path), tmp_path)
    trained, in_memory = torch.load(output / "raw.pt"), torch.load(output / "live.pt")
    for step in (2, 4, 6, 8):
        path = output / f"with/step={step}.ckpt"
        exported, sidecar = saved(path.with_suffix(".adapter")), Sidecar.load(path.with_suffix(".adapter"))
        raw = to_peft_state_dict(sidecar.raw)
        if step in trained:
            assert_same(raw, trained[step])
        assert_same(exported, by_one_process(pair, raw))
        if engine != "zero3":  # its files hold flat pieces of the optimizer's copy
            assert_same(factors_in(engine, path, tmp_path / f"{step}.pt"), exported)
    assert_same(in_memory["shipped"], exported)
    assert_same(in_memory["validated"], exported)
    for key, values in report.items():
        assert values == pytest.approx(ddp[0][key], rel=1e-4), key
    assert report["validation"] != pytest.approx(report["validation_without"], rel=1e-4)
    assert report["steps"] != pytest.approx(report["losses"], rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
