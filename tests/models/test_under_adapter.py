"""Where the full-precision weights under an adapter are, and what is said where there are none."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from csulora_callback import SafetySubspace
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.checkpoint import open_checkpoint
from csulora_callback.models.under_adapter import NoFullPrecision, weights_under
from tests.helpers import hub_cache
from tests.helpers.quantized import LOOKS, PackedLinear, packed


@pytest.mark.parametrize("kind", LOOKS)
def test_files_of_packed_weights_are_named_as_what_they_are(pair, tmp_path, kind):
    """GPTQ's on the disk: other names for the weights, and a config that says so."""
    config = AutoModelForCausalLM.from_pretrained(pair[1]).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model = packed(pair[1], kind)
    config.save_pretrained(tmp_path / "gptq")
    state = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    torch.save(
        {key: value for key, value in state.items() if ".lora_" not in key}, tmp_path / "gptq/pytorch_model.bin"
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gptq")
    with pytest.raises(NoFullPrecision) as refused:
        weights_under(find_adapter(model))
    message = str(refused.value)
    assert "6 of the 6 adapted layers are quantized" in message
    assert f"('model.layers.0.self_attn.q_proj': {kind.__name__} with {LOOKS[kind]})" in message
    assert f"so are the files in {tmp_path / 'gptq'} (packed, with {LOOKS[kind]}). Pass aligned_model=" in message
    with pytest.raises(ValueError, match=r"q_proj' is quantized \(packed, with .*qweight, .*unquantized checkpoint"):
        SafetySubspace.estimate(pair[0], tmp_path / "gptq", ["model.layers.0.self_attn.q_proj"], progress=False)


@pytest.mark.parametrize("source", [None, "no/such"])
def test_a_model_that_was_loaded_from_nowhere_is_refused(pair, monkeypatch, source):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = packed(pair[1], PackedLinear)
    model.peft_config["default"].base_model_name_or_path = source
    with pytest.raises(NoFullPrecision) as refused:
        weights_under(find_adapter(model))
    why = "its files cannot be had (no/such: not a local folder" if source else "the adapter's config names no checkp"
    assert why in str(refused.value)


def test_of_a_hub_id_the_revision_in_the_adapters_config_counts(pair, tmp_path, monkeypatch):
    hub_cache.keep(pair, tmp_path, monkeypatch)
    model = packed(pair[1], PackedLinear)
    config = model.peft_config["default"]
    config.base_model_name_or_path = hub_cache.NAME
    for revision, folder in zip((None, "v2"), pair, strict=True):
        config.revision = revision
        adapter = find_adapter(model)
        expected = open_checkpoint(folder).fingerprint(adapter.layers)
        assert weights_under(adapter).fingerprint(adapter.layers) == expected
