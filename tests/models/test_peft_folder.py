"""An adapter's folder as PEFT wrote it, with other factors in it."""

import torch
from safetensors.torch import load_file, save_file

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.peft_folder import write_with_factors
from tests.helpers.lab import tiny_llama, with_lora


def test_factors_take_the_places_of_those_that_are_there(tmp_path):
    """Under the keys of the file, as that of a compiled model has its own, and beside whatever else is in it."""
    model = with_lora(tiny_llama(), init_lora_weights=False)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/adapter_model.safetensors"
    state = {key.replace("model.layers", "_orig_mod.model.layers"): value for key, value in load_file(file).items()}
    save_file({**state, "embedding": torch.ones(2)}, file)
    doubled = {name: (2 * A, 2 * B) for name, (A, B) in find_adapter(model).read().items()}
    write_with_factors(tmp_path / "saved", doubled, tmp_path / "other", model.peft_config["default"])
    written = load_file(tmp_path / "other/adapter_model.safetensors")
    assert torch.equal(written.pop("embedding"), torch.ones(2))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], 2 * value) for key, value in state.items())
