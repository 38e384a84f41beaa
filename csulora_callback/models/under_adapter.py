"""The weights that an adapter sits on, in full precision: in memory, or where those are quantized in their files."""

from __future__ import annotations

import os

from torch import nn

from csulora_callback.models.adapters import Adapter
from csulora_callback.models.checkpoint import Checkpoint, open_checkpoint
from csulora_callback.models.layout import Layout


class NoFullPrecision(ValueError):
    """The model in memory is quantized, and the files that it was loaded from are of no use, either."""


def weights_under(adapter: Adapter) -> nn.Module | Checkpoint:
    """The model in memory, or the checkpoint that it was loaded from where any adapted layer is quantized.

    What quantizing rounds away would count as displacement. Reads no weights, and is not collective.

    Raises:
        NoFullPrecision: if a layer is quantized and the adapter's config names no checkpoint, that cannot be had, or
            is quantized too.
        ValueError: if its files are corrupt, or lack a layer.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from csulora_callback.models.adapters import find_adapter
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> weights_under(find_adapter(model)) is model
        True
    """
    stored = quantized_layers(adapter)
    if not stored:
        return adapter.holder
    source = adapter.config.base_model_name_or_path
    if not source:
        raise _unavailable(adapter, stored, "the adapter's config names no checkpoint")
    try:
        # transformers does not keep which revision it loaded; PEFT takes this one, too, when it loads the adapter.
        files = open_checkpoint(source, revision=None if os.path.isdir(source) else adapter.config.revision)
    except FileNotFoundError as error:
        raise _unavailable(adapter, stored, f"its files cannot be had ({error})") from error
    layout = Layout.of(adapter.holder)
    checkpoint = files.named_as(adapter.matrices, layout)
    for name in adapter.matrices:
        found = checkpoint.storage(name)
        if found is not None:
            raise _unavailable(adapter, stored, f"so are the files in {checkpoint.source} ({found})")
    return checkpoint.require(adapter.matrices, layout)


def quantized_layers(adapter: Adapter) -> dict[str, str]:
    """How the weights under an adapter are stored, by module, of those that are quantized."""
    stored = {name: layer.storage for name, layer in adapter.matrices.items()}
    return {name: how for name, how in stored.items() if how is not None}


def _unavailable(adapter: Adapter, stored: dict[str, str], why: str) -> NoFullPrecision:
    name, how = next(iter(stored.items()))
    return NoFullPrecision(
        f"`aligned_model`: expected the aligned weights in full precision, but {len(stored)} of the "
        f"{len(adapter.matrices)} adapted layers are quantized ('{name}': {how}), and {why}. Pass "
        "aligned_model='org/model', the folder or Hub id of the checkpoint that was quantized."
    )
