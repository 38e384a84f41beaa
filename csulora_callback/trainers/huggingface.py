"""When the correction runs in ``transformers.Trainer``: its events translated into calls of the corrector.

What the Trainer saves and evaluates is corrected by opening a *window* (corrected factors live) when a step or an
epoch has decided to evaluate or save, and closing it once the save is done. Saves that come from elsewhere (a signal,
a later callback, ``trainer.save_model()`` by hand) go through the model's ``save_pretrained``, which is wrapped to
correct around the call and to write the sidecar into the same folder.
"""

from __future__ import annotations

import inspect
import logging
import os
import types
from abc import abstractmethod
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from csulora_callback import sidecar
from csulora_callback.corrector import CorrectedAdapter, SafetyCorrector
from csulora_callback.models.factors import digest
from csulora_callback.trainers.engines import refuse_engine, saves_shards_only
from csulora_callback.trainers.recorder import ActivationRecorder

logger = logging.getLogger(__name__)


class HuggingFaceEvents(TrainerCallback):
    """The half of :class:`~csulora_callback.CSULoRACallback` that listens to ``transformers.Trainer``."""

    every_n_steps: int | None
    evaluate_corrected: bool
    log_every_n_steps: int | None
    resume_from: str | os.PathLike | None

    def __init__(self) -> None:
        self._corrector: SafetyCorrector | None = None
        self._recorder: ActivationRecorder | None = None
        self._state: TrainerState | None = None
        self._handler: CallbackHandler | None = None
        self._training = False

    @abstractmethod
    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector: ...

    @abstractmethod
    def _renew(self, if_doubled: bool = False) -> None: ...

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Estimate the subspace, refuse what cannot be corrected, and put raw factors back when resuming."""
        if self._corrector is not None and state.global_step == 0:
            # A run that crashed inside the window left corrected factors behind (a resume has loaded over them).
            self._corrector.restore()
        self._handler = _calling_handler()
        _surround(self._handler, self)
        refuse_engine(self.evaluate_corrected)
        if not isinstance(model, (PeftModel, PreTrainedModel)):
            raise ValueError(
                f"`model`: expected a PeftModel or a transformers model with an adapter, but got a "
                f"{type(model).__name__}, whose state dict the Trainer saves without a call that could be corrected."
            )
        self._corrector = self._prepare(model, verbose=state.is_world_process_zero)
        self._state = state
        if state.global_step > 0:
            self._restore_raw(args, state)
        self._renew()
        self._wrap_save_pretrained(model, args)
        self._training = True
        if args.eval_on_start and self.evaluate_corrected:
            self._corrector.swap_in()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close the window if no save has: what is trained is raw."""
        self._corrector.restore()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close the window if no save has: what is trained is raw. A data-aware penalty looks at the batches."""
        self._corrector.restore()
        if self._recorder is not None:
            self._recorder.begin_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs
    ) -> None:
        """Add the drift to the record that holds the loss, before any reporting callback has read it."""
        if "loss" in logs and state.global_step % (self.log_every_n_steps or 1) == 0:
            self._renew(if_doubled=True)
            metrics = self._corrector.measure()
            logs.update(metrics)
            state.log_history[-1].update(metrics)
        if "train_runtime" in logs:
            # The last record, before the best model is loaded: raw factors put back any later would overwrite it.
            self._corrector.restore()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """The Trainer copies the adapter out of the checkpoint by file name; the sidecar has to follow it."""
        if self._training:
            sidecar.copy(_checkpoint_folder(args, state), args.output_dir)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """The checkpoint is written: close the window."""
        folder = _checkpoint_folder(args, state)
        if saves_shards_only() and state.is_world_process_zero and folder.is_dir():
            self._corrector.compute().sidecar_of_checkpoint.save(folder)  # no save_pretrained was there to do it
        self._corrector.restore()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Leave the corrected model in memory; the best checkpoint, if one was loaded, is corrected already."""
        corrector = self._corrector
        corrector.restore()
        self._training = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            live = corrector.adapter.read()
            if _find_sidecar(digest(live), [Path(state.best_model_checkpoint)]):
                saved = sidecar.Sidecar.load(state.best_model_checkpoint)
                corrector.mark_applied(
                    CorrectedAdapter(saved.raw, live, saved.record["metrics"], lambda: saved.record, saved.texts)
                )
        self._renew()  # of the raw model only: nothing is read where the best checkpoint is live
        corrector.apply()

    def _after_step(self, state: TrainerState, control: TrainerControl) -> None:
        if self._recorder is not None:
            self._recorder.end_step()
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._renew()
            self._corrector.step()
        self._open_window(control)

    def _open_window(self, control: TrainerControl) -> None:
        # With save_strategy="best" the save is decided only after the evaluation. Where evaluations are to see raw
        # weights, a save that follows one is left to the wrapped save_pretrained.
        if control.should_evaluate or control.should_save:
            self._renew()
        if self.evaluate_corrected if control.should_evaluate else control.should_save:
            self._corrector.swap_in()

    def _restore_raw(self, args: TrainingArguments, state: TrainerState) -> None:
        """On resume the corrected adapter was loaded: find its sidecar by the digest of the live factors.

        DeepSpeed loads the raw factors itself, from the optimizer's copy.
        """
        live = digest(self._corrector.adapter.read())
        if self.resume_from is not None:
            place, folders = self.resume_from, [Path(self.resume_from)]
        else:
            # The step's own folder first; then any other, such as a last-checkpoint fetched from the Hub.
            records = Path(args.output_dir).glob(f"**/{sidecar.FOLDER}/{sidecar.RECORD}")
            place = args.output_dir
            folders = chain([_checkpoint_folder(args, state)], (record.parent.parent for record in records))
        folder = _find_sidecar(live, folders)
        if folder is not None:
            saved = sidecar.Sidecar.load(folder)
            self._corrector.adapter.write(saved.raw)
            if self._recorder is not None and saved.texts is not None:
                self._recorder.resume(saved.texts)
        elif self.resume_from is not None or any("csulora/update_norm" in record for record in state.log_history):
            raise ValueError(
                f"`resume_from`: training resumes at step {state.global_step} from a corrected checkpoint, but its "
                f"raw factors were not found: no {sidecar.FOLDER}/{sidecar.RECORD} in {place} belongs "
                "to the adapter in the model. Pass CSULoRACallback(resume_from=...) with the folder that "
                "trainer.train() got."
            )

    def _wrap_save_pretrained(self, model: nn.Module, args: TrainingArguments) -> None:
        # Held by the wrapper: the callback itself may be on to another model by the time this one is saved again.
        corrector, recorder, state, arguments = self._corrector, self._recorder, self._state, args
        original = model.save_pretrained
        if hasattr(original, "uncorrected"):  # a callback of an earlier run wrapped it: correct once, not twice
            original = original.uncorrected

        def save_pretrained(target: nn.Module, save_directory: str | os.PathLike, *args, **kwargs) -> object:
            if target is not model or not self._listening:  # a deep copy, or a model whose callback was removed
                return type(target).save_pretrained(target, save_directory, *args, **kwargs)
            if kwargs.get("state_dict") is not None:
                return save_state_dict(save_directory, *args, **kwargs)
            if recorder is not None and recorder.processes.size == 1:  # of several, one alone may be here
                recorder.renew(corrector)
            with corrector.corrected() as adapter:
                write_sidecar(adapter, save_directory, kwargs)
                return original(save_directory, *args, **kwargs)

        def save_state_dict(save_directory: str | os.PathLike, *args, state_dict: dict, **kwargs) -> object:
            # Gathered from all processes, while only the one that writes is here: nothing collective may follow.
            factors = corrector.adapter.factors_in(state_dict, model)
            adapter = corrector.swapped_in if factors is None else corrector.compute(factors)
            if adapter is None:
                logger.warning("A state_dict without LoRA factors is saved outside a checkpoint: it is not corrected.")
                return original(save_directory, *args, state_dict=state_dict, **kwargs)
            write_sidecar(adapter, save_directory, kwargs)
            state_dict = {**state_dict, **corrector.adapter.to_state_dict(adapter.corrected, model)}
            return original(save_directory, *args, state_dict=state_dict, **kwargs)

        def write_sidecar(adapter: CorrectedAdapter, save_directory: str | os.PathLike, kwargs: dict) -> None:
            if kwargs.get("is_main_process", True):
                checkpoint = Path(save_directory).resolve() == _checkpoint_folder(arguments, state).resolve()
                (adapter.sidecar_of_checkpoint if checkpoint else adapter.sidecar).save(save_directory)
            self._record_save(adapter, state)

        save_pretrained.uncorrected = original
        model.save_pretrained = types.MethodType(save_pretrained, model)

    @property
    def _listening(self) -> bool:
        """Whether the callback is still in the trainer's list: users may remove it between two runs."""
        return any(callback is self for callback in self._handler.callbacks)

    def _record_save(self, adapter: CorrectedAdapter, state: TrainerState) -> None:
        """A save between two log records gets one of its own, so that the checkpoint's state says it is corrected."""
        step, history = state.global_step, state.log_history
        logged = any("csulora/update_norm" in record and record["step"] == step for record in history[-3:])
        if self._training and adapter.metrics and not logged:
            history.append({**adapter.metrics, "epoch": state.epoch, "step": step})


