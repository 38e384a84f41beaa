"""What a saved adapter holds beside the factors of LoRA, judged as :mod:`.beside` judges a live one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from peft import LoraConfig
from torch import Tensor

from csulora_callback.models.aligned import Aligned
from csulora_callback.models.beside import NAMED, Uncorrected, judge_tokens, judge_whole
from csulora_callback.models.names import module_name
from csulora_callback.models.supported import check_tensors, not_beside
from csulora_callback.models.whole_slots import tied_keys, whole_slots_in
from csulora_callback.models.wholes import SavedWhole

logger = logging.getLogger(__name__)

_ROWS, _TOKENS = ".trainable_tokens_delta", ".token_adapter."
_ORIGINAL, _AGAIN = ".original_module.", "modules_to_save."  # what comes to them where the embeddings were resized


@dataclass
class SavedBeside:
    """What of a saved adapter was trained beside LoRA; made by :meth:`of`.

    Attributes:
        config: the adapter's.
        source: the aligned checkpoint, where it is not the one that the config names.
        uncorrected: what may pass.
        strict: refuse what cannot be corrected. Otherwise it passes: it is looked at then, and nothing is written.
        wholes: what is corrected whole, by name.
        passing: why each of the others passes, by name.
    """

    config: LoraConfig
    source: str | os.PathLike | None
    uncorrected: Uncorrected
    strict: bool
    wholes: dict[str, SavedWhole] = field(default_factory=dict)
    passing: dict[str, str] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)  # of what may have a counterpart
    _adapted: list[str] = field(default_factory=list)  # of the modules of LoRA

    @classmethod
    def of(
        cls,
        state: Mapping[str, Tensor],
        factors: Collection[str],
        config: LoraConfig,
        source: str | os.PathLike | None = None,
        uncorrected: Sequence[str] = (),
        strict: bool = True,
        place: str = "adapter",
    ) -> SavedBeside:
        """Judge PEFT's ``state`` dict, whose keys ``factors`` are of LoRA; ``place`` names it in messages.

        Raises:
            ValueError: for what cannot be corrected, or a name in ``uncorrected`` that matches nothing.

        Example:
            >>> import torch
            >>> state = {"base_model.model.score.weight": torch.ones(2, 4)}
            >>> config = LoraConfig(modules_to_save=["score"])
            >>> SavedBeside.of(state, [], config, uncorrected=["score"]).passing
            {'score': 'named in `uncorrected`'}
        """
        found = cls(config, source, Uncorrected(uncorrected), strict)
        rest = {key: tensor for key, tensor in state.items() if key not in factors and _ORIGINAL not in key}
        rows = [module_name(key.removesuffix(_ROWS)) for key in rest if key.endswith(_ROWS)]
        found._names = [*rows, *found._modules_to_save(rest)]
        found._adapted = sorted({module_name(key.partition(".lora_")[0]) for key in factors})
        for option, held in (("modules_to_save", found._modules_to_save(rest)), ("trainable_token_indices", rows)):
            if getattr(config, option) and not held:
                raise ValueError(
                    f"{place}: expected the weights of {option}={getattr(config, option)!r}, which stands in the "
                    "config there, but got none. Take config and weights from one copy."
                )
        for judge in (found._judge_tokens, found._judge_modules, found._judge_biases):
            handled = judge(rest)
            rest = {key: tensor for key, tensor in rest.items() if key not in handled}
        held = {key: state[key] for key in factors if key in state}
        beside = check_tensors(held | rest, factors, place)
        if beside:
            logger.info("Beside the factors %s holds %s: taken along as they are.", place, ", ".join(beside))
        if strict:  # of what a record names, PEFT saves only what it trains itself
            found.uncorrected.check([*found.passing, *found.wholes])
        return found

    def _judge_tokens(self, rest: Mapping[str, Tensor]) -> set[str]:
        judged: list[Tensor] = []
        rows = {module_name(key.removesuffix(_ROWS)): rest[key] for key in rest if key.endswith(_ROWS)}
        for name in sorted(rows, key=self._order):
            if not any(rows[name].equal(each) for each in judged):  # else it is tied to that one
                judged.append(rows[name])
                self._passes(name, lambda name=name: judge_tokens(name, self._indices(name), *self._by))
        whole = {key for keys in self._modules_to_save(rest).values() for key in keys.values()}
        return {key for key in rest if _TOKENS in key} - whole

    def _judge_modules(self, rest: Mapping[str, Tensor]) -> set[str]:
        modules = self._modules_to_save(rest)
        handled: set[str] = set()
        for name in sorted(modules, key=self._order):
            keys = modules[name]
            if handled.issuperset(keys.values()):  # it is tied to one before
                continue
            shapes = {own: tuple(rest[key].shape) for own, key in keys.items() if not own.startswith(_AGAIN)}
            if not self._passes(name, lambda n=name, shapes=shapes: judge_whole(n, shapes, *self._by)):
                (slot,) = whole_slots_in(keys.values(), [name])
                handled.update(tied_keys(rest, slot) if self.config.ensure_weight_tying else ())
                stored = shapes["weight"], self._aligned.stores_by_input(name)
                self.wholes[name] = SavedWhole(*stored, partial(self._aligned.checkpoint.weight, name))
            handled.update(keys.values())
        return handled

    def _judge_biases(self, rest: Mapping[str, Tensor]) -> set[str]:
        """Those that the option ``bias`` trains; others may belong to embeddings that PEFT saves along."""
        biases = {key: module_name(key) for key in rest if key.endswith(".bias") and self.config.bias != "none"}
        for name in biases.values():
            if self.uncorrected.takes(name) or not self.strict:
                self.passing[name] = NAMED
            else:
                raise not_beside(name, f"bias={self.config.bias!r}", "Train with bias='none'.")
        return set(biases)

    def _passes(self, name: str, judge: Callable[[], str | None]) -> bool:
        try:
            why = NAMED if self.uncorrected.takes(name) else judge()
        except ValueError as error:
            if self.strict:
                raise
            why = str(error)
        if why is not None:
            self.passing[name] = why
        return why is not None

    def _order(self, name: str) -> bool:
        """Embeddings first: of what is tied, that is the one which a live model has first."""
        return name.rpartition(".")[2] == "lm_head"

    def _modules_to_save(self, rest: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
        """Keys by name within the module, by module."""
        found: dict[str, dict[str, str]] = {}
        for key in (key for key in rest if not key.endswith(_ROWS)):
            parts = module_name(key).split(".")
            for end in range(1, len(parts)):
                name = ".".join(parts[:end])
                if any(name == each or name.endswith(f".{each}") for each in self.config.modules_to_save or ()):
                    found.setdefault(name, {})[".".join(parts[end:])] = key
                    break
        return found

    def _indices(self, name: str) -> Sequence[int]:
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            asked = [own for each, own in indices.items() if name == each or name.endswith(f".{each}")]
            return asked[0] if asked else next(iter(indices.values()))  # tied to the one that is named
        return indices or ()

    @property
    def _by(self) -> tuple[Aligned, Uncorrected]:
        return self._aligned, self.uncorrected

    @cached_property
    def _aligned(self) -> Aligned:
        source = self.source or self.config.base_model_name_or_path
        revision = None if self.source or os.path.isdir(source or "") else self.config.revision
        why = "the adapter's config names none"
        try:
            if source:
                found = Aligned(source, [*self._names, *self._adapted], revision)
                if any(name in found.checkpoint for name in self._adapted):  # so that what it lacks is new
                    return found
                why = f"{found.source} has none of the modules that LoRA is on"
        except FileNotFoundError as error:
            why = f"it cannot be had ({error})"
        raise ValueError(
            f"`aligned_model`: expected the aligned checkpoint, as '{self._names[0]}' was trained beside LoRA and is "
            f"compared with it, but {why}. Pass its folder or Hub id, or uncorrected=[{self._names[0]!r}]."
        )
