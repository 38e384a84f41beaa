"""The command ``csulora``: subspaces estimated and shown, adapters inspected, corrected and restored.

Data goes to the standard output, all else to the standard error: progress, warnings, and one line for what went wrong.
The exit status is 0, 1 where something failed or a file is not what it should be, and 2 for wrong arguments.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from csulora_callback.inspection import inspect_adapter
from csulora_callback.method.basis import check_rank_rule
from csulora_callback.models.factors import Factors
from csulora_callback.models.hub import adapter_named, checkpoint_named
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.reporting.inspection import inspection_json, print_inspection
from csulora_callback.reporting.subspace import print_subspace, subspace_json
from csulora_callback.reporting.terminal import make_console
from csulora_callback.sidecar import Sidecar
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_cache import default_cache_dir

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="csulora",
    help="Keep LoRA fine-tuning inside the safety subspace of an aligned model.",
    epilog="BASE, ALIGNED and ADAPTER are folders or Hub ids, which may have a revision: org/model@v1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # keeps examples as they are written
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Subspace = Annotated[
    Path | None, typer.Option("--subspace", metavar="FILE", help="A safety subspace that `csulora subspace` wrote.")
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="BASE", help="The unaligned base checkpoint, instead of --subspace.")
]
Aligned = Annotated[
    str | None,
    typer.Option(
        "--aligned", metavar="ALIGNED", help="The aligned checkpoint; by default the one that the adapter names."
    ),
]


@app.command()
def subspace(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help="The unaligned base checkpoint.")] = None,
    aligned: Annotated[str | None, typer.Argument(metavar="ALIGNED", help="The aligned checkpoint.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = None,
    rank: Annotated[int | None, typer.Option(help="Singular vectors on each side; 64 by default.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the energy instead of a rank.")] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Names of modules or their last parts, a,b or repeated; by default all matrices."),
    ] = None,
    show: Annotated[Path | None, typer.Option(metavar="FILE", help="Show what a file holds instead.")] = None,
    as_json: Json = False,
) -> None:
    r"""Estimate the safety subspace of a base and an aligned checkpoint, or show a file.

    \b
    csulora subspace meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct -o llama.safetensors
    csulora subspace base/ aligned/ -o small.safetensors --rank 16 --target-modules q_proj,v_proj
    csulora subspace --show llama.safetensors
    """
    if show is not None:
        given = (base, aligned, output, rank, energy, target_modules)
        _demand(not any(given), "`--show`: expected nothing else beside it, except --json.")
        with _reporting():
            found = SafetySubspace.load(show)
    else:
        _demand(base and aligned and output, "expected BASE ALIGNED -o FILE, or --show FILE.")
        _demand(rank is None or energy is None, "`--energy`: expected no --rank beside it, but got both.")
        _demand(not output.is_dir(), f"`--output`: expected the name of a file, but got the folder {output}.")
        targets = [name for names in target_modules or () for name in names.split(",") if name] or None
        rule = {"rank": 64 if rank is None else rank, "energy": energy}
        _as_usage(lambda: check_rank_rule(**rule))
        with _reporting():
            pair = (checkpoint_named(base), checkpoint_named(aligned))
            found = SafetySubspace.estimate(*pair, targets, **rule)
            found.save(output)
            logger.info("written to %s", output)
    _show(as_json, lambda: subspace_json(found), lambda console: print_subspace(console, found))


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT adapter, corrected or not.")],
    subspace: Subspace = None,
    base: Base = None,
    aligned: Aligned = None,
    as_json: Json = False,
) -> None:
    r"""Show how far an adapter drifts, and which way, by layer and kind of module. Changes nothing.

    Shares of the update's energy stand beside those that a random update has by chance. `undone` is the share of the
    alignment D = aligned - base that the update takes back: with --base of all of D, with --subspace of the part that
    the subspace keeps.

    \b
    csulora inspect out/checkpoint-100 --subspace llama.safetensors
    csulora inspect out/checkpoint-100 --base meta-llama/Llama-3.2-1B
    csulora inspect org/adapter@v1 --base base/ --aligned aligned/ --json | jq .states.adapter.worst
    """
    _check_subspace_or_base(subspace, base, aligned)
    with _reporting():
        folder = adapter_named(adapter)
        saved = SavedAdapter.load(folder)
        states, note = _states(folder, saved)
        found, pair = _subspace_of(saved, subspace, base, aligned)
        seen = inspect_adapter(saved, states, found, pair)
    whole = pair is not None
    about = f"{note} " if note else ""
    about += (
        "The alignment D is the whole displacement."
        if whole
        else (
            f"The alignment D is the part of the displacement that the subspace keeps, {found.energy_kept:.1%} of its "
            "energy."
        )
    )
    data = {
        "adapter": adapter,
        "corrected": "corrected" in states,
        "subspace": {"fingerprint": found.fingerprint, "energy_kept": found.energy_kept},
        "displacement": "whole" if whole else "kept",
    }

    def print_all(console: Console) -> None:
        console.print(f"{adapter}: {len(saved.layers)} modules. {about}", soft_wrap=True)
        print_inspection(console, seen)

    states_json = {state: inspection_json(inspection) for state, inspection in seen.items()}
    _show(as_json, lambda: {**data, "states": states_json}, print_all)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(format="csulora: %(message)s", level=logging.WARNING)
    logging.getLogger("csulora_callback").setLevel(logging.INFO)
    app()


def _states(folder: Path, saved: SavedAdapter) -> tuple[dict[str, Factors], str]:
    """The adapter's factors, beside the raw ones where it is a corrected one, and what is to be said of that."""
    try:
        beside = Sidecar.load(folder)
    except FileNotFoundError:
        return {"adapter": saved.factors}, ""
    except ValueError as error:
        logger.warning("What lies in csulora/ is not believed, and the adapter is inspected as it is: %s", error)
        return {"adapter": saved.factors}, ""
    how = " ".join(str(part) for part in beside.record["penalty"].values())
    note = f"This adapter is {beside.record['status']} ({how}); its raw factors lie in csulora/."
    return {"raw": beside.raw, "corrected": saved.factors}, note


