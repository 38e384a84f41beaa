"""The command ``csulora``: subspaces estimated and shown, adapters inspected, corrected, restored, reported on.

Data goes to the standard output, all else to the standard error: progress, warnings, and one line for what went wrong.
The exit status is 0, 1 where something failed or a file is not what it should be, and 2 for wrong arguments.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from peft import LoraConfig

from csulora_callback.adapter_source import RawAdapter, find_adapter_folder, read_states
from csulora_callback.cli_options import (
    AdapterArgument,
    AlignedOption,
    BaseOption,
    JsonOption,
    Kind,
    ProbesOption,
    Rank,
    SubspaceOption,
    TaskOption,
    UncorrectedOption,
    choose_preset,
    examples,
    names_in,
)
from csulora_callback.cli_screen import EXAMPLES as SCREEN_EXAMPLES
from csulora_callback.cli_screen import screen
from csulora_callback.inspection import inspect_adapter, stored_shapes
from csulora_callback.method.basis import check_rank_rule
from csulora_callback.method.penalty import Penalty
from csulora_callback.models.named import aligned_under, checkpoint_named, model_named
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.posthoc import correct_adapter, restore_adapter
from csulora_callback.presets import is_data_aware
from csulora_callback.reporting.correction import correction_json, print_correction
from csulora_callback.reporting.inspection import inspection_json, print_inspection
from csulora_callback.reporting.report.write import write_report
from csulora_callback.reporting.streams import arguments, demand, set_up_streams, show, working
from csulora_callback.reporting.subspace import print_subspace, subspace_json
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_cache import default_cache_dir

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="csulora",
    help="Keep LoRA fine-tuning inside the safety subspace of an aligned model. BASE, ALIGNED and ADAPTER are folders "
    "or Hub ids, which may have a revision: org/model@v1.",
    epilog=examples(
        "csulora subspace meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct -o llama.safetensors",
        "csulora inspect out/checkpoint-100 --subspace llama.safetensors",
        "csulora correct out/checkpoint-100 -o safe/ --subspace llama.safetensors --penalty guard",
        "csulora restore safe/ -o raw/",
        "csulora report out/ -o report.html",
        "csulora screen train.jsonl --model meta-llama/Llama-3.2-1B-Instruct",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # keeps examples as they are written
)


@app.command(
    epilog=examples(
        "csulora subspace meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct -o llama.safetensors",
        "csulora subspace base/ aligned/ -o small.safetensors --rank 16 --target-modules q_proj,v_proj",
        "csulora subspace --show llama.safetensors",
    )
)
def subspace(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="The unaligned base checkpoint.")] = None,
    aligned: Annotated[str | None, typer.Argument(metavar="ALIGNED", help="The aligned checkpoint.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Singular vectors on each side; by default a 32nd of a module's smaller side, at least 4."),
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the energy instead of a rank.")] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Names or their last parts, may be repeated; by default all matrices."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read both checkpoints although their files look unchanged.")
    ] = False,
    to_show: Annotated[Path | None, typer.Option("--show", metavar="FILE", help="Show a file instead.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the safety subspace of a base and an aligned checkpoint, or show a file that holds one."""
    if to_show is not None:
        others = (base, aligned, output, rank, energy, target_modules, verify)
        demand(all(not other for other in others), "`--show`: expected nothing beside it but --json. Leave it out.")
        with working():
            found = SafetySubspace.load(to_show)
    else:
        demand(base and aligned and output, "expected BASE ALIGNED -o FILE, or --show FILE. See --help.")
        demand(rank is None or energy is None, "`--energy`: expected no --rank beside it, but got both. Pass one.")
        demand(not output.is_dir(), f"`--output`: expected the name of a file, but got the folder {output}.")
        targets = names_in(target_modules) or None
        rule = {"rank": rank, "energy": energy}
        with arguments():
            check_rank_rule(**rule)
        with working():
            pair = checkpoint_named(base, "BASE"), checkpoint_named(aligned, "ALIGNED")
            kept = {"cache_dir": default_cache_dir(), "verify": verify}
            found = SafetySubspace.estimate(*pair, targets, **rule, **kept)
            if found.from_cache:
                logger.info("found in the cache %s: these weights were estimated before", kept["cache_dir"])
            found.save(output)
            logger.info("written to %s", output)
    show(as_json, lambda: subspace_json(found), lambda console: print_subspace(console, found))


