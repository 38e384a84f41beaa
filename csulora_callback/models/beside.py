"""What is trained beside LoRA: which of it is corrected whole, what passes and why, and what is refused.

A part that has no counterpart in the aligned checkpoint, as a new head or the rows of new tokens, cannot have drifted
from it: it passes, and is listed as not corrected. A part that has one is corrected where its update is that of one
matrix. All else is refused, unless a user names it in ``uncorrected``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from csulora_callback.models import sharding
from csulora_callback.models.aligned import Aligned
from csulora_callback.models.checkpoint import Checkpoint, Source
from csulora_callback.models.layout import Layout
from csulora_callback.models.names import module_name
from csulora_callback.models.parts import Part
from csulora_callback.models.supported import MODULES_TO_SAVE, TRAINABLE_TOKENS, not_beside
from csulora_callback.models.wholes import whole_part

NAMED = "named in `uncorrected`"
_NEW = "new: the aligned checkpoint has no such module"
_OTHER_SHAPE = "new: the aligned checkpoint has one of another shape"


@dataclass
class Uncorrected:
    """The names of parts that a user lets pass: of modules or parameters, in full or their last parts.

    Example:
        >>> uncorrected = Uncorrected(["score"])
        >>> uncorrected.takes("model.score"), uncorrected.takes("model.underscore")
        (True, False)
        >>> uncorrected.check([])
    """

    names: Sequence[str]
    _taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise ValueError(f"`uncorrected`: expected a list of names, but got {self.names!r}. Pass it in one.")

    def takes(self, *names: str) -> bool:
        """Whether one of these, which are of the same part, is meant."""
        found = {given for given in self.names for name in names if name == given or name.endswith(f".{given}")}
        self._taken |= found
        return bool(found)

    def check(self, there: Collection[str]) -> None:
        """Refuse, with a ValueError, a name that nothing took; ``there`` is what would have been."""
        for name in self.names:
            if name not in self._taken:
                raise ValueError(
                    f"`uncorrected`: expected names of what is trained beside LoRA, but {name!r} matches nothing; "
                    f"there is {', '.join(map(repr, there)) or 'nothing trained beside it'}. Leave it out."
                )


@dataclass(frozen=True)
class Beside:
    """What of a live model is trained beside LoRA.

    Attributes:
        parts: what is corrected whole.
        passing: why each of the others passes, by name.
        parameters: ids of those that pass.
        wrappers: PEFT's modules that hold the adapter's part.
        in_place: names of those that pass and are the model's own, and no adapter's that can be switched off.
    """

    parts: tuple[Part, ...]
    passing: dict[str, str]
    parameters: set[int]
    wrappers: tuple[AuxiliaryTrainingWrapper, ...]
    in_place: tuple[str, ...] = ()

    def check_off(self) -> None:
        """Raise ``ValueError`` if the model without the adapter is not the aligned one, as it trains itself."""
        if self.in_place:
            raise ValueError(
                "`probes`: expected that the model without its adapter is the aligned one, which says what is to be "
                f"refused, but '{self.in_place[0]}', which passes by `uncorrected`, is trained in the model itself. "
                "Freeze it, or leave out `probes` and correct by weights alone: penalty=Penalty.guard(10.0)."
            )


def judge_whole(
    name: str, tensors: Mapping[str, tuple[int, ...]], aligned: Aligned, uncorrected: Uncorrected
) -> str | None:
    """Why a module in ``modules_to_save`` passes, or ``None`` where it is to be corrected.

    Args:
        name: of the module.
        tensors: shapes of what it holds, by name within it.
        aligned: the checkpoint that it may have a counterpart in.
        uncorrected: what may pass.

    Raises:
        ValueError: if it has one, and is not a matrix.
    """
    if uncorrected.takes(name):
        return NAMED
    shapes = {f"{name}.{own}".removesuffix(".weight"): shape for own, shape in tensors.items()}
    found = {own: aligned.shape(own) for own in shapes}
    inner = any(part.isdigit() for part in name.split("."))  # of a layer; heads lie outside of all
    if not any(found.values()):
        if inner:
            kind = f"modules_to_save of a module whose weight cannot be told by its name in {aligned.source}"
            raise not_beside(name, kind, MODULES_TO_SAVE)
        return _NEW
    table = aligned.is_table(name) and found.get(name) and found[name][1:] == shapes[name][1:]
    if not table and not inner and all(found[own] != shapes[own] for own in found if found[own]):
        return _OTHER_SHAPE
    if list(tensors) != ["weight"] or len(tensors["weight"]) != 2:
        held = ", ".join(tensors)
        raise not_beside(name, f"modules_to_save of a module with {held}, which {aligned.source} has", MODULES_TO_SAVE)
    if not table and found[name] != shapes[name]:
        kind = f"modules_to_save of a weight that is {found[name]} in {aligned.source} and {shapes[name]} in training"
        raise not_beside(name, kind, MODULES_TO_SAVE)
    return None


def judge_tokens(name: str, tokens: Sequence[int], aligned: Aligned, uncorrected: Uncorrected) -> str:
    """Why rows of an embedding, the module ``name``, pass that are trained by ``trainable_token_indices``.

    Raises:
        ValueError: if the aligned checkpoint knows one of these tokens.
    """
    if uncorrected.takes(name):
        return NAMED
    known = [token for token in tokens if aligned.knows(name, token)]
    if known:
        kind = (
            f"trainable_token_indices of tokens that the aligned model has (such as {known[0]}; {len(known)} of "
            f"{len(tokens)}, in {aligned.source})"
        )
        raise not_beside(name, kind, TRAINABLE_TOKENS)
    return f"new: rows of {len(tokens)} tokens that the aligned model has not"


def find_beside(
    model: nn.Module,
    holder: nn.Module,
    adapter: str,
    source: tuple[Source | None, str | None],
    factors: Mapping[str, Sequence[nn.Parameter]],
    uncorrected: Sequence[str] = (),
) -> Beside:
    """Of a live model.

    Args:
        model: all that trains.
        holder: in it, what the adapter was put into.
        adapter: its name.
        source: the aligned checkpoint and its revision on the Hub; where it is ``None`` or cannot be had, the model in
            memory stands for it.
        factors: the parameters of LoRA by module.
        uncorrected: names of what may pass.

    Raises:
        ValueError: for what cannot be corrected, or a name in ``uncorrected`` that matches nothing.
    """
    asked = Uncorrected(uncorrected)
    wrappers = _wrappers(holder, adapter)
    names = [module_name(path) for path in wrappers]
    aligned = _aligned(source, names, list(factors), holder) if wrappers else None
    passing: dict[str, str] = {}
    parameters: set[int] = set()
    wholes: dict[int, tuple[str, ModulesToSaveWrapper, list[str]]] = {}
    for name, wrapper in zip(names, wrappers.values(), strict=True):
        own = list(_trained(wrapper, adapter).values())
        if isinstance(wrapper, TrainableTokensWrapper):
            if not wrapper.token_adapter.tied_adapter:
                why = judge_tokens(name, wrapper.token_adapter.token_indices[adapter], aligned, asked)
                passing[name], parameters = why, parameters | set(map(id, own))
        elif id(own[0]) in wholes:
            wholes[id(own[0])][2].append(name)
        elif not parameters.issuperset(map(id, own)):
            shapes = {key: sharding.full_shape(each) for key, each in _trained(wrapper, adapter).items()}
            why = judge_whole(name, shapes, aligned, asked)
            if why is None:
                wholes[id(own[0])] = name, wrapper, []
            else:
                passing[name], parameters = why, parameters | set(map(id, own))
    in_place: list[str] = []
    known = {id(each) for own in factors.values() for each in own} | parameters | wholes.keys()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            name = module_name(path)
            if asked.takes(name, name.removesuffix(".weight")):
                passing[name] = NAMED
                parameters.add(id(parameter))
                in_place.append(name)
    asked.check([*passing, *(name for name, _, _ in wholes.values())])
    parts = tuple(whole_part(name, wrapper, adapter, tuple(tied)) for name, wrapper, tied in wholes.values())
    return Beside(parts, passing, parameters, tuple(wrappers.values()), tuple(in_place))


def check_displaced(wholes: Collection[str], base: Checkpoint, layout: Layout) -> None:
    """Refuse, with a ValueError, a module that is trained whole and that the base checkpoint lacks.

    Args:
        wholes: names of modules.
        base: the unaligned checkpoint.
        layout: where the modules are.
    """
    named = base.named_as(wholes, layout)
    for name in wholes:
        if name not in named:
            kind = f"modules_to_save of what `base_model` ({base.source}) has not, so that no displacement is known,"
            raise not_beside(name, kind, "Leave it out.")


def _wrappers(holder: nn.Module, adapter: str) -> dict[str, AuxiliaryTrainingWrapper]:
    """Those that hold something of the adapter, by path."""
    found = {path: m for path, m in holder.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    return {path: module for path, module in found.items() if _trained(module, adapter)}


def _trained(wrapper: AuxiliaryTrainingWrapper, adapter: str) -> dict[str, nn.Parameter]:
    """What a wrapper trains of the adapter, by name within the module that it stands for."""
    if isinstance(wrapper, TrainableTokensWrapper):
        rows = wrapper.token_adapter.trainable_tokens_delta
        return {"rows": rows[adapter]} if adapter in rows else {}
    modules = wrapper.modules_to_save if isinstance(wrapper, ModulesToSaveWrapper) else {}
    return dict(modules[adapter].named_parameters()) if adapter in modules else {}


def _aligned(
    source: tuple[Source | None, str | None], names: list[str], adapted: list[str], holder: nn.Module
) -> Aligned:
    """The checkpoint, if it can be had and has any adapted module, so that what it lacks is new; else the model."""
    checkpoint, revision = source
    is_folder = isinstance(checkpoint, str) and os.path.isdir(checkpoint)
    if checkpoint is not None and checkpoint != "":
        try:
            found = Aligned(checkpoint, [*names, *adapted], None if is_folder else revision, holder)
            if any(name in found.checkpoint for name in adapted):
                return found
        except FileNotFoundError:  # a model that was made elsewhere; what is in memory is all that is known of it
            pass
    return Aligned(holder, names, model=holder)