def _check_subspace_or_base(subspace: Path | None, base: str | None, aligned: str | None) -> None:
    got = "neither" if subspace is None else "both"
    _demand((subspace is None) != (base is None), f"expected either --subspace FILE or --base BASE, but got {got}.")
    _demand(base is not None or aligned is None, "`--aligned`: expected it beside --base only.")


def _subspace_of(
    adapter: SavedAdapter, subspace: Path | None, base: str | None, aligned: str | None
) -> tuple[SafetySubspace, CheckpointPair | None]:
    """The subspace in a file, or that of two checkpoints and these; estimates are kept in the cache."""
    if subspace is not None:
        return SafetySubspace.load(subspace), None
    if aligned is None and not adapter.base:
        raise ValueError("`--aligned`: expected the aligned checkpoint, as the adapter's config names none.")
    pair = CheckpointPair.open(checkpoint_named(base), checkpoint_named(aligned or adapter.base), list(adapter.layers))
    targets, cache = list(adapter.layers), default_cache_dir()
    return SafetySubspace.estimate(pair.base, pair.aligned, targets, cache_dir=cache), pair


def _show(as_json: bool, data: Callable[[], dict], show: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(data(), indent=2, allow_nan=False))
    else:
        show(make_console())


@contextmanager
def _reporting() -> Iterator[None]:
    """What libraries print inside goes to the standard error, and so does, in one line, an error that is foreseen."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error), 1)


def _as_usage(check: Callable[[], object]) -> object:
    try:
        return check()
    except ValueError as error:
        _fail(str(error), 2)


def _demand(condition: object, message: str) -> None:
    if not condition:
        _fail(message, 2)


def _fail(message: str, status: int) -> None:
    print(f"csulora: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(status)
