"""The callback out of a section of a configuration file, where a penalty is a name and a strength."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping

from csulora_callback.callback import CSULoRACallback
from csulora_callback.method.penalty import Penalty
from csulora_callback.presets import FAMILIES, Family, check_projection, check_without_strength

KEYS = tuple(inspect.signature(CSULoRACallback).parameters)
"""What a section may say: the constructor's arguments."""

PRESETS = (*FAMILIES, Penalty.projection.__name__)
"""What ``penalty`` may be."""


def make_callback(settings: Mapping[str, object]) -> CSULoRACallback:
    """The callback that a section describes.

    Args:
        settings: the constructor's arguments by name, in the types that YAML has. ``penalty`` is the name of a preset,
            and ``strength`` is that preset's: without one it is what ``target`` finds where there are ``probes``, and
            the preset's default where there are none.

    Raises:
        ValueError: for an unknown key, with the nearest one, and whatever the constructor refuses.

    Example:
        >>> make_callback({"base_model": "org/base", "penalty": "guard", "strength": 3}).penalty
        Penalty(name='guard', parameters={'strength': 3.0})
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"expected the callback's arguments by name, such as base_model: org/base, got {settings!r}.")
    for key in settings:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            known = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(KEYS)}."
            raise ValueError(f"`{key}`: expected a key that the callback has, but got an unknown one. {known}")
    if settings.get("penalty") is None:
        return CSULoRACallback(**settings)
    kept = {key: value for key, value in settings.items() if key not in ("penalty", "strength")}
    return CSULoRACallback(**kept, penalty=_named_penalty(settings))


def _named_penalty(settings: Mapping[str, object]) -> Penalty | Family:
    """The preset with its strength, or without one where that is to be looked for."""
    name, strength, target = (settings.get(key) for key in ("penalty", "strength", "target"))
    if name not in PRESETS:
        raise ValueError(f"`penalty`: expected the name of a preset, {', '.join(PRESETS)}, but got {name!r}.")
    if name not in FAMILIES:
        check_projection(strength=strength, target=target)
        return Penalty.projection()
    check_without_strength(target, strength)
    preset = FAMILIES[name]
    if strength is not None:
        return preset(strength)
    looked_for = target is not None or settings.get("probes") is not None
    return preset if looked_for else preset()