class _AfterOthers(TrainerCallback):
    """Stands last in the Trainer's list: other callbacks may still ask for a save, or read the raw weights."""

    def __init__(self, events: HuggingFaceEvents) -> None:
        self.events = events

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.events._listening:
            self.events._after_step(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.events._listening:
            self.events._open_window(control)


def _calling_handler() -> CallbackHandler:
    """The handler that is calling: events get no reference to it, and the order of its list decides who sees what."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), CallbackHandler):
            return frame.f_locals["self"]
        frame = frame.f_back
    raise RuntimeError("expected CSULoRACallback's events to be called by a transformers.Trainer, but they were not.")


def _surround(handler: CallbackHandler, events: HuggingFaceEvents) -> None:
    """First in the list for ``on_log`` (reporting callbacks read after it), last for ``on_step_end``."""
    others = [
        callback
        for callback in handler.callbacks
        if callback is not events and not (isinstance(callback, _AfterOthers) and callback.events is events)
    ]
    if any(isinstance(callback, HuggingFaceEvents) for callback in others):
        raise ValueError("`callbacks`: expected one CSULoRACallback, but got several. Combine them into one penalty.")
    # A new list: the handler is iterating over the old one, where an insertion would call someone twice.
    handler.callbacks = [events, *others, _AfterOthers(events)]


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _find_sidecar(live: str, folders: Iterable[Path]) -> Path | None:
    """The first folder whose sidecar belongs to the factors, corrected or raw, with this digest."""
    for folder in folders:
        if not (folder / sidecar.FOLDER / sidecar.RECORD).is_file():
            continue
        try:
            record = sidecar.read_record(folder)
        except ValueError:  # some other run's broken file is no reason not to resume this one
            continue
        if live in (record.get("corrected_digest"), record.get("raw_digest")):
            return folder
    return None
