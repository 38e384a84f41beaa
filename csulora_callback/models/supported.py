"""Which adapters can be corrected; the others are refused by module and kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from csulora_callback.models.names import module_name
from csulora_callback.models.sharding import full_shape

# Initializations that leave the base weights alone, so that s·B·A is the update relative to the aligned model. The
# others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of the base weight into the factors.
_PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")

# Of these others, what PEFT converts to plain LoRA when it saves.
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")

# What to do about each, where a user need not have set it.
TRAINABLE_TOKENS = (
    "Train rows of new tokens only, which have nothing to drift from, or the whole embedding by modules_to_save, "
    "which can be corrected. TRL sets that option by itself where `chat_template_path` names a tokenizer."
)
MODULES_TO_SAVE = (
    "What can be corrected of modules_to_save is the one matrix of a Linear layer without bias, or of an embedding; "
    "what the aligned model has not passes. Leave it out."
)
_KNOWINGLY = "Or let it pass as it is trained, listed as not corrected: uncorrected=[{name!r}]."


# Options of a LoraConfig whose update is not s·B·A of the modules that it names, and what to do about each.
_OPTIONS = {
    "use_dora": "DoRA scales each row of the whole weight to a trained length. Train with use_dora=False.",
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ),
        "Leave that option out.",
    ),
}


def check_tuner(config: PeftConfig, argument: str = "model") -> None:
    """Raise ``ValueError`` unless a config of PEFT is one of LoRA."""
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`{argument}`: expected an adapter of LoraConfig, but got one of {type(config).__name__}, whose update "
            "is not s·B·A and would reach the checkpoint uncorrected. Train with peft.LoraConfig instead."
        )


def check_kind(name: str, module: BaseTunerLayer) -> None:
    """Raise ``ValueError`` unless a PEFT layer is one of LoRA."""
    if not isinstance(module, LoraLayer):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise _unsupported(name, kind, "Train with peft.LoraConfig instead.")


def check_config(config: PeftConfig, argument: str = "model") -> None:
    """Raise ``ValueError`` unless the factors are the aligned model's update, and every module has its own name."""
    check_tuner(config, argument)
    start = config.init_lora_weights
    if (start.lower() if isinstance(start, str) else bool(start)) not in _PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"`{argument}`: LoRA with init_lora_weights={start!r} is not supported: a part of the base "
            "weight lives in the factors, so they are not the update of the aligned model. "
            f"Use one of {_PLAIN_INITIALIZATIONS}.{_conversion(start)}"
        )
    if config.ensure_weight_tying and config.target_modules_to_tie:
        raise tied(argument)
    if config.layer_replication:
        raise ValueError(
            f"`{argument}`: LoRA with layer_replication is not supported: the names of replicated layers no longer "
            "say which layer of the checkpoint they came from. Leave that option out."
        )


def _conversion(start: str) -> str:
    """Where PEFT can make plain LoRA of an initialization, the lines that do."""
    if not start.lower().startswith(_CONVERTED):
        return ""
    return (
        " Or correct it after training, as plain LoRA of twice the rank, which PEFT makes of it: "
        "model.save_pretrained('start') before training, model.save_pretrained('plain', "
        "path_initial_model_for_weight_conversion='start') after it, and csulora correct plain -o safe."
    )


def tied(argument: str) -> ValueError:
    """What to raise where PEFT trains LoRA of an embedding and of the output layer in the same memory."""
    return ValueError(
        f"`{argument}`: LoRA on an embedding with ensure_weight_tying=True is not supported: the output layer trains "
        "in the memory of the embedding's factors, and each would undo the other's correction. Set "
        "ensure_weight_tying=False, which adapts the embedding alone."
    )


def check_layer(name: str, module: LoraLayer, adapter: str) -> None:
    """Raise ``ValueError`` unless the layer's update is ``s·B·A`` and nothing else, with a finite ``s``."""
    leave_out = (
        "Leave it out of target_modules: Linear, Conv1D and Embedding layers are those whose LoRA can be corrected."
    )
    if module.merged:
        raise ValueError(f"module '{module_name(name)}': its adapter is merged. Call model.unmerge_adapter() first.")
    if module.use_dora.get(adapter):
        raise _unsupported(name, "DoRA (use_dora=True)", _OPTIONS["use_dora"])
    if adapter in module.lora_variant:
        kind = f"a variant of LoRA ({type(module.lora_variant[adapter]).__name__})"
        raise _unsupported(name, kind, "Leave out the option of the LoraConfig that asks for it.")
    if adapter in module.lora_embedding_A:
        if module.get_base_layer().max_norm is not None:
            kind = "LoRA on an embedding with max_norm, which rescales weight and factors in every forward pass,"
            raise _unsupported(name, kind, "Leave it out of target_modules, or make it with max_norm=None.")
    elif isinstance(module, ParamWrapper) and (why := _no_weight(module)) is not None:
        kind = f"LoRA on its parameter '{module.parameter_name}', {why},"
        raise _unsupported(name, kind, "Leave it out of the LoraConfig's target_parameters.")
    elif adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        raise _unsupported(name, f"LoRA on {type(module.get_base_layer()).__name__}", leave_out)
    if isinstance(module, MultiheadAttention):
        raise _unsupported(name, "LoRA on nn.MultiheadAttention", leave_out)
    if not math.isfinite(module.scaling[adapter]):
        raise ValueError(
            f"module '{module_name(name)}': `lora_alpha`: expected a finite number, but got "
            f"{module.lora_alpha[adapter]!r}, which makes the scaling of its update {module.scaling[adapter]}. "
            "Set another lora_alpha or alpha_pattern in the LoraConfig."
        )


