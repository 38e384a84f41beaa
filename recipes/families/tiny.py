"""A config of any family in which everything is tiny: its class's defaults, with sizes by what their names say."""

from __future__ import annotations

import re
from itertools import count

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, HEADS, HEAD, INNER = 32, 4, 8, 48  # the width of a model is that of its heads together
VOCABULARY, SPECIAL, POSITIONS = 64, 32, 64  # texts are made of the tokens from SPECIAL on

# What a whole number of a config is at most, by its name, the first pattern that matches; others stay as they are.
_SIZES = {
    r".*vocab_size(_per_layer_input)?": VOCABULARY,
    r".*(experts_per_tok(en)?|moe_topk|moe_k|top_k)": 2,
    r"(n_group|topk_group|num_expert_group)|.*(n|num)_(shared|zero)_experts?": 1,
    r"num_.*experts|n_routed_experts|moe_num_experts": 4,
    r".*(key_value_heads|kv_heads|kv_n_heads|query_groups|num_key_heads)": 2,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 2 * HEADS,  # Mamba's inner width is twice the model's
    r".*heads|n_head": HEADS,
    r"qk_head_dim": 2 * HEAD,  # one half with positions and one without
    r".*(head_dim|head_size|d_kv|kv_channels|d_head|headdim|dim_head)|.*lora_rank|rotary_dim": HEAD,
    r".*(intermediate|ffn|feed_forward|mlp).*(size|dim)(_mlp)?|n_inner|d_ff|dff|d_inner|dim_ff": INNER,
    r".*(num_kv_shared|first_k_dense|nextn).*": 0,
    r".*(hidden_sizes?|d_model|n_embd|embed_dims?|embedding_(size|dim)|hidden_dim|width)|dim|emb_dim": HIDDEN,
    r".*(position_embeddings|positions|max_seq_len|model_max_length|n_ctx|context_length)": POSITIONS,
    r".*(layers?|depths?|num_blocks|block_repeats)": 2,
    r"image_size": 32,
    r"patch_size": 8,
}
_LAYERS = r"num_hidden_layers|n_layers?|num_layers"
# Of these the model has sections of rotary positions by default, and not the config.
_SECTIONED = r"(qwen2.*_vl|glm\w*v(_moe)?|glm_ocr|paddleocr_vl|qwen2_5_omni)_text"
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}

# What the rules above cannot know.
_OVERRIDES: dict[str, dict] = {
    # The second of two layers is one of attention, the first one of Mamba.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    # Heads that have to make up Mamba's inner width.
    "mamba2": {"num_heads": 2 * HEADS},
    "falcon_h1": {"mamba_n_heads": 2 * HEADS, "mamba_d_ssm": 2 * HIDDEN},
    # The defaults leave open how many there are.
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCABULARY},
    "nemotron": {"num_key_value_heads": HEADS},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    # What each layer is, in words of their own.
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    # Positions in two factors, which add up to the width.
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, HIDDEN - 8]},
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Of a family by its ``model_type``.

    Raises:
        Exception: whatever transformers raises, of a config without defaults or whose parts no longer fit together.

    Example:
        >>> config = tiny_config("llama")
        >>> config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size
        (32, 2, 4, 64)
    """
    default = CONFIG_MAPPING[family]()
    return type(default)(**{**_shrunk(default, count(len(_TOKENS))), **_OVERRIDES.get(family, {})})


def _shrunk(config: PreTrainedConfig, ids: count) -> dict[str, object]:
    """What is to differ from ``config``, by name; ``ids`` are those of special tokens, each another one."""
    values, layers = vars(config), _kinds_of_layers(config)
    small: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = {**_shrunk(value, ids), "model_type": value.model_type}
        elif re.fullmatch(r"[^_].*token_(id|index)", name) and (value is not None or name == "pad_token_id"):
            small[name] = _TOKENS[name] if name in _TOKENS else next(ids)
        elif type(value) is int and re.fullmatch(_LAYERS, name):
            small[name] = len(layers)
        elif not name.startswith("_"):
            small[name] = _small(name, value, config, layers)
    if config.is_encoder_decoder:
        small |= {name: _TOKENS[name] for name in ("decoder_start_token_id", "pad_token_id")}
    return {name: value for name, value in small.items() if name not in values or value != values[name]}


def _small(name: str, value: object, config: PreTrainedConfig, layers: list[int]) -> object:
    if type(value) is int and name.endswith("heads") and value == vars(config).get("num_attention_heads"):
        return HEADS  # also of keys and values, where each query has its own
    if isinstance(value, list | tuple) and len(value) == vars(config).get("num_hidden_layers"):
        return [_at_most(name, value[layer]) for layer in layers]
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return [_at_most(name, item) for item in value]
    if name == "rope_parameters" and value:
        sectioned = "mrope_section" in value or re.fullmatch(_SECTIONED, config.model_type)
        return {**value, "mrope_section": [2, 1, 1]} if sectioned else value  # they are half a head
    if name == "head_dim" and value is None:
        return HEAD
    return _at_most(name, value)


def _at_most(name: str, value: object) -> object:
    if type(value) is not int:
        return value
    most = next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), value)
    if "heads" in name:  # a power of two, which divides the width
        value = 1 << max(value, 1).bit_length() - 1
    return min(value, most)


def _kinds_of_layers(config: PreTrainedConfig) -> list[int]:
    """The first layer of each kind that the config tells apart, four at most, and two at least."""
    many = vars(config).get("num_hidden_layers")
    if not isinstance(many, int):
        return [0, 1]
    lists = [value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == many]
    first = {str([values[layer] for values in lists]): layer for layer in reversed(range(many))}
    kinds = sorted(first.values())[:4]
    return kinds if len(kinds) > 1 else list(range(min(2, many)))
