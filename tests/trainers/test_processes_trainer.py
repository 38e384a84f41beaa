"""The Trainer's promises on two processes over gloo, for every engine; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from csulora_callback import CSULoRACallback, SafetyCorrector, SafetySubspace
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict, to_peft_state_dict
from tests.helpers.lab import PENALTY, RANK, TRAINING, Tokens, assert_same, live, raw, saved, saved_pair, with_lora
from tests.helpers.trl import words
from tests.helpers.two import leave, run_worker

WORKER = "tests.trainers.test_processes_trainer"
ENGINES = ("ddp", "fsdp2-full", "fsdp2-sharded", "fsdp2-unwrapped", "zero2", "zero3", "zero3-bf16", "zero3-no-gather")
ENGINES_OF_TRL = ("trl-ddp", "trl-fsdp2-full", "trl-zero3")


def arguments(
    engine: str, output: Path, kind: type[TrainingArguments] = TrainingArguments, **more
) -> TrainingArguments:
    """How a user asks for the engine; then what it takes to get it without a GPU."""
    settings = {
        **TRAINING,
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "bf16": False,  # SFTConfig's own default is True
        **more,
    }
    if engine.startswith("fsdp2"):
        state_dict = "SHARDED_STATE_DICT" if engine == "fsdp2-sharded" else "FULL_STATE_DICT"
        wrap = {} if engine == "fsdp2-unwrapped" else {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        policy = "NO_WRAP" if engine == "fsdp2-unwrapped" else "TRANSFORMER_BASED_WRAP"
        settings |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": policy,
                "state_dict_type": state_dict,
                "cpu_ram_efficient_loading": False,
                **wrap,
            },
        }
    elif engine.startswith("zero"):
        zero = {"stage": int(engine[4])}
        if engine.startswith("zero3"):
            # Otherwise parameters as small as these are not partitioned at all.
            zero |= {"stage3_param_persistence_threshold": 0}
            zero |= {"stage3_gather_16bit_weights_on_model_save": engine != "zero3-no-gather"}
        settings |= {
            "use_cpu": False,
            "bf16": engine == "zero3-bf16",
            "deepspeed": {
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "train_micro_batch_size_per_gpu": "auto",
                "train_batch_size": "auto",
                "gradient_accumulation_steps": "auto",
                "bf16": {"enabled": "auto"},
            },
        }
        # accelerate knows no backend for DeepSpeed on a CPU, and transformers no bfloat16; DeepSpeed knows both.
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.NO)
    made = kind(**settings)
    if engine.startswith("fsdp2"):
        # accelerate runs FSDP on CPU processes as DDP without a word, so that they have to pass for GPU ones.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


class Probe(TrainerCallback):
    """At the start of each step: the live factors, which are what training goes on from."""

    def __init__(self) -> None:
        self.seen = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        adapter = find_adapter(model)
        for values in (adapter.read(), adapter.read_trained()):
            self.seen.setdefault(state.global_step, []).append(to_peft_state_dict(values))


class SaveByHand(TrainerCallback):
    """Another callback that saves in the middle of training: raw weights are live, and only one process writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trainer = folder, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.trainer.save_model(str(self.folder))


def make(engine: str, model: torch.nn.Module, output: Path, callbacks: list, **more) -> Trainer:
    """The Trainer, or for ``trl-…`` an SFTTrainer with the same data, over the engine."""
    common = {"model": model, "callbacks": callbacks}
    data = Tokens(), Tokens(count=8, seed=4)
    if engine.startswith("trl-"):
        args = arguments(engine.removeprefix("trl-"), output, SFTConfig, **more)
        train, held_out = (Dataset.from_dict({"input_ids": part.tokens.tolist()}) for part in data)
        return SFTTrainer(**common, args=args, train_dataset=train, eval_dataset=held_out, processing_class=words())
    return Trainer(**common, args=arguments(engine, output, **more), train_dataset=data[0], eval_dataset=data[1])


def train(engine: str, pair: Path, output: Path, callbacks: list, resume: Path | None = None, **more) -> Trainer:
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"))
    if engine == "zero3-bf16":
        model = model.to(torch.bfloat16)
    trainer = make(engine, model, output, callbacks, **more)
    for by_hand in callbacks:
        if isinstance(by_hand, SaveByHand):
            by_hand.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert torch.distributed.get_world_size() == 2
    assert_sharded(engine.removeprefix("trl-"), trainer.model)
    return trainer


def assert_sharded(engine: str, model: torch.nn.Module) -> None:
    """Each process really holds a part only, or the engine is not the one that is tested."""
    adapter = find_adapter(model)
    adapter.read()  # brings back in place what an evaluation left whole
    layer = next(iter(adapter.layers.values()))
    weight = layer.module.get_base_layer().weight
    for parameter in (layer.lora_A, layer.lora_B, weight):
        if engine.startswith("fsdp2"):
            assert isinstance(parameter, torch.distributed.tensor.DTensor)
            assert parameter.to_local().numel() < parameter.numel()
        elif engine.startswith("zero3"):
            assert parameter.numel() == 0
            assert parameter.ds_tensor.numel() < parameter.ds_numel
        elif engine == "zero2" and parameter is not weight:
            assert hasattr(parameter, "_hp_mapping")


def callback(pair: Path, **settings) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair / "base", rank=RANK, penalty=PENALTY, cache_dir=pair / "cache", **settings)


