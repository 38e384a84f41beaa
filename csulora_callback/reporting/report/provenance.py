"""Where a corrected adapter comes from, as names and what is to be said of each."""

from __future__ import annotations

from csulora_callback.card_section import passing_in_words, strength_in_words
from csulora_callback.reporting.report.part import Part
from csulora_callback.reporting.report.words import percents, plain, ratio

Facts = dict[str, str]
_RANKS = {
    "truncate": "the adapter's own; what does not fit in it is the truncation error",
    "expand": "as large as the closest safe update needs, at most twice the adapter's",
}
_CONFIG = {
    "base_model_name_or_path": "model under the adapter",
    "r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "target_modules": "adapted modules",
}


def facts(part: Part) -> dict[str, Facts]:
    """All that is known, under headings."""
    return {
        "The correction": _correction(part),
        "The safety subspace": _subspace(part),
        "Training": _training(part),
        "Written by": {name: str(version) for name, version in part.record["versions"].items()},
    }


def _correction(part: Part) -> Facts:
    record, config = part.record, part.run.config
    return {
        "status": record["status"],
        "penalty": f"{part.penalty}: {part.does}",
        **({"its strength": strength_in_words(record["target"])} if "target" in record else {}),
        "modules": str(len(record["modules"])),
        **({"trained, not corrected": passing_in_words(passing)} if (passing := record.get("not_corrected")) else {}),
        "rank of the result": _RANKS[record["rank"]],
        **{name: plain(config[key]) for key, name in _CONFIG.items() if config.get(key) is not None},
        "raw factors, SHA-256": record["raw_digest"],
        "saved factors, SHA-256": record["corrected_digest"],
    }


def _subspace(part: Part) -> Facts:
    subspace, found = part.record["subspace"], {}
    for side in ("base", "aligned"):
        origin = subspace[side]
        found[f"{side} checkpoint"] = f"{origin['source']} ({', '.join(origin['dtypes'])})"
        found[f"{side} checkpoint, fingerprint"] = origin["fingerprint"]
    measured = [module["subspace"] for module in part.record["modules"].values() if "subspace" in module]
    if measured:
        ranks = sorted({module["rank"] for module in measured})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        whole = sum(module["displacement"] ** 2 for module in measured)
        kept = sum(module["energy_kept"] * module["displacement"] ** 2 for module in measured)
        found["rank"] = f"{span} singular directions on each side of a module"
        found["energy kept"] = f"{percents(ratio(kept, whole))} of what alignment changed in these modules"
    return {**found, "subspace, fingerprint": subspace["fingerprint"]}


def _training(part: Part) -> Facts:
    state, history, found = part.run.state, part.run.history, {}
    if "global_step" in state:
        found["optimizer steps"] = f"{state['global_step']} of {state.get('max_steps', 'an unknown number')}"
    elif history:
        found["last logged optimizer step"] = str(history[-1]["step"])
    if "epoch" in state:
        found["epochs"] = plain(state["epoch"])
    if state.get("train_batch_size"):
        found["batch size of a process"] = str(state["train_batch_size"])
    rates = [log["learning_rate"] for log in history if log.get("learning_rate") is not None]
    if rates:
        found["largest logged learning rate"] = f"{max(rates):.3g}"
    return found