def _no_weight(module: ParamWrapper) -> str | None:
    """Why a parameter is not the weight of a module, or those of experts; ``None`` if it is."""
    shape = full_shape(module.get_param())
    if len(shape) == 2:
        return None if module.parameter_name == "weight" else "a matrix that is not its weight"
    return None if shape[0] > 1 else "a stack of one matrix"


def check_nothing_else_trains(model: nn.Module, factors: set[int]) -> None:
    """Raise ``ValueError`` if a parameter is trainable whose ``id`` is not among those of the ``factors``."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in factors:
            continue
        if ".lora_" in name or ".modules_to_save." in name:
            kind, remedy = "a second adapter that is trained", "Train one at a time: model.set_adapter(name)."
            raise _unsupported(name, kind, remedy)
        if name.endswith(".bias"):
            raise not_beside(name, "a bias that is trained", "Set bias='none' in the LoraConfig, or freeze it.")
        kind, remedy = "a parameter trained outside the LoRA factors", "Freeze it: requires_grad_(False)."
        raise not_beside(name, kind, remedy)


def not_beside(name: str, kind: str, remedy: str) -> ValueError:
    """What to raise where something cannot be corrected that is trained beside LoRA, and may pass knowingly.

    Example:
        >>> str(not_beside("q_proj.bias", "a bias that is trained", "Freeze it.")).rpartition("listed ")[2]
        "as not corrected: uncorrected=['q_proj.bias']."
    """
    return _unsupported(name, kind, f"{remedy} {_KNOWINGLY.format(name=module_name(name))}")


def check_options(options: Mapping[str, object]) -> None:
    """Raise ``ValueError`` unless a saved config of LoRA, whichever PEFT wrote it, asks for ``s·B·A``.

    What it asks for beside that, its tensors tell.

    Example:
        >>> check_options({"r": 8, "use_dora": False, "bias": "none"})
        >>> check_options({"use_dora": True})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `adapter`: LoRA with use_dora=True is not supported by CSULoRA: its update would pass ...
    """
    for option, remedy in _OPTIONS.items():
        if options.get(option):
            raise _not_from_file(option, options[option], remedy)


def check_tensors(state: Mapping[str, Tensor], factors: Iterable[str], source: str) -> list[str]:
    """Keys of what a saved adapter holds beside its factors: resized embeddings, and nothing else.

    Args:
        state: PEFT's state dict.
        factors: the keys of factors in it.
        source: the file, for messages.

    Raises:
        ValueError: if a factor is no matrix, or there is something beside them that would pass uncorrected.

    Example:
        >>> import torch
        >>> state = {"lm_head.weight": torch.ones(9, 4), "q.lora_A.weight": torch.ones(1, 4)}
        >>> check_tensors(state, ["q.lora_A.weight"], "adapter_model.safetensors")
        ['lm_head.weight']
    """
    factors = set(factors)
    for key in factors & state.keys():
        if state[key].ndim != (1 if key.endswith(".bias") else 2):
            raise _unsupported(key.partition(".lora_")[0], "LoRA on a convolution", "Leave it out of target_modules.")
    others = [key for key in state if key not in factors]
    for key in others:
        for part, (kind, remedy) in _TENSORS.items():
            if part in key:
                raise _unsupported(key.partition(part)[0], kind, remedy)
    # PEFT takes the input and output embeddings along where they were resized. They lie outside of numbered layers.
    tables = {key.removesuffix(".weight"): state[key] for key in others if key.endswith(".weight")}
    inner = [name for name in tables if any(part.isdigit() for part in name.split("."))]
    rows = {name: len(table) for name, table in tables.items() if table.ndim == 2 and name not in inner}
    biases = {key for key in others if rows.get(key.removesuffix(".bias")) == state[key].numel()}
    unknown = sorted(set(others) - {f"{name}.weight" for name in rows} - biases)
    if not unknown and (len(rows) > 2 or len({tables[name].shape for name in rows}) > 1):
        unknown = sorted(f"{name}.weight" for name in rows)
    if unknown:
        raise ValueError(
            f"{source}: expected LoRA factors, and at most the model's embeddings beside them, but got {unknown[0]!r} "
            f"{tuple(state[unknown[0]].shape)}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}. What is "
            "neither would pass uncorrected: take it out, or train without it."
        )
    return others


_TENSORS = {
    ".lora_magnitude_vector": ("DoRA (use_dora=True)", _OPTIONS["use_dora"]),
    ".token_adapter": ("the option trainable_token_indices", TRAINABLE_TOKENS),
    ".modules_to_save": ("modules_to_save", MODULES_TO_SAVE),
    ".lora_": ("a variant of LoRA", "Train with plain peft.LoraConfig instead."),
}


def _not_from_file(option: str, value: object, remedy: str) -> ValueError:
    return ValueError(
        f"`adapter`: LoRA with {option}={value!r} is not supported by CSULoRA: its update would pass uncorrected. "
        f"{remedy}"
    )


def _unsupported(name: str, kind: str, remedy: str) -> ValueError:
    return ValueError(
        f"module '{module_name(name)}': {kind} is not supported by CSULoRA, and is not skipped in silence: its update "
        f"would reach the checkpoint uncorrected. {remedy}"
    )
