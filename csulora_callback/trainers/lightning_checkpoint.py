"""What Lightning is about to write, corrected: the checkpoint's dictionary, and a PEFT folder beside the file.

Corrected are the factors that stand in ``checkpoint["state_dict"]``, whoever has put them there: averaging callbacks
replace it. What stood there is kept under a key of its own and put back when a fit resumes, before anyone reads it.
Nothing here imports Lightning.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models import sharding
from csulora_callback.models.activations import running_model
from csulora_callback.models.factors import Factors, digest, from_peft_state_dict, to_peft_state_dict
from csulora_callback.models.peft_folder import adapter_beside
from csulora_callback.models.whole_files import discard_folder, put_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "csulora"


def factors_of(
    checkpoint: dict[str, Any], corrector: SafetyCorrector, pl_module: LightningModule, live: bool
) -> Factors | None:
    """Copies of the factors that are about to be written; collective where they are sharded.

    Args:
        checkpoint: the dictionary.
        corrector: of the module.
        pl_module: whose ``state_dict`` stands in it.
        live: whether the engine writes the live model, whatever the dictionary holds.

    Returns:
        ``None`` where this process writes none: with a full state dict of a sharded model, only one holds it.
    """
    if live:
        return corrector.adapter.read()
    state, factors = corrector.taken(lambda: checkpoint["state_dict"], pl_module)
    if factors is None and state:
        logger.warning(
            "on_save_checkpoint of %s took LoRA factors out of the checkpoint's state_dict: whatever it saved instead "
            "is not corrected.",
            type(pl_module).__name__,
        )
        return None if corrector.adapter.is_sharded else corrector.adapter.read()
    return factors


def put_into(
    checkpoint: dict[str, Any], adapter: CorrectedAdapter, corrector: SafetyCorrector, pl_module: LightningModule
) -> None:
    """Replace the factors in the dictionary by corrected ones, and keep the raw ones beside them."""
    # The dictionary holds the live tensors themselves: it gets other ones, they keep their values.
    state = dict(checkpoint["state_dict"])
    corrected = corrector.adapter.to_state_dict(adapter.corrected, pl_module)
    for key, factor in corrected.items():  # in one order on all processes, which divide the factors together
        if key in state:
            state[key] = sharding.like(state[key], factor)
    checkpoint["state_dict"] = state
    raw = to_peft_state_dict(adapter.raw, corrector.adapter.slots)
    keys = dict(zip(raw, corrected, strict=True))
    checkpoint[CHECKPOINT_KEY] = {"raw": raw, "keys": keys, "record": adapter.record}
    if adapter.texts is not None:
        checkpoint[CHECKPOINT_KEY]["texts"] = adapter.texts.to_json()


def put_raw_back(checkpoint: dict[str, Any]) -> bool:
    """Undo :func:`put_into` in a dictionary that was read; whether it held what had to be replaced.

    Where its factors are not those that were corrected, because another program changed the file, they stay.
    """
    saved, state = checkpoint.get(CHECKPOINT_KEY), checkpoint.get("state_dict") or {}
    if saved is None or not set(saved["keys"].values()) <= state.keys():
        return False
    names = list(saved["record"]["modules"])
    corrected = from_peft_state_dict({peft: state[key] for peft, key in saved["keys"].items()}, names, "checkpoint")
    if digest(corrected) != saved["record"]["corrected_digest"]:
        logger.warning("The checkpoint's factors were changed after it was written: training goes on from them.")
        return True
    for peft, key in saved["keys"].items():
        state[key] = saved["raw"][peft].to(state[key].device, state[key].dtype)
    return True


def remove_adapter(checkpoint: str | os.PathLike) -> None:
    """Remove ``NAME.adapter``, if there is one: its checkpoint is about to change or to go."""
    place = adapter_beside(checkpoint)
    if place.is_symlink():
        place.unlink()
    else:
        discard_folder(place)


def link_adapter(checkpoint: str | os.PathLike, link: str | os.PathLike) -> None:
    """Give a link to a checkpoint, or a copy where there are no links, the adapter of that checkpoint."""
    source, place = adapter_beside(checkpoint), adapter_beside(link)
    if source.is_dir() and source.resolve() != place.resolve():
        if Path(link).is_symlink():
            place.symlink_to(os.path.relpath(source, place.parent), target_is_directory=True)
        else:
            put_folder(place, lambda unfinished: shutil.copytree(source, unfinished, dirs_exist_ok=True))


def saved_by_peft(
    checkpoint: dict[str, Any], factors: Factors, corrector: SafetyCorrector, pl_module: LightningModule
) -> dict[str, Tensor]:
    """What PEFT saves of the adapter, by key of its model's state dict, with ``factors``. Collective if sharded."""
    adapter, model = corrector.adapter, running_model(corrector.adapter)
    prefix = next(name for name, module in pl_module.named_modules() if module is model)
    start = f"{prefix}." if prefix else ""
    state = {
        key.removeprefix(start): value for key, value in checkpoint["state_dict"].items() if key.startswith(start)
    }
    state = {**dict(model.named_parameters()), **state}  # engines that write the live model leave the dictionary empty
    state |= adapter.to_state_dict(factors, model)
    wanted = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter.name)
    ids = {id(tensor) for tensor in wanted.values()}
    return {key: sharding.gather([value])[0] for key, value in state.items() if id(value) in ids}


def export(
    place: Path, state: dict[str, Tensor], corrector: SafetyCorrector, adapter: CorrectedAdapter | None
) -> None:
    """Let PEFT write the adapter into the folder ``place``, with its sidecar if it is corrected."""
    model, own = running_model(corrector.adapter), corrector.adapter

    def make(folder: Path) -> None:
        selected = {"selected_adapters": [own.name]} if isinstance(model, PeftModel) else {}
        type(model).save_pretrained(model, folder, state_dict=state, **selected)  # not as a fit has replaced it
        _flatten(folder, own.name)
        if adapter is not None:
            adapter.sidecar.save(folder, own.config)

    put_folder(place, make)


def _flatten(folder: Path, name: str) -> None:
    """PEFT gives adapters with a name of their own a subfolder; here there is only one."""
    inside = folder / name
    if name != "default" and inside.is_dir():
        for file in inside.iterdir():
            os.replace(file, folder / file.name)
        inside.rmdir()
