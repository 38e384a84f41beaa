"""Gathers, while a model is trained, what its behaviour and a data-aware penalty are measured by."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.activations import Activations, Texts, known_as_text, running_model
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.factors import equal_each
from csulora_callback.models.listening import TokenVectors
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading import Rows
from csulora_callback.models.training_batches import TrainedBatch, Wanted
from csulora_callback.models.training_rows import TrainingRows
from csulora_callback.refused_rows import RefusedRows
from csulora_callback.target import Target

logger = logging.getLogger(__name__)


class ActivationRecorder:
    """Keeps some rows of the training data, and has the model read them and prompts when it is to be corrected.

    The first process's rows count for all. Where the penalty is not data-aware, the corrector gets the texts alone.

    Args:
        adapter: of the model that is trained.
        probes: prompts that are to be refused.
        held_back: places of those that the model does not read.
        processes: those of the run, which all have to do the same.
        reads: whether the penalty is data-aware, so that the model has to read them.
        target: looks for the penalty's strength whenever the corrector got something new to measure by.
        tokenizer: of the checkpoint under the adapter, to tell rows whose prompt the aligned model refuses; without it
            all rows count.
        skip_prefix: whether it reads no vectors of the prefix that all probes share.
    """

    def __init__(
        self,
        adapter: Adapter,
        probes: Rows,
        processes: Processes,
        reads: bool = True,
        held_back: Sequence[int] = (),
        target: Target | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        skip_prefix: bool = False,
    ) -> None:
        self.adapter, self.probes, self.processes, self.reads = adapter, probes, processes, reads
        self.skip_prefix = skip_prefix
        self.held_back, self.target = list(held_back), target
        self._refused = None if tokenizer is None else RefusedRows(adapter, tokenizer, processes)
        self._sample = TrainingRows()
        self._given = 0  # rows that the corrector knows of
        self._read_with: list[Tensor] | None = None  # the factors that the model read with
        self._looked, self._wanted = False, None
        self._said: set[str] = set()
        self._open = ExitStack()

    @contextmanager
    def looking(self, wanted: Wanted | None = None) -> Iterator[None]:
        """A training step runs inside, in which all rows are to be learned, or those that are ``wanted``."""
        self.begin_step()
        self._wanted = wanted
        try:
            yield
        finally:
            self.end_step()

    def begin_step(self) -> None:
        """Look at what the model reads until :meth:`end_step`; what it computes stays the same."""
        self.end_step()
        self._looked = True
        hook = running_model(self.adapter).register_forward_pre_hook(self._look, with_kwargs=True)
        self._open.callback(hook.remove)

    def end_step(self) -> None:
        """Take the hook out of the model; nothing happens where there is none."""
        self._open.close()
        self._wanted = None

    def unread(self) -> Activations:
        """What a corrector starts with: nothing of the task or of the probes is known before :meth:`renew`."""
        return Activations({}, {}, Texts([], self.probes, 0, held_back=self.held_back), self.skip_prefix)

    def _read(self) -> Activations:
        sample = self._sample
        known = {"task": list(sample.rows), "seen": sample.seen, "starts": list(sample.starts)}
        known |= {"inputs": dict(sample.inputs), "left_out": sample.left_out}
        texts = self.processes.from_first(replace(self.unread().texts, **known))
        self._warn(texts)
        if self._refused is not None:
            texts = self._refused.mark(texts)
        if not self.reads:
            return Activations({}, {}, texts)
        own = self.processes.together(lambda: Activations.read(self.adapter, texts, self.skip_prefix))
        if (unreached := own.unreached(self.adapter)) is not None:
            self._warn_once("unreached", unreached)
        return replace(own, task=self._of_first(own.task), probes=self._of_first(own.probes))

    def _warn(self, texts: Texts) -> None:
        """Of what is missing in the sample."""
        total, unread = texts.seen + texts.left_out, len(texts.unreadable)
        if texts.left_out:
            unknown = (
                "" if texts.task else " So nothing is known of the task: a data-aware correction costs more of it."
            )
            self._warn_once(
                "left out",
                f"{texts.left_out} of {total} rows of training data are not in the sample: it is not certain which "
                "images, audio or labels of their batch are theirs, or they take more than 32 MB. It would be with "
                f"per_device_train_batch_size=1. Records count them (left_out_rows).{unknown}",
            )
        elif self._looked and not texts.task:
            self._warn_once(
                "unseen",
                "No row of training data was seen, so nothing is known of the task: it is not measured, and a "
                "data-aware correction costs more of it. Is the model compiled, or called by another way than its "
                "forward?",
            )
        if unread:
            self._warn_once(
                "unreadable",
                f"{unread} of {len(texts.task)} sampled rows came with images or audio, which checkpoints do not "
                "hold: they are not read until others take their places. Training itself goes on as it was.",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._said and self.processes.rank == 0:
            self._said.add(about)
            logger.warning(message)

    def _of_first(self, vectors: TokenVectors) -> TokenVectors:
        """The first process's, so that all correct alike; one tensor at a time, as all together can be gigabytes."""
        tensors = {id(tensor): tensor for tensor in vectors.values()}
        tensors = {key: self.processes.from_first(tensor) for key, tensor in tensors.items()}
        return {name: tensors[id(tensor)] for name, tensor in vectors.items()}

    def renew(self, corrector: SafetyCorrector, if_doubled: bool = False) -> None:
        """Give the corrector new activations; ``if_doubled``, only where the rows have doubled since the last time.

        Nothing happens where the model has read with these factors already, or while the live ones are corrected: what
        is measured is the raw model. Collective.
        """
        seen = self.processes.from_first(self._sample.seen + self._sample.left_out)
        if if_doubled and seen < 2 * max(self._given, 1):
            return
        held = self.adapter.held()
        again = self._read_with is not None and all(equal_each(held, self._read_with)) and seen == self._given
        if all(self.processes.gather(again)) or corrector.is_live():
            return
        before = [tensor.clone() for tensor in held]
        corrector.activations = self._read()
        if self.target is not None:
            self.target.choose(corrector)
        self._given, self._read_with = seen, before  # last: what was interrupted is done anew

    def resume(self, texts: Texts) -> None:
        """Go on from what a checkpoint holds: with its rows."""
        texts = known_as_text(texts, running_model(self.adapter).config)
        sample = TrainingRows(list(texts.task), texts.seen, list(texts.starts), dict(texts.inputs), texts.left_out)
        self._sample, self._read_with = sample, None
        if self._refused is not None:
            self._refused.resume(texts)

    def _look(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # an evaluation, a reference model's pass, or our own reading
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                f"`probes`: expected a model that is trained on input_ids, but this one got {sorted(kwargs)}. Leave "
                "them out, and use a penalty that is not data-aware."
            )
        if self.processes.rank == 0:
            batch = TrainedBatch(ids.detach(), kwargs, running_model(self.adapter).config, self._wanted)
            self._sample.offer(batch)
            self._sample.left_out += batch.left_out
