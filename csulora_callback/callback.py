"""The public callback: its arguments, and the corrector they describe. When it runs is up to the trainers' halves."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from torch import nn

from csulora_callback.arguments import check, check_source, is_path
from csulora_callback.behaviour import Behaviour, Refusals
from csulora_callback.checked_probes import CheckedProbes, check_probes
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.method.basis import check_rank_rule
from csulora_callback.method.penalty import Penalty
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.probes import Probes, read_prompts
from csulora_callback.models.processes import Processes
from csulora_callback.reporting.start import print_start
from csulora_callback.subspace import SafetySubspace, check_origin
from csulora_callback.subspace_cache import default_cache_dir
from csulora_callback.subspace_file import check_metadata
from csulora_callback.trainers.huggingface import HuggingFaceEvents
from csulora_callback.trainers.lightning import LightningEvents
from csulora_callback.trainers.lightning_run import LightningRun
from csulora_callback.trainers.recorder import ActivationRecorder

logger = logging.getLogger(__name__)

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # one project, two import names


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
        aligned_model: \\( W_{aligned} \\), likewise. By default the weights that the adapter sits on.
        subspace: a :class:`SafetySubspace` or the path of a saved one, instead of ``base_model``.
        rank: \\( k \\), the number of singular vectors on each side. By default a thirty-second of each module's
            smaller side (64 at 2048), at least 4.
        energy: keep the smallest \\( k \\) that holds this share of the displacement's energy, instead of ``rank``.
        penalty: the table of \\( λ_b \\). By default ``Penalty.csulora(strength)``.
        strength: of the default penalty, 10 by default; ``0`` corrects nothing. A ``penalty`` has its own.
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
            ``eval_`` before them). ``Penalty.data_aware`` needs them to correct by. The tokenizer is that of the
            checkpoint under the adapter. Those that the aligned model does not refuse are left out, and at least 8
            have to be left; lists of token ids are not checked. Of more than 256 a fixed sample is read, and of each
            the first 512 tokens.
        probe_every_n_steps: measure that at log records of steps divisible by this too.

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
        penalty: Penalty | None = None,
        strength: float | None = None,
        every_n_steps: int | None = None,
        evaluate_corrected: bool = True,
        log_every_n_steps: int | None = None,
        cache_dir: str | os.PathLike | None = None,
        resume_from: str | os.PathLike | None = None,
        export_adapter: bool = True,
        probes: Probes | None = None,
        probe_every_n_steps: int | None = None,
        push_raw: bool = False,
    ) -> None:
        super().__init__()
        self._corrector: SafetyCorrector | None = None
        self._recorder: ActivationRecorder | None = None
        self._behaviour: Behaviour | None = None
        self._fit: LightningRun | None = None
        self.__class__ = _also_lightnings(type(self))
        if (base_model is None) == (subspace is None):
            raise ValueError(
                "`base_model`: expected the unaligned base checkpoint, or a `subspace` instead, but got "
                f"{'neither' if base_model is None else 'both'}. "
                "Pass base_model='org/base' or subspace='file.safetensors'."
            )
        check_source("base_model", base_model, nn.Module)
        check_source("aligned_model", aligned_model, nn.Module)
        check_source("subspace", subspace, SafetySubspace)
        if isinstance(subspace, SafetySubspace):
            check_metadata(subspace.metadata)
        check_rank_rule(rank, energy)
        if penalty is not None and not isinstance(penalty, Penalty):
            raise ValueError(f"`penalty`: expected a Penalty such as Penalty.guard(3.0), but got {penalty!r}.")
        if penalty is not None and strength is not None:
            raise ValueError(
                f"`strength`: expected None beside `penalty`, which has its own, but got {strength!r} and {penalty}. "
                "Pass one of them, such as penalty=Penalty.guard(3.0)."
            )
        numbers = {
            "every_n_steps": every_n_steps,
            "log_every_n_steps": log_every_n_steps,
            "probe_every_n_steps": probe_every_n_steps,
        }
        for name, steps in numbers.items():
            whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
            check(name, steps is None or whole, "a number of steps ≥ 1 or None", steps)
        flags = {"evaluate_corrected": evaluate_corrected, "export_adapter": export_adapter, "push_raw": push_raw}
        for name, flag in flags.items():
            check(name, isinstance(flag, bool), "True or False", flag)
        for name, path in (("cache_dir", cache_dir), ("resume_from", resume_from)):
            check(name, path is None or is_path(path), "the path of a folder or None", path)
        if probes is None and penalty is not None and penalty.on_probes is not None:
            raise ValueError(
                "`probes`: expected prompts that are to be refused, as the penalty is data-aware, but got none. "
                "Pass probes='builtin', probes='prompts.jsonl', or a list."
            )
        if probes is None and probe_every_n_steps is not None:
            raise ValueError(
                f"`probe_every_n_steps`: expected None without `probes`, but got {probe_every_n_steps}. Pass "
                "probes='builtin' too."
            )
        self.base_model = base_model
        self.aligned_model = aligned_model
        self.subspace = subspace
        self.rank = rank
        self.energy = energy
        if penalty is None:
            penalty = Penalty.csulora() if strength is None else Penalty.csulora(strength)
        self.penalty = penalty
        self.every_n_steps = every_n_steps
        self.evaluate_corrected = evaluate_corrected
        self.log_every_n_steps = log_every_n_steps
        if cache_dir is None and (base_model is not None or probes is not None):
            cache_dir = default_cache_dir()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.resume_from = resume_from
        self.export_adapter = export_adapter
        self.push_raw = push_raw
        self.probes = None if probes is None else read_prompts(probes)
        self.probe_every_n_steps = probe_every_n_steps

    def __reduce__(self) -> tuple:
        # The class that _also_lightnings made has no importable name: a pickle names the one it was made from.
        plain = next(kind for kind in type(self).__mro__ if kind.__dict__.get("_made_from") is None)
        return _bare, (plain,), {**self.__dict__, "_run": None, "_fit": None}  # a copy is at work in no Trainer

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
        adapter = find_adapter(model)
        aligned = _weights_below(adapter, model) if self.aligned_model is None else self.aligned_model
        subspace = self._subspace_for(adapter, aligned, verbose, processes)
        if self._recorder is not None:
            self._recorder.end_step()  # a run that crashed may have left it open
        probes = self._watch(adapter, processes, verbose)
        activations = None if self._recorder is None else self._recorder.unread()
        corrector = SafetyCorrector(model, subspace, self.penalty, activations)
        if self.subspace is not None:
            check_origin(subspace, aligned, processes)
        still = [name for name in adapter.layers if subspace[name].U.shape[1] == 0]
        if verbose:
            print_start(corrector, seconds=time.perf_counter() - started, probes=probes)
            if still:
                logger.warning(
                    "%d of %d adapted modules did not change between base and aligned model, so their whole update "
                    "counts as off-subspace: %s%s",
                    len(still),
                    len(adapter.layers),
                    ", ".join(still[:3]),
                    ", …" if len(still) > 3 else "",
                )
        return corrector

    def _renew(self, if_doubled: bool = False) -> None:
        """Give the corrector what a data-aware penalty measures by, as the model is now."""
        if self._recorder is not None:
            self._recorder.renew(self._corrector, if_doubled)

    def _watch(self, adapter: Adapter, processes: Processes, verbose: bool) -> CheckedProbes | None:
        self._recorder = self._behaviour = None
        if self.probes is None:
            return None
        probes = check_probes(adapter, self.probes, self.cache_dir, processes, verbose)
        reads = self.penalty.on_probes is not None
        self._recorder = ActivationRecorder(adapter, probes.prompts, processes, reads, probes.tokenizer)
        self._behaviour = Behaviour(Refusals(adapter, probes.prompts, probes.beginnings, processes))
        return probes

    def _subspace_for(
        self, adapter: Adapter, aligned: str | os.PathLike | nn.Module, progress: bool, processes: Processes
    ) -> SafetySubspace:
        if isinstance(self.subspace, SafetySubspace):
            return self.subspace
        if self.subspace is not None:
            return processes.together(lambda: SafetySubspace.load(self.subspace))
        return SafetySubspace.estimate(
            self.base_model,
            aligned,
            target_modules=list(adapter.layers),
            rank=self.rank,
            energy=self.energy,
            progress=progress,
            cache_dir=self.cache_dir,
            processes=processes,
        )


def _also_lightnings(kind: type[CSULoRACallback]) -> type[CSULoRACallback]:
    """``kind``, or where Lightning is in use a subclass that is one of its callbacks too.

    Lightning asks its callbacks for some forty hooks. Inheriting them here, and not in the class statement, spares
    everyone else the import.
    """
    bases = tuple(sys.modules[package].Callback for package in _LIGHTNING if package in sys.modules)
    return _mixed(kind, bases) if bases and not issubclass(kind, bases) else kind


def _bare(kind: type[CSULoRACallback]) -> CSULoRACallback:
    """An instance that a pickle then fills."""
    return object.__new__(_also_lightnings(kind))


@cache
def _mixed(kind: type[CSULoRACallback], bases: tuple[type, ...]) -> type[CSULoRACallback]:
    return type(kind.__name__, (kind, *bases), {"_made_from": kind, "__doc__": kind.__doc__})


def _weights_below(adapter: Adapter, model: nn.Module) -> nn.Module | str:
    """The weights that the adapter sits on: those in memory, or their checkpoint where those are quantized."""
    weight = next(iter(adapter.layers.values())).module.get_base_layer().weight
    return model if weight.is_floating_point() else adapter.config.base_model_name_or_path