@app.command(
    epilog=examples(
        "csulora inspect out/checkpoint-100 --subspace llama.safetensors",
        "csulora inspect out/checkpoint-100 --base meta-llama/Llama-3.2-1B",
        "csulora inspect org/adapter@v1 --base base/ --aligned aligned/ --json | jq .states.adapter.worst",
    )
)
def inspect(
    adapter: AdapterArgument,
    subspace: SubspaceOption = None,
    base: BaseOption = None,
    aligned: AlignedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far an adapter drifts, and which way, by layer and kind of module. Changes nothing.

    Shares of the update's energy stand beside those that chance gives. "Undone" is the share of the alignment
    D = aligned - base that the update takes back: with --base of all of D, with --subspace of the part of it that the
    subspace keeps. A corrected adapter is shown beside its raw update, where that was published.
    """
    _check_one_of(subspace, base)
    demand(
        base is not None or aligned is None,
        "`--aligned`: expected it beside --base only. Leave it out.",
    )
    with working():
        found = None if subspace is None else SafetySubspace.load(subspace)
        stored = partial(_shapes_in, aligned) if found is None else lambda names, config: stored_shapes(found, names)
        saved, states, record = read_states(find_adapter_folder(adapter), stored, aligned and model_named(aligned))
        pair = None if base is None else _pair(saved, base, aligned)
        found = _estimate(pair) if found is None else found
        seen = inspect_adapter(saved, states, found, pair)
    kept = pair is None

    def data() -> dict:
        return {
            "adapter": adapter,
            "correction": record and {"status": record["status"], "penalty": record["penalty"]},
            "subspace": {"fingerprint": found.fingerprint, "energy_kept": found.energy_kept},
            "displacement": "kept" if kept else "whole",
            "states": {state: inspection_json(inspection) for state, inspection in seen.items()},
        }

    show(as_json, data, lambda console: print_inspection(console, adapter, seen, record, found, kept))


@app.command(
    epilog=examples(
        "csulora correct out/checkpoint-100 -o safe/ --subspace llama.safetensors --penalty guard",
        "csulora correct out/checkpoint-100 -o safe/ --base meta-llama/Llama-3.2-1B --penalty guard --strength 10",
        "csulora correct out/checkpoint-100 -o safe/ --base org/base --target 0.9 --probes builtin",
        "csulora correct out/checkpoint-100 -o safe/ --base org/base --penalty data_aware --probes refused.txt",
        "csulora correct org/adapter -o paper/ --subspace llama.safetensors --penalty csulora --rank expand",
        "csulora correct out/checkpoint-100 --subspace llama.safetensors --penalty guard --dry-run --json",
    )
)
def correct(
    adapter: AdapterArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="OUT", help="A folder to be made.")] = None,
    subspace: SubspaceOption = None,
    base: BaseOption = None,
    aligned: AlignedOption = None,
    penalty: Annotated[
        Kind | None,
        typer.Option(help="What is attenuated: by default data_aware for a target, else csulora, the paper's."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="How much; by default 10, of content_aware 300.")] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Share of the refusals' likelihood to keep; the strength is looked for."),
    ] = None,
    rank: Annotated[Rank, typer.Option(help="Keep the adapter's rank, or all of the update.")] = Rank.truncate,
    probes: ProbesOption = None,
    task: TaskOption = None,
    uncorrected: UncorrectedOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Correct an adapter after training, and write the result as a folder of its own.

    A corrected adapter starts from the raw factors in its csulora/: nothing is corrected twice. The raw factors lie in
    the new folder too, for `csulora restore`.
    """
    _check_one_of(subspace, base)
    demand(output or dry_run, "`--output`: expected a folder to be made, but got none. Pass -o OUT, or --dry-run.")
    with arguments():
        chosen = choose_preset(penalty, strength, target)
    needs_model = not isinstance(chosen, Penalty) or is_data_aware(chosen)
    demand(needs_model or not (probes or task), "`--probes`, `--task`: only for a data-aware penalty, or a --target.")
    with working(), tempfile.TemporaryDirectory() as scratch:
        found, place = subspace, Path(scratch, "corrected") if dry_run else output
        model, passing = aligned and model_named(aligned), names_in(uncorrected)
        if base is not None:
            raw = RawAdapter.find(find_adapter_folder(adapter))
            found = _estimate(_pair(raw.read(partial(_shapes_in, aligned), model, passing), base, aligned))
        texts = {"probes": probes, "task": task}
        done = correct_adapter(
            adapter, found, place, chosen, rank.value, **texts, aligned_model=model, target=target, uncorrected=passing
        )
    written = not dry_run
    show(as_json, lambda: correction_json(done, written), lambda console: print_correction(console, done, written))


@app.command(epilog=examples("csulora restore safe/ -o raw/", "csulora restore out/checkpoint-100 -o raw/"))
def restore(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A corrected adapter with its csulora/.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A folder to be made.")],
    as_json: JsonOption = False,
) -> None:
    """Write the raw adapter of a corrected one: the correction undone."""
    with working():
        place = restore_adapter(checkpoint, output)
    said = f"The raw adapter was written to {place}."
    show(as_json, lambda: {"output": str(place)}, lambda console: console.print(said, soft_wrap=True))


@app.command(
    epilog=examples(
        "csulora report out/checkpoint-100 -o report.html",
        "csulora report outputs/quickstart -o report.html",
        "csulora report org/adapter@v1 -o report.html",
    )
)
def report(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A corrected checkpoint or adapter, or the output folder of a trainer or a recipe.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to be written.")],
    as_json: JsonOption = False,
) -> None:
    """Write a page about what was corrected, what it changed, and how to undo it.

    One file without scripts, to be read in a browser, offline, on a phone: settings and provenance, loss and drift
    over steps, energies before and after by layer and kind of module, gains, the worst modules, and the evaluations
    that a recipe made. Of a folder with several corrections each is a part of the page.
    """
    demand(not output.is_dir(), f"`--output`: expected the name of a file, but got the folder {output}.")
    with working():
        names = write_report(run, output)
    data = {"output": str(output), "corrections": names}
    said = f"A report of {', '.join(names)} was written to {output}."
    show(as_json, lambda: data, lambda console: console.print(said, soft_wrap=True))


app.command(epilog=SCREEN_EXAMPLES)(screen)


def main() -> None:
    """Run the command line."""
    set_up_streams()
    app()


def _check_one_of(subspace: Path | None, base: str | None) -> None:
    got = "neither" if subspace is None else "both"
    demand((subspace is None) != (base is None), f"expected --subspace FILE or the unaligned --base, but got {got}.")


def _pair(saved: SavedAdapter, base: str, aligned: str | None) -> CheckpointPair:
    sides = checkpoint_named(base, "--base"), aligned_under(saved.config, aligned)
    return CheckpointPair.of_modules(*sides, sorted(saved.matrices))


def _shapes_in(aligned: str | None, names: Collection[str], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    return aligned_under(config, aligned).named_as(names).shapes(names)


def _estimate(pair: CheckpointPair) -> SafetySubspace:
    return SafetySubspace.estimate(pair.base, pair.aligned, pair.names, cache_dir=default_cache_dir())
