"""When the correction runs in Lightning's ``Trainer``: its events translated into calls of the corrector.

A checkpoint is corrected in the dictionary that Lightning is about to write, by wrapping the module's
``on_save_checkpoint``: unlike the callback's own, it is called for weights-only checkpoints too. Validation sees the
corrected factors in the model itself. Nothing here imports Lightning.
"""

from __future__ import annotations

import logging
import shutil
import types
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csulora_callback.adapters import from_peft_state_dict, save_as_peft_adapter, to_peft_state_dict
from csulora_callback.corrector import CorrectedAdapter, SafetyCorrector

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from peft import PeftConfig
    from torch import nn

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "csulora"
_IN_PROGRESS_BAR = ("csulora/off_energy", "csulora/attenuation")  # seven numbers would push the loss out of sight


class LightningEvents:
    """The half of :class:`~csulora_callback.CSULoRACallback` that listens to Lightning's ``Trainer``."""

    every_n_steps: int | None
    evaluate_corrected: bool
    log_every_n_steps: int | None
    export_adapter: bool
    _corrector: SafetyCorrector | None

    @abstractmethod
    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector: ...

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew: the adapter may only be made later, in ``configure_model``."""
        if stage == "fit":
            _refuse_sharding(trainer)
            self._corrector = None
            self._last_step = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resuming loaded the corrected factors: put the raw ones back. Evaluating a checkpoint keeps what ships."""
        if trainer.state.fn != "fit":
            return
        self._begin(trainer, pl_module)
        if CHECKPOINT_KEY in checkpoint:
            adapter = self._corrector.adapter
            adapter.write(from_peft_state_dict(checkpoint[CHECKPOINT_KEY]["raw"], list(adapter.layers), "checkpoint"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the subspace and refuse what cannot be corrected, before the first step."""
        self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Correct the live weights if asked to, and log the drift in the step that Lightning logs."""
        step = trainer.global_step
        if step == self._last_step:  # accumulating gradients
            return
        self._last_step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._corrector.step()
        every = self.log_every_n_steps or trainer.log_every_n_steps
        if every and step % every == 0:
            for name, value in self._corrector.measure().items():
                pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in _IN_PROGRESS_BAR)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation inside a fit sees the corrected weights, because those ship."""
        if trainer.state.fn == "fit" and self.evaluate_corrected:
            self._corrector.swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is trained is raw."""
        if trainer.state.fn == "fit":
            self._corrector.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An interrupted run is left with the weights it was training."""
        if self._corrector is not None:
            self._corrector.restore()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the corrected model in memory; checkpoints written after this find it corrected already."""
        self._corrector.apply()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._corrector is None:
            self._corrector = self._prepare(pl_module, verbose=trainer.is_global_zero)
            export = _export_adapters(trainer, self._corrector, self.export_adapter)
            _wrap_on_save_checkpoint(pl_module, self._corrector, export)


def _wrap_on_save_checkpoint(
    pl_module: LightningModule, corrector: SafetyCorrector, export: _AdapterExport | None
) -> None:
    original = pl_module.on_save_checkpoint
    if hasattr(original, "uncorrected"):  # a callback of an earlier fit wrapped it: correct once, not twice
        original = original.uncorrected

    def on_save_checkpoint(target: LightningModule, checkpoint: dict[str, Any]) -> None:
        if target is not pl_module:  # a deep copy took the attribute along
            return type(target).on_save_checkpoint(target, checkpoint)
        original(checkpoint)
        adapter = corrector.compute()
        _put_into(checkpoint, adapter, corrector, pl_module)
        if export is not None:
            export.adapter = adapter

    on_save_checkpoint.uncorrected = original
    pl_module.on_save_checkpoint = types.MethodType(on_save_checkpoint, pl_module)


def _put_into(
    checkpoint: dict[str, Any], adapter: CorrectedAdapter, corrector: SafetyCorrector, pl_module: LightningModule
) -> None:
    layers = corrector.adapter.layers
    keys = {id(parameter): key for key, parameter in pl_module.named_parameters()}
    # The dictionary holds the live tensors themselves: it gets other ones, they keep their values.
    state = dict(checkpoint["state_dict"])
    for name, factors in adapter.corrected.items():
        for parameter, factor in zip((layers[name].lora_A, layers[name].lora_B), factors, strict=True):
            key = keys[id(parameter)]
            if key not in state:
                logger.warning(
                    "on_save_checkpoint of %s took '%s' out of the checkpoint's state_dict: whatever it saved "
                    "instead is not corrected.",
                    type(pl_module).__name__,
                    key,
                )
                continue
            state[key] = factor.clone()
    checkpoint["state_dict"] = state
    checkpoint[CHECKPOINT_KEY] = {"raw": to_peft_state_dict(adapter.raw), "record": adapter.record}


def _refuse_sharding(trainer: Trainer) -> None:
    # Exactly the strategies that shard the model (FSDP, model-parallel, DeepSpeed) load checkpoints into it late.
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(
            f"`strategy`: CSULoRACallback runs on one device or with ddp, but this Trainer uses "
            f"{type(trainer.strategy).__name__}, which is not supported yet: its checkpoints would not be corrected."
        )


def _export_adapters(trainer: Trainer, corrector: SafetyCorrector, wanted: bool) -> _AdapterExport | None:
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, _AdapterExport):  # of an earlier fit
        checkpoint_io = checkpoint_io.checkpoint_io
    export = _AdapterExport(checkpoint_io, corrector.adapter.config) if wanted else None
    trainer.strategy.checkpoint_io = export or checkpoint_io
    return export


class _AdapterExport:
    """Stands before Lightning's ``CheckpointIO``: each checkpoint gets a PEFT folder, and loses it when removed."""

    def __init__(self, checkpoint_io: Any, config: PeftConfig) -> None:
        self.checkpoint_io, self.config = checkpoint_io, config
        self.adapter: CorrectedAdapter | None = None  # the one in the checkpoint that is about to be written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
        if self.adapter is not None and _is_local(path):
            save_as_peft_adapter(self.adapter.corrected, self.config, _folder(path))
            self.adapter.sidecar.save(_folder(path))
        self.adapter = None

    def remove_checkpoint(self, path: str | Path) -> None:
        self.checkpoint_io.remove_checkpoint(path)
        if _is_local(path):
            shutil.rmtree(_folder(path), ignore_errors=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint_io, name)


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)


def _folder(path: str | Path) -> Path:
    return Path(path).with_suffix(".adapter")
