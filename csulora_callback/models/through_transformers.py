"""A checkpoint as transformers loads it, which renames and fuses weights; code that lies beside them is never run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from csulora_callback.models.fused_files import Fused, Shapes, fused_parameters
from csulora_callback.models.layout import Layout, Part


def stored_names(
    folder: Path, names: Iterable[str], keys: Collection[str], trained: Layout | None
) -> dict[str, set[str]]:
    """The keys in a folder's files that modules have there, by names alone: none of those that only loading tells.

    Args:
        folder: the folder.
        names: of modules.
        keys: of modules in its files.
        trained: where the modules are: through its classes the names are looked for first. Then, and where it is
            None, through the class that the folder names, of which a name may leave out what the transformer sits in.

    Raises:
        Exception: of a config that is broken, in one of many ways.
    """
    config = _config(folder)
    found = {name: set() for name in names} if trained is None else _loadable(trained, config).stored(names, keys)
    lacking, kind = [name for name, its in found.items() if not its], _architecture(config)
    if lacking and kind is not None:
        whole = Part("", kind, config)
        loaded, layout = whole.loaded(keys), Layout.of(whole.empty)
        # Among all modules, also those whose weights names do not tell: they make no room for those of another model.
        for name, modules in layout.meant(lacking, dict(whole.empty.named_modules()), trained).items():
            for module in modules:
                found[name] |= loaded.get(module, {module} if len(modules) > 1 else set())
    return found


def stored_experts(
    folder: Path, parameters: Iterable[str], shapes: Shapes, trained: Layout | None
) -> dict[str, list[Fused | None]]:
    """How a folder's files hold fused parameters, as :func:`stored_names` does; no entry where they are no model's.

    Args:
        folder: the folder.
        parameters: their names.
        shapes: of what its files hold.
        trained: as there.

    Raises:
        Exception: as there.
    """
    config, found = _config(folder), {name: [] for name in parameters}
    for part in () if trained is None else _loadable(trained, config).parts:
        held = fused_parameters(part.empty, shapes)
        for name, its in found.items():
            its += [held[inner]] if (inner := part.inner(name)) in held else []
    lacking, kind = [name for name, its in found.items() if not its], _architecture(config)
    if lacking and kind is not None:
        whole = Part("", kind, config)
        held = fused_parameters(whole.empty, shapes)
        for name, meant in Layout.of(whole.empty).meant(lacking, held, trained).items():
            found[name] += [held[parameter] for parameter in sorted(meant)]
    return {name: its for name, its in found.items() if its}


def all_experts(folder: Path, shapes: Shapes) -> tuple[dict[str, Fused | None], dict[str, set[str]]]:
    """Of the model that a folder names every fused parameter, and the keys of all modules that are stored as they are.

    Raises:
        Exception: as :func:`stored_names`.
    """
    config = _config(folder)
    kind = _architecture(config)
    if kind is None:
        return {}, {}
    whole = Part("", kind, config)
    fused = fused_parameters(whole.empty, shapes)
    return fused, whole.loaded(shapes) if fused else {}


def empty_model(folder: Path) -> nn.Module:
    """The model that a folder's config names, without weights.

    Raises:
        Exception: of a config that is broken, or names no class of transformers, in one of many ways.
    """
    config = _config(folder)
    return Part("", _architecture(config), config).empty


def load_through_transformers(folder: Path, trained: Layout | None = None) -> tuple[nn.Module, set[str]]:
    """The model, and the names of parameters that the files lack and transformers made up.

    It is of the class that is trained where the folder holds a model of its kind, else of the one that it names.

    Raises:
        Exception: of a config or weights that are broken, in one of many ways.
    """
    config = _config(folder)
    parts = () if trained is None else _loadable(trained, config).parts
    architecture, config = (parts[0].kind, parts[0].config) if parts else (_architecture(config), config)
    if architecture is None:
        raise ValueError(
            "config.json: expected the name of a model of transformers in `architectures`, but got "
            f"{config.architectures!r}"
        )
    # transformers draws what the files lack at random. Noise must neither pass for weights nor move the generator
    # that a training run draws from.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model, info = architecture.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    return model, set(info["missing_keys"])


def _config(folder: Path) -> PreTrainedConfig:
    # False, as with None transformers asks on the terminal whether to run code that lies in the folder.
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _loadable(trained: Layout, config: PreTrainedConfig) -> Layout:
    """The models in training that a folder with this config may hold."""
    configs: dict[str, PreTrainedConfig] = {}
    for each in _with_those_inside(config):
        configs.setdefault(each.model_type, each)
    return trained.in_files_of(configs)


def _with_those_inside(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config, and those of the models that it is made of, the outer ones first."""
    yield config
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            yield from _with_those_inside(inner)


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The first class that a config lists, which is somebody else's file and may list anything."""
    named = config.architectures
    if isinstance(named, list) and named and isinstance(named[0], str):
        found = getattr(transformers, named[0], None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None
