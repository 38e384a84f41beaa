"""Which stored weight a module's is where the two have other names: as transformers renames on load, by names alone.

Names differ where a folder holds more than is trained or less (a multimodal model and its text model, a model with and
without its head), where transformers has renamed modules since, and where the transformer sits in a bigger module.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from csulora_callback.models.names import module_name
from csulora_callback.models.sharding import unsharded_class


@dataclass(frozen=True, eq=False)
class Part:
    """A transformers model in a bigger module, or that module itself.

    Attributes:
        prefix: what its modules' names in the bigger one begin with, up to the dot.
        kind: its class.
        config: its config.
    """

    prefix: str
    kind: type[PreTrainedModel]
    config: PreTrainedConfig

    @cached_property
    def empty(self) -> PreTrainedModel:
        """An instance without weights; not the one in memory, where adapters and engines change names and classes."""
        with torch.random.fork_rng(devices=[]), init_empty_weights():  # the generator is one that training draws from
            return self.kind(copy.deepcopy(self.config))

    def loaded(self, keys: Iterable[str]) -> dict[str, set[str]]:
        """Keys of files by the module that transformers loads each into; none that it joins or splits on the way."""
        conversions, there = get_model_conversion_mapping(self.empty), self.empty.state_dict()
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        found: dict[str, set[str]] = {}
        for key in sorted(keys):  # as transformers does: some renamings count on it
            stored = f"{key}.weight"
            name, converted = rename_source_key(stored, renamings, converters, self.empty.base_model_prefix, there)
            if name not in there and stored in there:
                name, converted = stored, None
            if converted is None and name in there:
                found.setdefault(name.removesuffix(".weight"), set()).add(key)
        for tied, source in self.empty.all_tied_weights_keys.items():  # which files hold once
            module, held = tied.removesuffix(".weight"), found.get(source.removesuffix(".weight"))
            if module not in found and held:
                found[module] = held
        return found

    def inner(self, name: str) -> str:
        """A module's name within this part; one that is not of it stays as it is."""
        return name.removeprefix(self.prefix)

    def spellings(self, name: str) -> set[str]:
        """What a name within a model of this kind, with a head or without, may be in the bigger module."""
        return {self.prefix + inner for inner in (name, name.removeprefix(f"{self.kind.base_model_prefix}."))}


@dataclass(frozen=True)
class Layout:
    """The transformers models in a module, the outer ones first; none in a module of other kinds.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layout = Layout.of(LlamaForCausalLM(config))
        >>> [(part.prefix, part.kind.__name__) for part in layout.parts]
        [('', 'LlamaForCausalLM'), ('model.', 'LlamaModel')]
        >>> layout.stored(["model.layers.0.mlp.up_proj"], ["layers.0.mlp.up_proj"])
        {'model.layers.0.mlp.up_proj': {'layers.0.mlp.up_proj'}}
    """

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Of a module in memory, whatever it is wrapped in."""
        return cls(
            tuple(
                Part(
                    module_name(f"{path}.part".lstrip(".")).removesuffix("part"), unsharded_class(inner), inner.config
                )
                for path, inner in module.named_modules()
                if isinstance(inner, PreTrainedModel)
            )
        )

    def in_files_of(self, configs: Mapping[str, PreTrainedConfig]) -> Layout:
        """The models that files may hold, with the configs that stand beside them, by ``model_type``.

        Of one inside another the outer one, whose class tells where transformers loads each key of both: the inner one
        would take a key of another part for its own, as a vision tower the text model's.
        """
        parts: list[Part] = []
        for part in self.parts:
            kind = part.config.model_type
            if kind in configs and not any(part.prefix.startswith(outer.prefix) for outer in parts):
                parts.append(Part(part.prefix, part.kind, configs[kind]))
        return Layout(tuple(parts))

    def stored(self, names: Iterable[str], keys: Collection[str]) -> dict[str, set[str]]:
        """The keys of weights in files that transformers loads, as they are, into each of these modules.

        Args:
            names: of modules here.
            keys: names of modules as they stand in the files.
        """
        found: dict[str, set[str]] = {name: set() for name in names}
        for part in self.parts:
            loaded = part.loaded(keys)
            for name, its in found.items():
                its |= loaded.get(part.inner(name), set())
        return found

    def meant(self, names: Collection[str], held: Collection[str], trained: Layout | None) -> dict[str, set[str]]:
        """Modules here that names may mean which are given relative to one of the models, with its head or without.

        Where one of the models has modules of all these names, none of the others is meant.

        Args:
            names: of modules elsewhere.
            held: names of the modules here.
            trained: where those are: then only models of the same ``model_type`` are compared.
        """
        readings = []
        for part in self.parts:
            for other in [None] if trained is None else trained.parts:
                if other is None or other.config.model_type == part.config.model_type:
                    inner = {name: name if other is None else other.inner(name) for name in names}
                    readings.append({name: part.spellings(inner[name]).intersection(held) for name in names})
        whole = [reading for reading in readings if all(reading.values())]
        return {name: set().union(*(reading[name] for reading in whole or readings)) for name in names}


def by_stored_name(candidates: Mapping[str, set[str]], asked: set[str], source: str) -> dict[str, list[str]]:
    """What modules are to be called, by what they are called in a checkpoint.

    Args:
        candidates: by the name that is asked for, what the module may be called there.
        asked: all names that are asked for; a module that has one of them there keeps it, too.
        source: the checkpoint's name, for the error.

    Raises:
        ValueError: if several modules may be meant by a name; two of them are given.

    Example:
        >>> by_stored_name({"layers.0": {"model.layers.0"}}, {"layers.0"}, "org/model")
        {'model.layers.0': ['layers.0']}
    """
    called: dict[str, list[str]] = {}
    for name, keys in candidates.items():
        if len(keys) > 1:
            two = " or ".join(map(repr, sorted(keys)[:2]))
            raise ValueError(
                f"{source}: expected one weight for the module '{name}', but by their names it may be that "
                f"of {two}. Save the model that is meant as a checkpoint of its own, and pass that."
            )
        for key in keys:
            called.setdefault(key, [key] if key in asked else []).append(name)
    return called
