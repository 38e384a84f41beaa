"""Which engines a run may use, and what each of them saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies import Strategy
    from transformers import Trainer as BaseTrainer
    from transformers import TrainingArguments


def refuse_engine() -> None:
    """Refuse accelerate's engines whose parameters the correction cannot reach."""
    state = AcceleratorState()
    if state.distributed_type == DistributedType.MEGATRON_LM or (
        state.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version == 1
    ):
        raise ValueError(
            "`args`: CSULoRACallback runs on one process, with DDP, FSDP2 or DeepSpeed, but this Trainer uses "
            f"{state.distributed_type.value}{' version 1: set fsdp_config version to 2' if _is_fsdp() else ''}."
        )


def refuse_engine_of_generation(args: TrainingArguments) -> None:
    """Refuse TRL's vLLM beside corrected evaluations: it keeps the weights that it got for one for the next step."""
    if vars(args).get("use_vllm") and args.eval_strategy != "no":
        raise ValueError(
            "`evaluate_corrected`: expected False with use_vllm=True and evaluations, but got True: TRL loads weights "
            "into vLLM once a step, so that those of an evaluation would be trained on. Set evaluate_corrected=False."
        )


def _is_fsdp() -> bool:
    return AcceleratorState().distributed_type == DistributedType.FSDP


def saves_shards_only() -> bool:
    """Whether checkpoints hold the model's shards and no adapter: the Trainer does not call save_pretrained then."""
    return _is_fsdp() and "FULL_STATE_DICT" not in str(AcceleratorState().fsdp_plugin.state_dict_type)


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse Lightning's strategies whose parameters the correction cannot reach."""
    if is_kind(trainer.strategy, "FSDPStrategy", "XLAFSDPStrategy"):
        raise ValueError(
            f"`strategy`: CSULoRACallback runs on one device, with ddp, ModelParallelStrategy (FSDP2) or DeepSpeed, "
            f"but this Trainer uses {type(trainer.strategy).__name__}, whose flat parameters hold no whole factors. "
            "Use ModelParallelStrategy and fully_shard in configure_model."
        )


def is_kind(instance: Strategy | Callback | BaseTrainer, *names: str) -> bool:
    """Whether it is one of these, by name: Lightning has two import names, and nothing here imports it, or TRL."""
    return any(kind.__name__ in names for kind in type(instance).__mro__)
