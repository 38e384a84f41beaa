"""Engines that the correction cannot reach, or that would carry it into training, are refused by name."""

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from csulora_callback import CSULoRACallback
from csulora_callback.trainers.engines import refuse_engine_of_generation
from tests.helpers.lab import make_trainer, with_lora

ENGINES = {
    "Megatron": ({}, "with DDP, FSDP2 or DeepSpeed, but this Trainer uses MEGATRON_LM"),
    "flat FSDP": ({"fsdp_version": 1}, "this Trainer uses FSDP version 1: set fsdp_config version to 2"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_engines_that_the_correction_cannot_reach_are_refused(pair, tmp_path, monkeypatch, case):
    plugin, message = ENGINES[case]
    callback = CSULoRACallback(base_model=pair[0])
    trainer = make_trainer(with_lora(AutoModelForCausalLM.from_pretrained(pair[1])), tmp_path, [callback])
    # On a CPU accelerate runs FSDP as DDP and has no Megatron: the state says what it would say with a GPU.
    kind = DistributedType.FSDP if plugin else DistributedType.MEGATRON_LM
    for state in (PartialState, AcceleratorState):
        monkeypatch.setitem(state._shared_state, "distributed_type", kind)
    if plugin:
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", FullyShardedDataParallelPlugin(**plugin))
    with pytest.raises(ValueError, match=message):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_vllm_would_train_on_the_weights_of_an_evaluation(tmp_path):
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    with pytest.raises(ValueError, match="`evaluate_corrected`: expected False with use_vllm=True"):
        refuse_engine_of_generation(GRPOConfig(**settings, use_vllm=True, eval_strategy="steps", eval_steps=2))
    refuse_engine_of_generation(GRPOConfig(**settings, use_vllm=True))
    refuse_engine_of_generation(GRPOConfig(**settings, eval_strategy="steps", eval_steps=2))


def test_it_is_refused_before_training_starts(pair, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    trainer = make_trainer(model, tmp_path, [CSULoRACallback(base_model=pair[0])], eval_strategy="steps", eval_steps=2)
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match="use_vllm=True"):
        trainer.train()
    trainer.args.use_vllm = False
    trainer.train()
