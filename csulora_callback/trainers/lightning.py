"""When the correction runs in Lightning's ``Trainer``: a run opens at ``setup``, and these events move it on."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from csulora_callback.behaviour import Behaviour
from csulora_callback.budget import UNMEASURED, Budget
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.trainers.engines import refuse_strategy
from csulora_callback.trainers.lightning_checkpoint import CHECKPOINT_KEY
from csulora_callback.trainers.lightning_run import LightningRun
from csulora_callback.trainers.recorder import ActivationRecorder
from csulora_callback.trainers.tracker_images import of_loggers, warn_if_unseen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import nn

_IN_PROGRESS_BAR = (  # seven numbers and more would push the loss out of sight
    "csulora/alignment_undone",
    "csulora/attenuation",
    "csulora/refusal_kept_corrected",
)


class LightningEvents:
    """The half of :class:`~csulora_callback.CSULoRACallback` that listens to Lightning's ``Trainer``."""

    every_n_steps: int | None
    evaluate_corrected: bool
    log_every_n_steps: int | None
    probe_every_n_steps: int | None
    export_adapter: bool
    budget: Budget
    heat_maps: bool
    _corrector: SafetyCorrector | None
    _recorder: ActivationRecorder | None
    _behaviour: Behaviour | None
    _fit: LightningRun | None
    raw_is_loaded: bool

    @abstractmethod
    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector: ...

    @abstractmethod
    def _renew(self, if_doubled: bool = False) -> None: ...

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew: the adapter may only be made later, in ``configure_model``."""
        if stage == "fit":
            refuse_strategy(trainer)
            if any(isinstance(other, LightningEvents) and other is not self for other in trainer.callbacks):
                raise ValueError(
                    "`callbacks`: expected one CSULoRACallback, but got several. Combine them into one penalty."
                )
            if self._fit is not None:
                if self._fit.trainer is not trainer and self._fit.is_training:
                    raise ValueError(
                        "`callbacks`: expected a CSULoRACallback of this Trainer's own, but another Trainer is still "
                        "training with it. Make a new one for this one."
                    )
                self._fit.end()  # it was ended by an exception
            self._corrector = None
            self.raw_is_loaded = False
            self._fit = LightningRun(self, trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Strategies that load into the module by themselves have loaded corrected factors: put the raw ones back."""
        if trainer.state.fn != "fit" or CHECKPOINT_KEY not in checkpoint:
            return
        self._begin(trainer, pl_module)
        saved = checkpoint[CHECKPOINT_KEY]
        if not self.raw_is_loaded:
            adapter = self._corrector.adapter
            adapter.write(from_peft_state_dict(saved["raw"], list(adapter.layers), "checkpoint"))
        if self._recorder is not None and "texts" in saved:
            self._recorder.resume(Texts.from_json(saved["texts"]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the subspace and refuse what cannot be corrected, before the first step."""
        self._begin(trainer, pl_module)
        self._fit.follow_optimizers()
        self._renew()
        if self.heat_maps and trainer.is_global_zero:
            warn_if_unseen(of_loggers(trainer.loggers), trainer.enable_validation)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A data-aware penalty looks at the batches; a step counts where the batch that ends it does."""
        if self._fit is None or not self._fit.is_training:
            raise RuntimeError("expected CSULoRACallback to be added before trainer.fit(), but training had begun.")
        self._last_step = trainer.global_step  # not at setup: a resumed one is known only after it
        if self._recorder is not None:
            self._recorder.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Correct the live weights if asked to, and log the drift in the step that Lightning logs."""
        if self._recorder is not None:
            self._recorder.end_step()
        step = trainer.global_step
        if step == self._last_step:  # accumulating gradients
            return
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._renew()
            self._corrector.step()
        behaviour, drift = {}, {}
        if self.probe_every_n_steps is not None and step % self.probe_every_n_steps == 0:
            behaviour = self._fit.measure()
        every = self.log_every_n_steps or trainer.log_every_n_steps
        if every and step % every == 0:
            self._renew(if_doubled=True)
            drift = self._corrector.measure()  # after it: of the strength that was found just now
            self._fit.stopping.check({**UNMEASURED, **drift})
        _log(pl_module, {**drift, **behaviour}, on_step=True, on_epoch=False)
        self._fit.stopping.check(behaviour)
        self._fit.stopping.save()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was measured in the validation stands beside its loss, for monitors too, which read it after this."""
        if self._fit is not None and trainer.state.fn == "fit":  # one by hand may follow a fit that was ended midway
            behaviour = self._fit.measured_in_validation()
            _log(pl_module, behaviour, sync_dist=True)
            if behaviour:
                self._fit.stopping.check(behaviour)
            self._fit.draw_validated()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was exceeded in the validation is saved where ``ModelCheckpoint`` saves, and averages are out again."""
        if self._fit is not None and trainer.state.fn == "fit":
            self._fit.stopping.save()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """An interrupted run is left with the weights it was training; a save of it is corrected."""
        if self._recorder is not None:
            self._recorder.end_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the corrected model in memory; checkpoints written after this find it corrected already."""
        self._renew()
        self._fit.apply()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An averaging callback may have brought its weights in after that."""
        self._fit.finish()
        self.budget.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind in module and strategy."""
        if stage == "fit" and self._fit is not None:
            self._fit.end()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._corrector is None:
            self._corrector = self._prepare(pl_module, verbose=trainer.is_global_zero)
            self._fit.open(self._corrector, self._recorder, self._behaviour)


def _log(pl_module: LightningModule, metrics: dict[str, float], **how: bool) -> None:
    for name, value in metrics.items():
        pl_module.log(name, value, prog_bar=name in _IN_PROGRESS_BAR, **how)
