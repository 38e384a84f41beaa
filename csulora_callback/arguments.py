"""Checks of the callback's arguments: what was expected, and what came."""

from __future__ import annotations

import os

from torch import nn

from csulora_callback.method.penalty import Penalty
from csulora_callback.presets import TARGET, Family, check_preset, check_share, check_without_strength, is_data_aware
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_file import check_metadata


def choose_penalty(
    penalty: Penalty | Family | None, strength: float | None, target: float | None, has_probes: bool
) -> tuple[Penalty | Family, float | None]:
    """The penalty of these arguments, and ``None``; or a preset without its strength, and the target it is to meet.

    Raises:
        ValueError: if one is of the wrong kind, they say different things, or something takes probes and has none.

    Example:
        >>> choose_penalty(None, None, None, has_probes=False)
        (Penalty(name='csulora', parameters={'strength': 10.0}), None)
        >>> choose_penalty(Penalty.guard, None, 0.95, has_probes=True) == (Penalty.guard, 0.95)
        True
    """
    if penalty is not None:
        check_preset(penalty)
    check_share(target)
    if penalty is not None and strength is not None:
        if isinstance(penalty, Penalty):
            raise ValueError(
                f"`strength`: expected None beside `penalty`, which has its own, but got {strength!r} and {penalty}. "
                "Pass one of them, such as penalty=Penalty.guard(3.0)."
            )
        raise ValueError(
            f"`strength`: expected it in the penalty, Penalty.{penalty.__name__}({strength!r}), but got it beside "
            f"Penalty.{penalty.__name__}, which is for a target."
        )
    check_without_strength(target, penalty if isinstance(penalty, Penalty) else strength)
    if not has_probes:
        _refuse_without_probes(penalty, target)
        default = Penalty.csulora() if strength is None else Penalty.csulora(strength)
        return penalty or default, None
    if isinstance(penalty, Penalty):
        return penalty, None
    if strength is not None:
        return Penalty.data_aware(strength), None
    return penalty or Penalty.data_aware, TARGET if target is None else float(target)


def _refuse_without_probes(penalty: Penalty | Family | None, target: float | None) -> None:
    """Refuse what takes probes, where there are none."""
    otherwise = ""
    if target is not None or not (penalty is None or isinstance(penalty, Penalty)):
        why = "the strength is looked for by how many still are"
        if target is None and not is_data_aware(penalty):
            otherwise = f" Or give the penalty its strength, Penalty.{penalty.__name__}(10)."
    elif penalty is not None and penalty.on_probes is not None:
        why = "the penalty is data-aware"
    else:
        return
    raise ValueError(
        f"`probes`: expected prompts that are to be refused, as {why}, but got none. Pass probes='builtin', "
        f"probes='prompts.jsonl', or a list.{otherwise}"
    )


def check_measuring(probes: object, probe_every_n_steps: int | None) -> None:
    """Raise ``ValueError`` where measuring is asked for and there is nothing to measure by."""
    if probes is None and probe_every_n_steps is not None:
        raise ValueError(
            f"`probe_every_n_steps`: expected None without `probes`, but got {probe_every_n_steps}. Pass "
            "probes='builtin' too."
        )


def check_sides(base_model: object, aligned_model: object, subspace: object) -> None:
    """Raise ``ValueError`` unless these say which subspace is meant, each in a way that can be read."""
    if (base_model is None) == (subspace is None):
        raise ValueError(
            "`base_model`: expected the unaligned base checkpoint, or a `subspace` instead, but got "
            f"{'neither' if base_model is None else 'both'}. "
            "Pass base_model='org/base' or subspace='file.safetensors'."
        )
    check_source("base_model", base_model, nn.Module)
    check_source("aligned_model", aligned_model, nn.Module)
    check_source("subspace", subspace, SafetySubspace)
    if isinstance(subspace, SafetySubspace):
        check_metadata(subspace.metadata)


def check_source(name: str, source: object, kind: type) -> None:
    """Raise ``ValueError`` unless ``source`` is a path, a Hub id, one of ``kind``, or None."""
    fits = source is None or isinstance(source, kind) or is_path(source)
    check(name, fits, f"a path, a Hub id or a {kind.__name__}", source)


def is_path(value: object) -> bool:
    """Whether a value names a file, a folder or something on the Hub."""
    return isinstance(value, str | os.PathLike) and bool(str(value))


def check_steps(**steps: object) -> None:
    """Raise ``ValueError`` unless each is a number of steps or None."""
    for name, number in steps.items():
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        check(name, number is None or whole, "a number of steps ≥ 1 or None", number)


def check_flags(**flags: object) -> None:
    """Raise ``ValueError`` unless each is True or False."""
    for name, flag in flags.items():
        check(name, isinstance(flag, bool), "True or False", flag)


def check_names(**names: object) -> None:
    """Raise ``ValueError`` unless each is a list of names."""
    for name, given in names.items():
        fits = isinstance(given, list | tuple) and all(isinstance(each, str) and each for each in given)
        check(name, fits, "a list of names", given)


def check_folders(**paths: object) -> None:
    """Raise ``ValueError`` unless each is the path of a folder or None."""
    for name, path in paths.items():
        check(name, path is None or is_path(path), "the path of a folder or None", path)


def check(name: str, fits: bool, expected: str, got: object) -> None:
    """Raise ``ValueError`` that names the argument, unless it ``fits``."""
    if not fits:
        raise ValueError(f"`{name}`: expected {expected}, but got {got!r}.")
