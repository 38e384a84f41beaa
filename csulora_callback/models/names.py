"""What a module is called, whatever it is wrapped in."""

from __future__ import annotations

import re

_BIAS = ".bias"
_DDP = re.compile(r"^(?:_orig_mod\.)?module\.")  # compiled or not
_NUMBER = re.compile(r"(?:(?<=^)|(?<=\.))[0-9]+(?=\.|$)")
_EXPERT = re.compile(r"\[([0-9]+)\]$")
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|base_layer|original_module|token_adapter)(?:\.|$)"
)


def module_name(raw: str) -> str:
    """The name of a module as in the model without wrappers (PEFT, ``torch.compile``, DDP, FSDP).

    Example:
        >>> module_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
        'model.layers.0.self_attn.q_proj'
        >>> module_name("_orig_mod.base_model.model.lm_head")
        'lm_head'
        >>> module_name("base_model.model.lm_head.original_module")
        'lm_head'
    """
    name = _WRAPPERS.sub("", _DDP.sub("", raw)).rstrip(".")
    # A PeftModel may itself sit inside another module (a LightningModule, say): its inside is what has the name.
    return name.rpartition("base_model.model.")[2]


def bias_name(module: str) -> str:
    """What the update of a module's bias is called, which has factors of its own.

    Example:
        >>> bias_name("model.layers.0.self_attn.q_proj")
        'model.layers.0.self_attn.q_proj.bias'
    """
    return f"{module}{_BIAS}"


def owner_of_bias(name: str) -> str | None:
    """The module whose bias that is; ``None`` where it is the name of a module.

    Example:
        >>> owner_of_bias("q_proj.bias"), owner_of_bias("q_proj")
        ('q_proj', None)
    """
    return name.removesuffix(_BIAS) if name.endswith(_BIAS) else None


def expert_name(parameter: str, number: int) -> str:
    """What one expert of a fused parameter is called, as a module of its own.

    Example:
        >>> expert_name("mlp.experts.gate_up_proj", 7)
        'mlp.experts.gate_up_proj[7]'
    """
    return f"{parameter}[{number}]"


def fused_parameter(name: str) -> tuple[str, int | None]:
    """The fused parameter that a module is an expert of, and which; any other module's name as it is, and ``None``.

    Example:
        >>> fused_parameter("mlp.experts.gate_up_proj[7]"), fused_parameter("self_attn.q_proj")
        (('mlp.experts.gate_up_proj', 7), ('self_attn.q_proj', None))
    """
    found = _EXPERT.search(name)
    return (name, None) if found is None else (name[: found.start()], int(found[1]))


def layer_and_kind(name: str) -> tuple[str, str]:
    """The layer that a module lies in, and what it is there; of a module outside all layers the first is empty.

    Of the numbers in a name the first counts: others, as of experts, are no layers, and their modules are of one kind.

    Example:
        >>> layer_and_kind("model.layers.11.self_attn.q_proj")
        ('model.layers.11', 'self_attn.q_proj')
        >>> layer_and_kind("model.layers.0.mlp.experts.3.up_proj")
        ('model.layers.0', 'mlp.experts.*.up_proj')
        >>> layer_and_kind("model.layers.0.mlp.experts.gate_up_proj[7]")
        ('model.layers.0', 'mlp.experts.gate_up_proj[*]')
        >>> layer_and_kind("lm_head")
        ('', 'lm_head')
    """
    name = _EXPERT.sub("[*]", name)
    found = _NUMBER.search(name)
    if found is None or found.end() == len(name):  # a number alone, as in nn.Sequential, is the module itself
        return "", name
    return name[: found.end()], _NUMBER.sub("*", name[found.end() + 1 :])
