"""What stays of a run on its model: a config that writes the sidecar wherever the corrected adapter is saved."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

from csulora_callback import model_card
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.models.factors import Factors, digest, from_peft_state_dict, is_cast
from csulora_callback.models.peft_folder import read_adapter
from csulora_callback.sidecar import Sidecar


class CorrectedLoraConfig(LoraConfig):
    """The config of an adapter that training left corrected.

    ``PeftModel.save_pretrained`` writes an adapter's weights and then its config. If what was just written are the
    corrected factors, as they are or after a cast, the sidecar follows; if they were changed since, nothing does. The
    model itself has no trace of the run. (Models of transformers with an adapter of their own, by ``add_adapter``,
    write the config first: they are left without one, and saved without a sidecar after training.)
    """

    sidecar = None  # a Sidecar; a copy that PEFT makes for another adapter has none
    corrected = None  # Factors

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Write the config, and the sidecar of the adapter that lies beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.sidecar is None:
            return
        state, names = read_adapter(save_directory), list(self.corrected)
        try:
            written = from_peft_state_dict(state, names, str(save_directory))
        except ValueError:  # the weights come after it, or are of other modules
            return
        folder = Path(save_directory)
        if self.sidecar.record["adapter"] != "default":  # PEFT gives other names a subfolder; csulora/ lies beside it
            folder = folder.parent
        if is_cast(written, self.corrected):
            record = {**self.sidecar.record, "corrected_digest": digest(written)}
            replace(self.sidecar, record=record).save(folder, self)
        else:
            model_card.renew(folder, None, Path(save_directory))  # of an adapter that was saved here before


def remember(config: LoraConfig, adapter: CorrectedAdapter) -> None:
    """Have a model's config, in place, write the sidecar of ``adapter`` wherever it is saved from now on."""
    if type(config) not in (LoraConfig, CorrectedLoraConfig):  # a subclass has a class of its own to keep
        return
    config.__class__ = CorrectedLoraConfig
    config.sidecar = Sidecar(_on_cpu(adapter.raw), adapter.record)
    config.corrected = _on_cpu(adapter.corrected)


def forget(config: LoraConfig) -> None:
    """Make it a plain config again: training goes on."""
    if type(config) is CorrectedLoraConfig:
        del config.sidecar, config.corrected
        config.__class__ = LoraConfig


def _on_cpu(factors: Factors) -> Factors:
    return {name: tuple(tensor.cpu() for tensor in tensors) for name, tensors in factors.items()}
