"""When the correction runs in ``transformers.Trainer``: a run opens when training begins, and ends itself."""

from __future__ import annotations

import os
from abc import abstractmethod

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from csulora_callback import sidecar
from csulora_callback.behaviour import Behaviour
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.trainers.engines import refuse_engine, refuse_engine_of_generation
from csulora_callback.trainers.huggingface_run import HuggingFaceRun
from csulora_callback.trainers.patches import calling, run_of
from csulora_callback.trainers.publishing import follow_pushes, refuse_pushes
from csulora_callback.trainers.recorder import ActivationRecorder
from csulora_callback.trainers.save_pretrained import saver_of
from csulora_callback.trainers.tracker_images import of_callbacks, warn_if_unseen


class HuggingFaceEvents(TrainerCallback):
    """The half of :class:`~csulora_callback.CSULoRACallback` that listens to ``transformers.Trainer``."""

    evaluate_corrected: bool
    resume_from: str | os.PathLike | None
    push_raw: bool
    heat_maps: bool
    _corrector: SafetyCorrector | None
    _recorder: ActivationRecorder | None
    _behaviour: Behaviour | None

    def __init__(self) -> None:
        self._run: HuggingFaceRun | None = None

    @abstractmethod
    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector: ...

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Estimate the subspace, refuse what cannot be corrected, and put raw factors back when resuming."""
        refuse_engine()
        if self.evaluate_corrected:
            refuse_engine_of_generation(args)
        refuse_pushes(args, self.push_raw)
        from transformers import Trainer  # costs a second, which those who use Lightning are spared

        trainer, handler = calling(Trainer), calling(CallbackHandler)
        saver = saver_of(model)
        if saver is None:
            raise ValueError(
                f"`model`: expected a PeftModel or a transformers model with an adapter, but got a "
                f"{type(model).__name__}, whose state dict the Trainer saves without a call that could be corrected."
            )
        for earlier in (self._run, run_of(saver, "save_pretrained")):
            if earlier is not None:
                if earlier.trainer is not trainer and earlier.is_training:
                    raise ValueError(
                        "`callbacks`: expected a CSULoRACallback and a model of this Trainer's own, but another "
                        "Trainer is still training with them. Make new ones for this one."
                    )
                earlier.close()  # it was ended by an exception
        if trainer is None or handler is None:
            raise RuntimeError("expected CSULoRACallback's events to be called by a Trainer, but they were not.")
        if any(isinstance(other, HuggingFaceEvents) and other is not self for other in handler.callbacks):
            raise ValueError(
                "`callbacks`: expected one CSULoRACallback, but got several. Combine them into one penalty."
            )
        self._corrector = self._prepare(model, verbose=state.is_world_process_zero)
        if self._corrector.adapter.name == sidecar.FOLDER:
            raise ValueError(
                f"`model`: expected an adapter of another name than '{sidecar.FOLDER}', which is that of the folder "
                "beside every adapter that is saved. Give it another adapter_name."
            )
        self._run = HuggingFaceRun(self, trainer, handler, self._corrector, self._recorder, self._behaviour)
        if state.global_step > 0:
            self._run.restore_raw(self.resume_from)
        self._run.renew()
        self._run.open(saver, self.evaluate_corrected)
        follow_pushes(trainer, self.push_raw)
        if self.heat_maps and state.is_world_process_zero:
            warn_if_unseen(of_callbacks(handler.callbacks), args.eval_strategy != "no" or args.eval_on_start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Refuse to look on: what was not there when training began corrects nothing."""
        if self._run is None or not self._run.is_training:
            raise RuntimeError("expected CSULoRACallback to be added before trainer.train(), but training had begun.")

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """The Trainer copies the adapter out of the checkpoint by file name; the sidecar has to follow it."""
        if self._run is not None and self._run.is_open:
            sidecar.copy(self._run.checkpoint_folder(), args.output_dir)
