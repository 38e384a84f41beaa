"""What a person reads of a correction that was made after training; and the same for machines."""

from __future__ import annotations

from rich.console import Console

from csulora_callback.card_section import passing_in_words, strength_in_words
from csulora_callback.method.penalty import in_words
from csulora_callback.posthoc import CorrectedFolder
from csulora_callback.reporting.penalties import note_on
from csulora_callback.reporting.terminal import facts, percent, print_section

GROWN = 1.5
"""A correction that makes an update so many times larger is pointed out; only a data-aware one can."""


def print_correction(console: Console, done: CorrectedFolder, written: bool) -> None:
    """What was done, how large the update was and is, and where it lies."""
    about = correction_json(done, written)
    rows = {
        "penalty": in_words(about["penalty"]),
        **note_on(about["penalty"]),
        **({"its strength": strength_in_words(about["target"])} if about["target"] else {}),
        "rank": done.record["rank"],
        "started from": "the raw factors in csulora/" if done.from_raw else "the adapter, which was not corrected",
        "modules": str(about["modules"]),
        **({"not corrected": passing_in_words(about["not_corrected"])} if about["not_corrected"] else {}),
        "norm of the update": f"{about['norm_before']:.4g} before, {about['norm_after']:.4g} after",
        "relative change": f"{percent(about['relative_change'])} %",
        "truncation error": f"{percent(about['truncation_error'])} %",
        "written to": str(done.output) if written else "nothing (dry run)",
    }
    if about["norm_after"] > GROWN * about["norm_before"]:
        rows["mind"] = "the update has grown, where neither task nor probes reach: look at other tasks, or take guard"
    print_section(console, "Correction", facts(console, rows))


def correction_json(done: CorrectedFolder, written: bool) -> dict:
    """The same as numbers; norms are those of ``‖Δ‖`` over all modules."""
    metrics = done.metrics
    before = metrics["csulora/update_norm"]
    return {
        "output": str(done.output) if written else None,
        "from_raw": done.from_raw,
        "penalty": done.record["penalty"],
        "target": done.record.get("target"),
        "rank": done.record["rank"],
        "modules": len(done.record["modules"]),
        "not_corrected": done.record.get("not_corrected", {}),
        "norm_before": before,
        "norm_after": before * (1.0 - metrics["csulora/attenuation"]),
        "relative_change": metrics["csulora/relative_change"],
        "truncation_error": metrics["csulora/truncation_error"],
        "metrics": metrics,
    }
