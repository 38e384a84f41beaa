"""The ranks and scalings that PEFT reads out of an adapter's config, and a config that gives certain ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key


def scaling_of(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and scaling that PEFT gives a module.

    Raises:
        ValueError: if the config gives it none, or one that is not finite.

    Example:
        >>> config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"v_proj": 16}, use_rslora=True)
        >>> scaling_of(config, "model.layers.0.v_proj"), scaling_of(config, "model.layers.0.q_proj")
        ((16, 2.0), (4, 4.0))
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(ranks, name), config.r)
    alpha = alphas.get(get_pattern_key(alphas, name), config.lora_alpha)
    try:
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        finite = math.isfinite(scaling)
    except (TypeError, ValueError, ArithmeticError):
        finite = False
    if not finite:
        raise ValueError(
            f"`adapter`: expected a rank ≥ 1 and a finite lora_alpha for module '{name}', but {CONFIG_NAME} says "
            f"{r!r} and {alpha!r}. Take the folder from a copy."
        )
    return r, scaling


def options_for_ranks(ranks: Mapping[str, int], scalings: Mapping[str, float], use_rslora: bool) -> dict[str, object]:
    """The entries of a config that gives each module its rank, and the scaling that it has.

    Example:
        >>> options = options_for_ranks({"q": 8, "k": 8, "v": 4}, {"q": 2.0, "k": 2.0, "v": 2.0}, use_rslora=False)
        >>> options["r"], options["lora_alpha"], options["rank_pattern"], options["alpha_pattern"]
        (8, 16, {'^v': 4}, {'^v': 8})
    """
    alphas = {name: _whole(scalings[name] * (math.sqrt(rank) if use_rslora else rank)) for name, rank in ranks.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): ranks[name] for name in ranks if ranks[name] != r},
        "alpha_pattern": {_pattern(name): alphas[name] for name in ranks if alphas[name] != alpha},
    }


def _most_common(values: Iterable[float]) -> float:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(name: str) -> str:
    """A key that PEFT, which takes it for a regular expression, finds for this module alone."""
    return "^" + name.replace(".", r"\.")
