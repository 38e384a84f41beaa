"""Penalties without their strength, and the target that stands for it: what both front doors take and refuse."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

from csulora_callback.method.penalty import Penalty
from csulora_callback.method.search import STRONGEST

FAMILIES = {name: getattr(Penalty, name) for name in ("data_aware", "content_aware", "guard", "csulora", "separable")}
"""The presets that have a strength, by name."""

TARGET = 0.9
"""The share of the likelihood of refusals that is kept where nobody says another one."""

Family = Callable[[float], Penalty]
"""A preset without its strength, such as ``Penalty.guard``."""


def check_share(target: object) -> None:
    """Raise ``ValueError`` unless it is a share that can be kept, or None.

    Example:
        >>> check_share(0.9)
    """
    fits = isinstance(target, Real) and not isinstance(target, bool) and 0 < target <= 1
    if target is not None and not fits:
        raise ValueError(
            f"`target`: expected the share of the refusals' likelihood to be kept, in (0, 1], or None, but got "
            f"{target!r}."
        )


def check_without_strength(target: object, strength: object) -> None:
    """Raise ``ValueError`` where a target stands beside a strength, or a penalty that has one.

    Example:
        >>> check_without_strength(0.9, None)
    """
    if target is not None and strength is not None:
        raise ValueError(
            f"`target`: expected no strength beside it, as it looks for one, but got {strength}. Leave out one of "
            "them; a preset without its strength is Penalty.guard, not Penalty.guard(3.0)."
        )


def is_data_aware(penalty: Penalty | Family) -> bool:
    """Whether a penalty, or a preset without its strength, measures by activations.

    Example:
        >>> is_data_aware(Penalty.data_aware(4.0)), is_data_aware(Penalty.content_aware), is_data_aware(Penalty.guard)
        (True, True, False)
    """
    return (penalty if isinstance(penalty, Penalty) else penalty(STRONGEST)).on_probes is not None


DATA_AWARE = tuple(name for name, family in FAMILIES.items() if is_data_aware(family))
"""Those of the presets, by name."""


def check_projection(**given: object) -> None:
    """Raise ``ValueError`` where a projection is given what is, or looks for, a strength.

    Example:
        >>> check_projection(strength=None, target=None)
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}`: expected none for a projection, which has no strength, but got {value!r}.")


def check_preset(penalty: object) -> None:
    """Raise ``ValueError`` unless it is a penalty, or a preset that has a strength and is given without it.

    Example:
        >>> check_preset(Penalty.guard)
    """
    if not isinstance(penalty, Penalty) and penalty not in FAMILIES.values():
        raise ValueError(
            "`penalty`: expected a Penalty such as Penalty.guard(3.0), or, for a target, one without its strength, "
            f"{', '.join(f'Penalty.{name}' for name in FAMILIES)}, but got {penalty!r}. It is imported by `from "
            "csulora_callback import Penalty`."
        )