def logged(trainer: Trainer, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    probe, plain_probe = Probe(), Probe()
    without = train(engine, pair, folder / "without", [plain_probe])
    trainer = train(engine, pair, folder / "with", [callback(pair), probe, SaveByHand(folder / "by-hand")])
    assert logged(trainer, "loss") == logged(without, "loss")
    assert probe.seen.keys() == plain_probe.seen.keys()
    for step, (values, trained) in probe.seen.items():
        assert_same(values, plain_probe.seen[step][0])
        assert_same(trained, plain_probe.seen[step][1])

    shipped = live(trainer.model)

    again = Probe()
    train(engine, pair, folder / "with", [callback(pair), again], folder / "with" / "checkpoint-4")
    assert again.seen.keys() == {4, 5, 6, 7}
    for step, (values, trained) in again.seen.items():
        assert_same(values, probe.seen[step][0])
        assert_same(trained, probe.seen[step][1])

    # The largest loss is the "best" one, so that it is not the last.
    settings = {"load_best_model_at_end": True, "greater_is_better": True, "save_steps": 2, "max_steps": 6}
    chosen = train(engine, pair, folder / "best", [callback(pair)], **settings)
    best = live(chosen.model)

    in_steps = Probe()
    stepped = train(engine, pair, folder / "steps", [callback(pair, every_n_steps=3), in_steps])
    for values, trained in in_steps.seen.values():
        if engine != "zero3-bf16":
            assert_same(values, trained)  # the step is not lost on the optimizer's own copy
    report = {
        "eval": logged(trainer, "eval_loss"),
        "eval_without": logged(without, "eval_loss"),
        "steps": logged(stepped, "loss"),
        "without": logged(without, "loss"),
        "drift": logged(trainer, "csulora/relative_change"),
        "best": chosen.state.best_global_step,
    }
    for values in (shipped, best, *(probe.seen[step][0] for step in probe.seen)):
        for tensor in values.values():
            both = [torch.empty_like(tensor) for _ in range(2)]
            torch.distributed.all_gather(both, tensor)
            assert torch.equal(*both)
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
        torch.save({step: values[0] for step, values in probe.seen.items()}, folder / "raw.pt")
        torch.save({"last": shipped, "best": best}, folder / "shipped.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    saved_pair(folder)
    return folder


def by_one_process(pair: Path, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The correction that a single process makes of the same raw factors."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair / "aligned"))
    dtype = next(iter(factors.values())).dtype
    adapter = find_adapter(model.to(dtype))
    subspace = SafetySubspace.estimate(pair / "base", model, list(adapter.layers), rank=RANK, progress=False)
    adapter.write(from_peft_state_dict(factors, list(adapter.layers), "raw"))
    return to_peft_state_dict(SafetyCorrector(model, subspace, PENALTY).compute().corrected)


@pytest.fixture(scope="module")
def ddp(pair, tmp_path_factory):
    """The engine that the others are compared with, and the folder of its run."""
    folder = tmp_path_factory.mktemp("ddp")
    return run_worker(WORKER, "ddp", pair, folder), folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*ENGINES, *ENGINES_OF_TRL])
def test_engine(engine, pair, ddp, tmp_path):
    report, output = ddp if engine == "ddp" else (run_worker(WORKER, engine, pair, tmp_path), tmp_path)
    trained, shipped = torch.load(output / "raw.pt"), torch.load(output / "shipped.pt")
    for folder in (output / "with/checkpoint-4", output / "with/checkpoint-8"):
        checkpoint = adapter_in(engine, folder, tmp_path / "whole.pt")
        assert_same(checkpoint, by_one_process(pair, raw(folder)))
    assert_same(raw(output / "with/checkpoint-4"), trained[4])
    assert_same(shipped["last"], checkpoint)
    best = report.pop("best")
    assert best < 6  # otherwise loading the best one would show nothing
    assert_same(shipped["best"], adapter_in(engine, output / f"best/checkpoint-{best}", tmp_path / "whole.pt"))
    if engine not in ("fsdp2-sharded", "zero3-no-gather"):  # there the Trainer saves no adapter by hand
        assert_same(saved(output / "by-hand"), by_one_process(pair, trained[3]))
        assert_same(raw(output / "by-hand"), trained[3])
    if engine in ("fsdp2-full", "trl-fsdp2-full", "fsdp2-unwrapped"):
        assert_same(factors_of(torch.load(folder / "pytorch_model_fsdp.bin")), checkpoint)
    if engine == "zero2":
        file = folder / "global_step8/mp_rank_00_model_states.pt"
        assert_same(factors_of(torch.load(file, weights_only=False)["module"]), checkpoint)

    assert report["eval"] != pytest.approx(report["eval_without"], rel=1e-4)
    assert report["steps"] != pytest.approx(report["without"], rel=1e-4)
    if engine == "zero3-bf16" or engine in ENGINES_OF_TRL:
        return  # other numbers than the Trainer's in float32
    for key, values in report.items():
        assert values == pytest.approx(ddp[0][key], rel=1e-4), key


def adapter_in(engine: str, folder: Path, whole: Path) -> dict[str, torch.Tensor]:
    """The adapter that a checkpoint ships; ``whole`` is where shards are put together."""
    return from_shards(folder / "pytorch_model_fsdp_0", whole) if engine == "fsdp2-sharded" else saved(folder)


def factors_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".default.", "."): value for key, value in state.items() if ".lora_" in key}


def from_shards(folder: Path, whole: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, whole)
    return factors_of(torch.load(whole)["model"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
