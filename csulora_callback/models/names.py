"""What a module is called, whatever it is wrapped in."""

from __future__ import annotations

import re

_DDP = re.compile(r"^(?:_orig_mod\.)?module\.")  # compiled or not
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|base_layer)(?:\.|$)")


def module_name(raw: str) -> str:
    """The name of a module as in the model without wrappers (PEFT, ``torch.compile``, DDP, FSDP).

    Example:
        >>> module_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
        'model.layers.0.self_attn.q_proj'
        >>> module_name("_orig_mod.base_model.model.lm_head")
        'lm_head'
    """
    name = _WRAPPERS.sub("", _DDP.sub("", raw)).rstrip(".")
    # A PeftModel may itself sit inside another module (a LightningModule, say): its inside is what has the name.
    return name.rpartition("base_model.model.")[2]
