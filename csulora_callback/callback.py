"""The public callback: its arguments, and the corrector they describe. When it runs is up to the trainers' halves."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from torch import nn

from csulora_callback.arguments import (
    check_flags,
    check_folders,
    check_measuring,
    check_names,
    check_sides,
    check_steps,
    choose_penalty,
)
from csulora_callback.behaviour import Behaviour, Refusals
from csulora_callback.budget import Budget
from csulora_callback.checked_probes import FEWEST, CheckedProbes, check_probes, check_readable
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.method.basis import check_rank_rule
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.search import STRONGEST
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.beside import check_displaced
from csulora_callback.models.checkpoint import Checkpoint, open_checkpoint
from csulora_callback.models.layout import Layout
from csulora_callback.models.named import naming
from csulora_callback.models.probes import Probes, check_contents, read_prompts
from csulora_callback.models.processes import Processes
from csulora_callback.models.under_adapter import weights_under
from csulora_callback.presets import Family
from csulora_callback.reporting.start import print_start, start_table
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_cache import default_cache_dir
from csulora_callback.subspace_origin import check_origin, check_under
from csulora_callback.target import Target, fewest_probes, held_back
from csulora_callback.trainers.huggingface import HuggingFaceEvents
from csulora_callback.trainers.lightning import LightningEvents
from csulora_callback.trainers.lightning_run import LightningRun
from csulora_callback.trainers.mixing import also_lightnings, bare, importable
from csulora_callback.trainers.recorder import ActivationRecorder
from csulora_callback.trainers.tracker_images import check_drawing


class CSULoRACallback(HuggingFaceEvents, LightningEvents):
    r"""Keeps what a LoRA fine-tune ships inside the safety subspace of the aligned model it started from.

    The subspace of a module is spanned by the leading singular vectors of \\( W_{aligned} − W_{base} \\). The update
    \\( Δ = s·B·A \\) is split by it into aligned, partially aligned and off-subspace parts, and the closest safe
    update

    \\( X^* = \arg\min_X ‖X − Δ‖² + \sum_b λ_b ‖Π_b X‖² \\)

    is what every checkpoint holds, what the trainer evaluates, and what the model ends as. What is trained is not
    touched (unless ``every_n_steps`` asks for it): training is bit-identical to training without the callback. The raw
    factors lie beside every checkpoint in ``csulora/``, so that resuming is exact and the correction can be undone.
    After CSULoRA (arXiv 2605.30640); what of it is the paper's and what is ours:
    see :mod:`csulora_callback.method.correction`.

    Args:
        base_model: the unaligned base checkpoint \\( W_{base} \\): a folder, a Hub id, or a module in memory.
        aligned_model: \\( W_{aligned} \\), likewise. By default the weights that the adapter sits on: those in memory,
            or the files that they were loaded from, where any adapted layer is quantized. Needed where these are, too.
        subspace: a :class:`SafetySubspace` or the path of a saved one, instead of ``base_model``.
        rank: \\( k \\), the number of singular vectors on each side. By default a thirty-second of each module's
            smaller side (64 at 2048), at least 4.
        energy: keep the smallest \\( k \\) that holds this share of the displacement's energy, instead of ``rank``.
        penalty: the table of \\( λ_b \\), or, for a ``target``, a preset without its strength: ``Penalty.guard``. By
            default ``Penalty.data_aware`` where there are ``probes`` (where that is seen to refuse harmless requests,
            take ``Penalty.content_aware``), and otherwise the paper's, ``Penalty.csulora``.
        strength: of the default penalty; ``0`` corrects nothing. By default 10 without ``probes``, and with them what
            ``target`` finds. A ``penalty`` may have its own.
        target: the share of the aligned model's likelihood of refusing ``probes`` that what is saved has to keep
            (``exp(csulora/refusal_logprob_corrected)``), 0.9 by default where nothing gives a strength. At every save
            and evaluation the smallest strength that keeps it is looked for, in at most eight passes over prompts that
            the correction does not read: a data-aware one reads half of ``probes``. It is logged as
            ``csulora/strength``. Where none keeps it, the largest is taken, and a warning says so.
        every_n_steps: also correct the live weights in place every so many optimizer steps (a proximal-gradient
            step). Repeated correction compounds, and training is then no longer the one without the callback.
        evaluate_corrected: whether the trainer's evaluations see the corrected weights, which are those that ship.
        log_every_n_steps: add the drift only to log records of steps divisible by this. By default to every record
            that has a training loss.
        cache_dir: where estimated subspaces are kept, by the content of both checkpoints, and the aligned model's
            answers to the probes. By default ``~/.cache/csulora_callback``. One that is unusable costs a warning.
        resume_from: the checkpoint folder that ``transformers.Trainer`` resumes from, needed only where it does not
            lie in its output folder. Lightning's checkpoints hold everything themselves.
        push_raw: whether what ``transformers.Trainer`` uploads to the Hub holds the raw adapter, too. By default it
            holds the corrected one and the record of the correction, from which one reads what was done and cannot
            undo it; folders on this machine always hold all. Needed where ``hub_strategy`` uploads whole checkpoints
            (``"checkpoint"``, ``"all_checkpoints"``), which are there to resume from. ``model.push_to_hub()`` never
            takes the raw adapter along: it uploads no folders in folders.
        export_adapter: beside every Lightning checkpoint ``NAME.ckpt`` also write the corrected adapter as a PEFT
            folder ``NAME.adapter``.
        probes: prompts that the aligned model refuses: ``"builtin"``, a list, a file (lines of .txt, or the column
            ``prompt`` of .jsonl, .json or .csv), ``package:path`` or a Hub dataset. With any penalty, every evaluation
            and save then says how much of the refusing is left, before and after the correction, and what this costs
            the task (the keys of :class:`~csulora_callback.behaviour.Behaviour`; in the Trainer's evaluations with
            ``eval_`` before them). Data-aware penalties need them to correct by. The tokenizer is that of the
            checkpoint under the adapter. Repeated ones and those that the aligned model does not refuse are left
            out, and at least 8 have to be left, 16 for a target of a data-aware penalty; lists of token ids are not
            checked. Of more than 256 a fixed sample is read, and of each the first 512 tokens.
        probe_every_n_steps: measure that at log records of steps divisible by this too.
        max_drift: a budget: by logged key the most that it may be, such as ``{"csulora/alignment_undone": 0.05}``.
        min_refusal: the least that ``csulora/refusal_kept_corrected`` may be; needs ``probes``.
        on_exceed: what to do where one of these is exceeded: ``"warn"`` once, or also ``"stop"`` training with a
            corrected checkpoint saved. The reason is logged, recorded, and stands in the model card.
        uncorrected: names of what is trained beside LoRA and may pass as it is trained, knowingly, such as
            ``["score"]`` or ``["q_proj.bias"]``: modules or parameters, in full or their last parts. What is new to
            the aligned checkpoint passes without. Both are listed in the start table, the record and the model card.
        heat_maps: at every evaluation draw the drift by layer and kind of module, before and after the correction, to
            the trackers that take images: TensorBoard, W&B, MLflow and trackio. Needs the extra ``report``.

    Raises:
        ValueError: for arguments out of range or probes that cannot be read, and when training begins for anything
            that cannot be corrected: unsupported adapters, checkpoints that do not fit, a base equal to the aligned
            model.

    Example:
        >>> from csulora_callback import CSULoRACallback
        >>> callback = CSULoRACallback(base_model="meta-llama/Llama-3.2-1B")
        >>> # trainer = Trainer(model=peft_model, args=args, train_dataset=data, callbacks=[callback])
    """

    def __init__(
        self,
        base_model: str | os.PathLike | nn.Module | None = None,
        aligned_model: str | os.PathLike | nn.Module | None = None,
        subspace: SafetySubspace | str | os.PathLike | None = None,
        rank: int | None = None,
        energy: float | None = None,
        penalty: Penalty | Family | None = None,
        strength: float | None = None,
        target: float | None = None,
        every_n_steps: int | None = None,
        evaluate_corrected: bool = True,
        log_every_n_steps: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        resume_from: str | os.PathLike | None = None,
        export_adapter: bool = True,
        probes: Probes | None = None,
        probe_every_n_steps: int | None = None,
        push_raw: bool = False,
        max_drift: Mapping[str, float] | None = None,
        min_refusal: float | None = None,
        on_exceed: Literal["warn", "stop"] = "warn",
        heat_maps: bool = False,
        uncorrected: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._corrector: SafetyCorrector | None = None
        self._recorder: ActivationRecorder | None = None
        self._behaviour: Behaviour | None = None
        self._fit: LightningRun | None = None
        self.__class__ = also_lightnings(type(self))
        check_sides(base_model, aligned_model, subspace)
        check_rank_rule(rank, energy)
        self.penalty, self.target = choose_penalty(penalty, strength, target, probes is not None)
        check_steps(
            every_n_steps=every_n_steps, log_every_n_steps=log_every_n_steps, probe_every_n_steps=probe_every_n_steps
        )
        check_flags(evaluate_corrected=evaluate_corrected, export_adapter=export_adapter)
        check_flags(push_raw=push_raw, heat_maps=heat_maps)
        check_names(uncorrected=uncorrected)
        check_folders(cache_dir=cache_dir, resume_from=resume_from)
        if heat_maps:
            check_drawing()
        check_measuring(probes, probe_every_n_steps)
        self.base_model = base_model
        self.aligned_model = aligned_model
        self.subspace = subspace
        self.rank = rank
        self.energy = energy
        self.every_n_steps = every_n_steps
        self.evaluate_corrected = evaluate_corrected
        self.log_every_n_steps = log_every_n_steps
        if cache_dir is None and (base_model is not None or probes is not None):
            cache_dir = default_cache_dir()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.resume_from = resume_from
        self.export_adapter = export_adapter
        self.push_raw, self.heat_maps = push_raw, heat_maps
        self.uncorrected = tuple(uncorrected)
        self.probes = None if probes is None else read_prompts(probes)
        self.probe_every_n_steps = probe_every_n_steps
        self.budget = Budget(max_drift, min_refusal, on_exceed, has_probes=probes is not None)

    def __reduce__(self) -> tuple:
        return bare, (importable(type(self)),), {**self.__dict__, "_run": None, "_fit": None}  # at work in no Trainer

    def corrected(self) -> AbstractContextManager[CorrectedAdapter]:
        """What ships is live in the model inside: ``with callback.corrected(): ...``, while training or after it.

        Anywhere else the weights in memory are the raw ones until training ends. What is written into the model inside
        stays there. Collective where parameters are sharded.

        Raises:
            RuntimeError: before training has begun.

        Example:
            >>> CSULoRACallback(base_model="org/base").corrected()
            Traceback (most recent call last):
            RuntimeError: expected training to have begun, but this callback has no model yet.
        """
        if self._corrector is None:
            raise RuntimeError("expected training to have begun, but this callback has no model yet.")
        self._renew()
        return self._corrector.corrected()

    def on_train_end(self, *event: object, **kwargs: object) -> None:
        """The one event whose name both trainers use, with other arguments; only Lightning's needs it."""
        if len(event) == 2:
            LightningEvents.on_train_end(self, *event)

    def _prepare(self, model: nn.Module, verbose: bool) -> SafetyCorrector:
        """The corrector for ``model``; everything that can be refused is refused here, before the first step."""
        started, processes = time.perf_counter(), Processes.all()
        adapter = processes.together(lambda: find_adapter(model, self.aligned_model, self.uncorrected))
        penalty = self.penalty if self.target is None else self.penalty(STRONGEST)  # before one is looked for
        if self.probes is not None:
            check_readable(adapter, reads=penalty.on_probes is not None)
        subspace = self._subspace_for(adapter, verbose, processes)
        if self._recorder is not None:
            self._recorder.end_step()  # a run that crashed may have left it open
        probes = self._watch(adapter, penalty, processes, verbose)
        activations = None if self._recorder is None else self._recorder.unread()
        corrector = SafetyCorrector(adapter, subspace, penalty, activations)
        corrector.notes |= self.budget.begin()
        if self.subspace is not None and self.aligned_model is None:
            check_under(subspace, adapter, processes, self.cache_dir)
        elif self.subspace is not None:
            check_origin(subspace, self.aligned_model, processes, self.cache_dir)
        if verbose:
            seconds = time.perf_counter() - started
            print_start(corrector, start_table(corrector, seconds, probes, self.target, self.evaluate_corrected))
        return corrector

    def _renew(self, if_doubled: bool = False) -> None:
        """Give the corrector what a data-aware penalty measures by, as the model is now."""
        if self._recorder is not None:
            self._recorder.renew(self._corrector, if_doubled)

    def _watch(self, adapter: Adapter, penalty: Penalty, processes: Processes, verbose: bool) -> CheckedProbes | None:
        self._recorder = self._behaviour = None
        if self.probes is None:
            return None
        reads = penalty.on_probes is not None
        fewest = FEWEST if self.target is None else fewest_probes(reads)
        probes = check_probes(adapter, self.probes, self.cache_dir, processes, verbose, fewest=fewest)
        if penalty.skips_prefix:
            check_contents(probes.prompts)
        refusals = Refusals(adapter, probes.prompts, probes.beginnings, processes)
        back = [] if self.target is None else held_back(len(refusals), reads)
        measured = refusals.of(back) if back else refusals
        target = None if self.target is None else Target(self.target, self.penalty, measured)
        self._recorder = ActivationRecorder(
            adapter, probes.prompts, processes, reads, back, target, probes.tokenizer, penalty.skips_prefix
        )
        self._behaviour = Behaviour(measured)
        return probes

    def _subspace_for(self, adapter: Adapter, progress: bool, processes: Processes) -> SafetySubspace:
        if isinstance(self.subspace, SafetySubspace):
            return self.subspace
        if self.subspace is not None:
            return processes.together(lambda: SafetySubspace.load(self.subspace))
        aligned = self.aligned_model
        if aligned is None:
            aligned = processes.together(lambda: weights_under(adapter))
        names, layout = sorted(adapter.matrices), Layout.of(adapter.holder)
        if adapter.wholes:
            processes.together(lambda: check_displaced(adapter.wholes, open_checkpoint(self.base_model), layout))

        def opened(argument: str, source: object) -> Checkpoint:
            with naming(argument):
                return open_checkpoint(source, names, trained=layout)

        sides = {"base_model": self.base_model, "aligned_model": aligned}
        pair = (processes.together(lambda side=side: opened(*side)) for side in sides.items())
        return SafetySubspace.estimate(
            *pair,
            target_modules=names,
            rank=self.rank,
            energy=self.energy,
            progress=progress,
            cache_dir=self.cache_dir,
            processes=processes,
        )
