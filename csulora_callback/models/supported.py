"""Which adapters can be corrected; the others are refused by module and kind."""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from csulora_callback.models.names import module_name

# Initializations that leave the base weights alone, so that s·B·A is the update relative to the aligned model. The
# others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of the base weight into the factors.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def check_kind(name: str, module: BaseTunerLayer) -> None:
    """Raise ``ValueError`` unless a PEFT layer is one of LoRA."""
    if not isinstance(module, LoraLayer):
        raise _unsupported(name, f"{type(module).__module__}.{type(module).__qualname__}")


def check_config(config: PeftConfig) -> None:
    """Raise ``ValueError`` unless the factors are the aligned model's update, and every module has its own name."""
    if config.init_lora_weights not in _PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"`model`: LoRA with init_lora_weights={config.init_lora_weights!r} is not supported: a part of the base "
            "weight lives in the factors, so they are not the update of the aligned model. "
            f"Use one of {_PLAIN_INITIALIZATIONS}."
        )
    if config.layer_replication:
        raise ValueError(
            "`model`: LoRA with layer_replication is not supported: the names of replicated layers no longer say "
            "which layer of the checkpoint they came from."
        )


def check_layer(name: str, module: LoraLayer, adapter: str) -> None:
    """Raise ``ValueError`` unless the layer's update is ``s·B·A`` and nothing else."""
    if module.merged:
        raise ValueError(f"module '{module_name(name)}': its adapter is merged. Call model.unmerge_adapter() first.")
    if module.use_dora.get(adapter):
        raise _unsupported(name, "DoRA (use_dora=True)")
    if adapter in module.lora_variant:
        raise _unsupported(name, type(module.lora_variant[adapter]).__name__)
    if module.lora_bias.get(adapter):
        raise _unsupported(name, "lora_bias=True")
    if adapter in module.lora_embedding_A:
        raise _unsupported(name, "LoRA on an embedding")
    if isinstance(module, ParamWrapper):
        raise _unsupported(name, "target_parameters")
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        raise _unsupported(name, f"LoRA on {type(module.get_base_layer()).__name__}")
    if isinstance(module, MultiheadAttention):
        raise _unsupported(name, "LoRA on nn.MultiheadAttention")


def check_nothing_else_trains(model: nn.Module, factors: set[int]) -> None:
    """Raise ``ValueError`` if a parameter is trainable whose ``id`` is not among those of the ``factors``."""
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in factors:
            continue
        for wrapper, module in wrappers.items():
            if name.startswith(f"{wrapper}."):
                raise _unsupported(wrapper, f"modules_to_save ({type(module).__name__})")
        raise _unsupported(name, "a parameter trained outside the LoRA factors")


def _unsupported(name: str, kind: str) -> ValueError:
    return ValueError(
        f"module '{module_name(name)}': {kind} is not supported by CSULoRA, and is not skipped in silence: its update "
        "would reach the checkpoint uncorrected. Train plain LoRA on Linear or Conv1D layers only."
    )
