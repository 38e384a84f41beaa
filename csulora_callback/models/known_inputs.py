"""What enters adapted modules whose input follows from the texts alone: no model has to read them for that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from csulora_callback.models.adapters import Adapter
from csulora_callback.models.names import owner_of_bias
from csulora_callback.models.parts import AdaptedEmbedding
from csulora_callback.models.reading import Rows


def known_inputs(adapter: Adapter, embedding: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """By name: of biases one, and of the embedding of tokens how often it gets each of them ``(num_embeddings,)``.

    All tokens of the texts count there, where of other modules some vectors are drawn.

    Args:
        adapter: of the model.
        embedding: what the model puts its ``input_ids`` into.
        rows: token ids.

    Raises:
        ValueError: if another embedding is adapted, such as one of positions.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from csulora_callback.models.adapters import find_adapter
        >>> model = get_peft_model(nn.Sequential(nn.Embedding(4, 2)), LoraConfig(r=1, target_modules=["0"]))
        >>> known_inputs(find_adapter(model), model.base_model.model[0], [[3, 1], [3]])
        {'0': tensor([0., 1., 0., 2.])}
    """
    known = {}
    for name, layer in adapter.layers.items():
        if owner_of_bias(name) is not None:
            known[name] = torch.ones(1, 1, dtype=torch.bfloat16, device="cpu")
        elif isinstance(layer, AdaptedEmbedding):
            if layer.module is not embedding:
                raise ValueError(
                    f"module '{name}': a data-aware penalty has to know what an embedding reads, and knows it of the "
                    "one of tokens alone. Leave this one out of target_modules, or use another penalty."
                )
            ids = torch.cat([torch.as_tensor(row, device="cpu") for row in rows])
            known[name] = torch.bincount(ids, minlength=layer.shape[2]).float()
    return known
