"""One run of ``transformers.Trainer``: what is replaced in it while it lasts, and what that does when it is called.

Nothing here remembers weights: what is corrected is what lies in the model when a forward pass of an evaluation, a
checkpoint or ``on_save`` begins, whoever put it there, and what is put back is what lay there, unless someone else has
written in between. Methods are replaced, not events listened to, because only they end in the same place after an
exception, and because the order of callbacks then does not matter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import nn
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from csulora_callback import sidecar
from csulora_callback.behaviour import Behaviour
from csulora_callback.budget import UNMEASURED
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrected_config import forget, remember
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.factors import cast_alike
from csulora_callback.trainers.engines import saves_shards_only
from csulora_callback.trainers.patches import Patches, calling, is_running, surrounded
from csulora_callback.trainers.preferences import wanted_rows
from csulora_callback.trainers.recorder import ActivationRecorder
from csulora_callback.trainers.resume import find_sidecar, raw_of_resumed
from csulora_callback.trainers.save_pretrained import saving_corrected
from csulora_callback.trainers.stopping import StoppingTrainer
from csulora_callback.trainers.tracker_images import of_callbacks, send_heat_maps

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)


def innermost_optimizer(optimizer: object) -> object:
    """The optimizer without accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


class HuggingFaceRun:
    """A corrector at work in a Trainer, from ``on_train_begin`` to the end of ``on_train_end``."""

    def __init__(
        self,
        callback: object,
        trainer: Trainer,
        handler: CallbackHandler,
        corrector: SafetyCorrector,
        recorder: ActivationRecorder | None,
        behaviour: Behaviour | None,
    ) -> None:
        self.callback, self.trainer, self.handler = callback, trainer, handler
        self.corrector, self.recorder, self.behaviour = corrector, recorder, behaviour
        self.stopping = StoppingTrainer(callback.budget, trainer)
        self._patches, self._optimizer, self._thread = Patches(self), Patches(self), threading.get_ident()
        self._is_finished = False
        self._drawn_at: int | None = None  # the last step of which there are heat maps

    @property
    def is_training(self) -> bool:
        """Whether its Trainer trains at the moment, and was not ended by an exception."""
        return self.is_open and is_running(self.trainer, self._thread, "train")

    @property
    def is_open(self) -> bool:
        """Whether it lasts, or was ended by an exception and not by its Trainer."""
        return self._patches.in_place

    @property
    def state(self) -> TrainerState:
        return self.trainer.state

    def open(self, model: nn.Module, evaluate_corrected: bool) -> None:
        """Replace what has to be replaced; ``model`` is the one whose ``save_pretrained`` writes the adapter."""
        forget(self.corrector.adapter.config)
        self._patches.replace(model, "save_pretrained", saving_corrected(self, model))
        self._surround(self.trainer, "_maybe_log_save_evaluate", self.stopping.look)
        self._surround(self.trainer, "_save_checkpoint", self._checkpoint)
        if evaluate_corrected:
            self._surround(self.trainer, "prediction_step", self._corrected)
            if callable(vars(self.trainer).get("evaluator")):  # of sentence-transformers: it runs the model by itself
                self._surround(self.trainer, "evaluator", self._corrected)
        if self.recorder is not None:
            self._surround(self.trainer, "training_step", self._looking)
        if self.behaviour is not None or self.callback.heat_maps:
            self._surround(self.trainer, "evaluation_loop", self._evaluation)
        self._surround(self.handler, "on_save", self._corrected)
        self._surround(self.handler, "on_step_end", self._step_end)
        self._surround(self.handler, "on_log", self._log)
        self._surround(self.handler, "on_train_end", self._train_end)
        for name in ("train", "eval"):  # of optimizers that keep other weights for evaluations, such as schedule-free
            optimizer = innermost_optimizer(self.trainer.optimizer)
            if hasattr(optimizer, name):
                self._optimizer.replace(optimizer, name, surrounded(self._switch, self._is_in_list))

    def close(self) -> None:
        """Put back all that was replaced; twice is once."""
        self._patches.undo()

    def is_saving(self) -> bool:
        """Whether a save that begins now is one of this run.

        While the Trainer trains, all are. After an exception those by hand and those of its own are, not those of
        another Trainer that has got the model since.
        """
        from transformers import Trainer  # not at the top, see HuggingFaceEvents.on_train_begin

        return self._is_listening() and (self.is_training or calling(Trainer) in (None, self.trainer))

    def checkpoint_folder(self) -> Path:
        """The folder of the present step."""
        return Path(self.trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def restore_raw(self, resume_from: str | None) -> None:
        """On resume the corrected adapter was loaded: put back the raw one. DeepSpeed has loaded it by itself."""
        live = self.corrector.adapter.read()
        saved = raw_of_resumed(
            live, self.state, self.checkpoint_folder(), Path(self.trainer.args.output_dir), resume_from
        )
        if saved is not None:
            # Rounded as what was loaded was: a resume without the callback would have loaded the raw factors so.
            corrected = live if saved.corrected is None else saved.corrected
            self.corrector.adapter.write(cast_alike(live, corrected, saved.raw) or saved.raw)
            if self.recorder is not None and saved.texts is not None:
                self.recorder.resume(saved.texts)
            elif self.recorder is not None:
                logger.warning(
                    "The checkpoint has no %s/%s, as those from the Hub have none: what it is measured and corrected "
                    "by begins a new sample of the training data. Training itself goes on as it was.",
                    sidecar.FOLDER,
                    sidecar.TEXTS,
                )

    def renew(self, if_doubled: bool = False) -> None:
        """Give the corrector what a data-aware penalty measures by, as the model is now. Collective."""
        if self.recorder is not None:
            self.recorder.renew(self.corrector, if_doubled)

    def renew_alone(self) -> None:
        """The same before a save by hand: of several processes one alone may be here, or another thread."""
        alone = self.recorder is not None and self.recorder.processes.size == 1
        if alone and threading.get_ident() == self._thread:
            self.renew()

    def record(self, adapter: CorrectedAdapter) -> None:
        """A save between two log records gets one of its own, so that the checkpoint's state says it is corrected."""
        step, history = self.state.global_step, self.state.log_history
        of_step = takewhile(lambda record: record.get("step") == step, reversed(history))
        logged = any("csulora/update_norm" in record for record in of_step)
        if adapter.metrics and not logged:
            history.append({**adapter.metrics, "epoch": self.state.epoch, "step": step})

    def measure(self) -> dict[str, float]:
        """What the model does as it stands, and corrected; nothing without probes. Collective."""
        self.renew()
        return {} if self.behaviour is None else self.behaviour.measure(self.corrector)

    def _surround(self, owner: object, name: str, call: Callable) -> None:
        self._patches.replace(owner, name, surrounded(call, self._is_listening))

    def _is_listening(self) -> bool:
        return self.is_open and self._is_in_list()

    def _is_in_list(self) -> bool:
        """Users may remove the callback from the Trainer's list at any time."""
        return any(callback is self.callback for callback in self.handler.callbacks)

    def _corrected(self, original: Callable, *args: object, **kwargs: object) -> object:
        self.renew()
        with self.corrector.corrected():
            return original(*args, **kwargs)

    def _evaluation(self, original: Callable, *args: object, **kwargs: object) -> EvalLoopOutput:
        # After the loop: an optimizer that keeps other weights for evaluations has brought them in by then. And in
        # what the loop returns: whatever the Trainer logs, chooses its best checkpoint and stops by comes from there.
        output = original(*args, **kwargs)
        prefix, behaviour = kwargs.get("metric_key_prefix", "eval"), self.measure()
        output.metrics.update({f"{prefix}_{key}": value for key, value in behaviour.items()})
        if self.is_training:  # and was not ended by an exception
            self.stopping.check(behaviour)
            self._draw()
        return output

    def _draw(self) -> None:
        """Heat maps of what was evaluated; of several data sets each one is an evaluation, and one is enough."""
        if self.callback.heat_maps and self._drawn_at != self.state.global_step:
            self._drawn_at = self.state.global_step
            adapter = self.corrector.compute()  # collective where parameters are sharded
            if self.state.is_world_process_zero:
                send_heat_maps(self.corrector, adapter, of_callbacks(self.handler.callbacks), self._drawn_at)

    def _log_behaviour(self) -> dict[str, float]:
        """A record of its own for a checkpoint, for history and trackers alike.

        Not by ``trainer.log``, where TRL would add, and forget, what it has gathered for the next record of its own.
        """
        behaviour = self.measure()
        if behaviour:
            logs = {**behaviour, "epoch": self.state.epoch}
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.handler.on_log(self.trainer.args, self.state, self.trainer.control, logs)
        return behaviour

    def _looking(self, original: Callable, *args: object, **kwargs: object) -> object:
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        with self.recorder.looking(wanted_rows(self.trainer, inputs)):
            return original(*args, **kwargs)

    def _checkpoint(self, original: Callable, *args: object, **kwargs: object) -> object:
        # A subclass may write files of its own here, and engines write live shards. Otherwise save_pretrained writes.
        beside_shards = saves_shards_only() and self.state.is_world_process_zero
        if beside_shards:
            sidecar.discard(self.checkpoint_folder())
        behaviour = self._log_behaviour()
        if self.callback.budget.limits:  # before the record is written
            self.stopping.check({**UNMEASURED, **self.corrector.compute().metrics, **behaviour})
        with self.corrector.corrected() as adapter:
            result = original(*args, **kwargs)
        self.stopping.saved()
        if beside_shards:
            own = self.corrector.adapter
            adapter.sidecar_of_checkpoint.save(self.checkpoint_folder(), own.config, slots=own.slots)
            self.record(adapter)
        return result

    def _step_end(self, original: Callable, *args: object, **kwargs: object) -> object:
        control = original(*args, **kwargs)  # the others first: they may read, or bring in, raw weights
        every = self.callback.every_n_steps
        if every is not None and self.state.global_step % every == 0:
            self.renew()
            self.corrector.step()
        return control

    def _log(self, original: Callable, args: object, state: TrainerState, control: object, logs: dict) -> object:
        # Before any callback has read the record: those that report to trackers stand early in the list.
        if "loss" in logs and state.global_step % (self.callback.log_every_n_steps or 1) == 0:
            every = self.callback.probe_every_n_steps
            behaviour = self.measure() if every is not None and state.global_step % every == 0 else {}
            self.renew(if_doubled=True)
            metrics = {**self.corrector.measure(), **behaviour}  # of the strength that was found just now
            logs.update(metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(metrics)
            control = original(args, state, control, logs)
            self.stopping.check({**UNMEASURED, **metrics})  # after it: the others find the record as the last one
            return control
        return original(args, state, control, logs)

    def _train_end(self, original: Callable, *args: object, **kwargs: object) -> object:
        self._mark_best()
        self._apply()
        self.callback.budget.end()
        control = original(*args, **kwargs)
        self._apply()  # a moving average may have come in
        self._remember()
        self.close()
        self.callback._run = None  # which would keep Trainer and optimizer alive
        return control

    def _remember(self) -> None:
        if isinstance(self.corrector.adapter.holder, PeftModel):  # others save the config before the weights
            remember(self.corrector.adapter.config, self.corrector.compute())

    def _switch(self, original: Callable, *args: object, **kwargs: object) -> object:
        """Goes from the weights that are trained to others and back, relative to what they are."""
        with self.corrector.lifted(for_good=self._is_finished):
            result = original(*args, **kwargs)
        if self._is_finished:
            self._remember()
        return result

    def _apply(self) -> None:
        self.renew()  # of the raw model only: nothing is read where a corrected one is live
        self.corrector.apply()
        self._is_finished = True

    def _mark_best(self) -> None:
        """The best checkpoint, if one was loaded, is corrected already."""
        best = self.state.best_model_checkpoint
        if self.trainer.args.load_best_model_at_end and best is not None:
            live = self.corrector.adapter.read()
            saved = find_sidecar(live, [Path(best)])
            if saved is not None:
                corrected = live if saved.corrected is None else saved.corrected
                self.corrector.mark_applied(
                    CorrectedAdapter(saved.raw, corrected, saved.record["metrics"], lambda: saved.record, saved.texts)
                )
