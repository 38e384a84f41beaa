"""What the record of a correction says in a model card: its text in Markdown, and nothing else.

It stands here and not in :mod:`csulora_callback.reporting` because every record is written with it, and records are
written by the state.
"""

from __future__ import annotations

from collections.abc import Mapping

from csulora_callback.method.basis import RELATIVE_RANK
from csulora_callback.method.penalty import in_words
from csulora_callback.record import exceeded

_UNKNOWN = """\
## Safety correction

No correction of this adapter is recorded: it was changed since, or writing it was interrupted."""

_CORRECTED = """\
## Safety correction

The weights in this adapter are not those that were trained: its update was corrected in closed form, after CSULoRA \
([arXiv 2605.30640](https://arxiv.org/abs/2605.30640)), to keep what alignment did to the model. No correction is a \
lock. `csulora/correction.json` is the record, with the numbers of every module."""

_UNCHANGED = """\
## Safety correction

The weights in this adapter are those that were trained: the strength of the correction was 0, which changes nothing. \
`csulora/correction.json` is the record, with the numbers of every module."""

_NOT_CORRECTED = """\
## Safety correction

**This adapter was not corrected.** It holds the weights as they were trained, because the correction was not \
possible: {reason}. What follows is what it was to be corrected with."""

_EXCEEDED = "**The drift budget was exceeded**, and {said}"

_UNDO = """\
The raw adapter, as it was trained, lies in `csulora/raw/` beside this file. What the Trainer pushes leaves it out \
unless asked; a copy of the folder, or `hf upload` without `--exclude "csulora/raw/*"`, takes it along. Where it is \
missing, it is only where the adapter was trained. With it the \
correction can be undone, or made again with another strength (`csulora correct`), by the command of the package \
`csulora-callback`:

```bash
csulora restore FOLDER -o raw-adapter
```"""

_CITATION = """\
Cite the method as

```bibtex
@misc{csulora2026,
  title  = {{CSULoRA}},
  author = {Marchenko Breneur, Oleksandr and Danilov, Adelaide and Nourbakhsh, Aria and Lamsiyah, Salima},
  year   = {2026},
  eprint = {2605.30640},
  archivePrefix = {arXiv}
}
```"""

_IN_MEMORY = " in memory"  # how a checkpoint is called that was given as a module
_SHARES = ("csulora/aligned_energy", "csulora/partial_energy", "csulora/off_energy")
_EFFECTS = {
    "attenuation, 1 − ‖X‖/‖Δ‖": "csulora/attenuation",
    "relative change, ‖X − Δ‖/‖Δ‖": "csulora/relative_change",
    "truncation error": "csulora/truncation_error",
}


def section_of(record: Mapping | None, base_model: str | None = None) -> str:
    """The section for a record; for ``None``, what stands in its place where none is known any more.

    Args:
        record: of ``correction.json``.
        base_model: the checkpoint that the adapter's config names, which tells more than that of a module in memory.

    Example:
        >>> record = {"status": "not corrected: the factors hold NaN or Inf", "rank": "truncate", "modules": {},
        ...           "penalty": {"name": "guard", "strength": 10.0}, "subspace": {}, "metrics": {}}
        >>> print(section_of(record).splitlines()[4])
        | | |
        >>> "| penalty | guard (strength 10) |" in section_of(record)
        True
    """
    if record is None:
        return _UNKNOWN
    said, table = exceeded(record), _table(record, base_model)
    budget = [] if said is None else [_EXCEEDED.format(said=_plain(said))]
    if is_corrected(record):
        if record["penalty"].get("strength") == 0:
            return "\n\n".join([_UNCHANGED, *budget, table, _CITATION])
        return "\n\n".join([_CORRECTED, *budget, table, _UNDO, _CITATION])
    reason = _plain(record["status"].removeprefix("not corrected: "))
    return "\n\n".join([_NOT_CORRECTED.format(reason=reason), *budget, table, _CITATION])


def is_corrected(record: Mapping | None) -> bool:
    """Whether the record says that the adapter beside it is a corrected one.

    Example:
        >>> is_corrected({"status": "corrected"}), is_corrected(None)
        (True, False)
    """
    return record is not None and record["status"] == "corrected"


def passing_in_words(passing: Mapping[str, str]) -> str:
    """What is trained and not corrected, for a person.

    Example:
        >>> passing_in_words({"score": "new: the aligned checkpoint has no such module"})
        'score (new: the aligned checkpoint has no such module)'
    """
    return "; ".join(f"{name} ({why})" for name, why in passing.items())


def strength_in_words(target: Mapping) -> str:
    """How a strength was found, for a person.

    Args:
        target: the section of a record.

    Example:
        >>> strength_in_words({"share": 0.9, "likelihood": 0.925, "prompts": 80})
        'the smallest found that keeps 90.0% of the likelihood of refusing 80 prompts; it keeps 92.5%'
    """
    asked = f"{_percent(target['share'])} of the likelihood of refusing {target['prompts']} prompts"
    kept = target["likelihood"]
    if kept < target["share"]:
        return f"the largest tried: {asked} was to be kept, and it keeps {_percent(kept)}"
    return f"the smallest found that keeps {asked}; it keeps {_percent(kept)}"


def _table(record: Mapping, base_model: str | None) -> str:
    subspace, metrics = record["subspace"], record["metrics"]
    rows = {"penalty": _plain(in_words(record["penalty"]))}
    if "target" in record:
        rows["its strength"] = strength_in_words(record["target"])
    rows |= {f"{side} checkpoint": _checkpoint(subspace[side], side, base_model) for side in _sides(subspace)}
    rows["safety subspace"] = _rank(subspace)
    if "fingerprint" in subspace:
        rows["its fingerprint"] = _code(subspace["fingerprint"])
    rows["modules"] = str(len(record["modules"]))
    if record.get("not_corrected"):
        rows["trained and not corrected"] = _plain(passing_in_words(record["not_corrected"]))
    if metrics:
        rows["norm of the update ‖Δ‖ before"] = f"{metrics['csulora/update_norm']:.4g}"
        shares = " / ".join(_percent(metrics[share]) for share in _SHARES)
        rows["of it fully aligned / partially / off-subspace"] = shares
        rows |= {name: _percent(metrics[key]) for name, key in _EFFECTS.items()}
    rows["rank of the adapter"] = "as trained" if record["rank"] == "truncate" else "expanded, nothing is truncated"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _sides(subspace: Mapping) -> list[str]:
    return [side for side in ("base", "aligned") if side in subspace]


def _checkpoint(origin: Mapping, side: str, base_model: str | None) -> str:
    source = origin["source"]
    if side == "aligned" and source.endswith(_IN_MEMORY) and base_model:
        source = base_model
    return f"{_code(source)} ({'/'.join(origin['dtypes'])}, fingerprint {_code(origin['fingerprint'])})"


def _rank(subspace: Mapping) -> str:
    told = []
    if subspace.get("energy") is not None:
        told.append(f"smallest rank that keeps {_percent(subspace['energy'])} of the displacement's energy")
    elif "rank" in subspace:
        told.append(f"rank {RELATIVE_RANK if subspace['rank'] is None else subspace['rank']}")
    if "energy_kept" in subspace:
        told.append(f"keeps {_percent(subspace['energy_kept'])} of the displacement's energy")
    return "; ".join(told) or "not known"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _plain(text: object) -> str:
    """On one line, and with nothing that Markdown or HTML would take for its own."""
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|" else letter for letter in line)


def _code(text: object) -> str:
    """On one line, as code that ends nowhere else."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"
