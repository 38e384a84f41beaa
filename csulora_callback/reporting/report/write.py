"""The report as a file."""

from __future__ import annotations

import os
from pathlib import Path

from csulora_callback.models.whole_files import write_whole
from csulora_callback.reporting.extra import report_extra
from csulora_callback.reporting.report.runs import find_material


def write_report(run: str | os.PathLike, output: str | os.PathLike) -> list[str]:
    """Write one self-contained page about a run or a checkpoint: what was corrected, what it changed, how to undo it.

    It is readable without network and without scripts, in light and dark, on a phone. Of the same folder it is the
    same file. Where a recipe judged the models their results are in it, with intervals; nothing is measured anew.

    Args:
        run: a corrected checkpoint or adapter, with its ``csulora/``; the output folder of a ``Trainer``, of Lightning
            or of a recipe, or any folder with several of them below it, each of which becomes a part of the page; or a
            Hub id.
        output: the file, which appears whole or not at all, in place of an older one.

    Returns:
        The names of the corrections that the page has, in its order.

    Raises:
        FileNotFoundError: if there is no such folder, or no corrected adapter in it.
        ImportError: if the extra ``report`` is not installed.
        ValueError: if ``output`` is a folder, a file beside the checkpoints is damaged, or a record is another
            adapter's.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from csulora_callback import Penalty, SafetySubspace, correct_adapter, write_report
        >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> folder = tempfile.mkdtemp()
        >>> get_peft_model(aligned, lora).save_pretrained(f"{folder}/trained")
        >>> done = correct_adapter(f"{folder}/trained", subspace, f"{folder}/corrected", Penalty.guard(10.0))
        >>> write_report(f"{folder}/corrected", f"{folder}/report.html")
        ['corrected']
    """
    if not isinstance(output, str | os.PathLike) or not str(output) or os.path.isdir(output):
        raise ValueError(f"`output`: expected the name of a file, but got {str(output)!r}. Name one in that folder.")
    material = find_material(run)
    with report_extra("a report"):
        from csulora_callback.reporting.report.page import render
    page = render(material, str(run))
    write_whole(Path(output), lambda path: path.write_text(page, encoding="utf-8"))
    return [found.name for found in material.runs]
