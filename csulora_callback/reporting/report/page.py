"""The page: a template filled with the parts of a report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from csulora_callback.reporting.inspection import BLOCK_NAMES
from csulora_callback.reporting.report import pictures
from csulora_callback.reporting.report.evaluation import judged, safety_sentence
from csulora_callback.reporting.report.part import Part
from csulora_callback.reporting.report.provenance import facts
from csulora_callback.reporting.report.runs import Material
from csulora_callback.reporting.report.summary import cards
from csulora_callback.reporting.report.words import percents, plain, signed_percents


def render(material: Material, given: str) -> str:
    """The page as text.

    Args:
        material: what it is about.
        given: the name that the user gave it, for the command that undoes a correction.
    """
    rows = [judged(row) for row in material.results]
    parts = [Part(run, {row.method: row for row in rows}) for run in material.runs]
    environment = Environment(
        loader=PackageLoader("csulora_callback.reporting", "report"),
        autoescape=True,  # names of models, modules and folders are other people's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percents": percents,
        "signed_percents": signed_percents,
        "plain": plain,
        "drawn": _drawn,
        "breakable": _breakable,
    }
    return environment.get_template("report.html").render(
        title=material.root.resolve().name,
        parts=[_shown(number, part, parts, material, given) for number, part in enumerate(parts, start=1)],
        same_adapter=len({part.record["raw_digest"] for part in parts}) == 1,
        rows=rows,
        has_harmless=any(row.harmless_refused is not None for row in rows),
        safety=safety_sentence(rows),
        evaluation=pictures.evaluation(rows),
        recipe=material.recipe,
        block_names=BLOCK_NAMES,
    )


def _shown(number: int, part: Part, parts: Sequence[Part], material: Material, given: str) -> dict:
    name, place = f"part-{number}", os.path.relpath(part.run.folder, material.root)
    return {
        "part": part,
        "id": name,
        "cards": cards(part),
        "maps": [pictures.blocks(name, part), *pictures.maps(name, part)] if part.inspections else [],
        "curves": pictures.curves(name, part.name, part.run.history),
        "trained_as": _trained_as(part, parts),
        "facts": facts(part),
        "checkpoint": shlex.quote(os.path.normpath(os.path.join(given, place))),
    }


def _trained_as(part: Part, parts: Sequence[Part]) -> str | None:
    """Of a correction that was made afterwards, the one whose training it was made from."""
    if _has_loss(part):
        return None
    same = (other for other in parts if other.record["raw_digest"] == part.record["raw_digest"])
    return next((other.name for other in same if _has_loss(other)), None)


def _has_loss(part: Part) -> bool:
    return any("loss" in log for log in part.run.history)


def _drawn(picture: pictures.Picture) -> Markup:
    return Markup(picture.svg)


def _breakable(name: str) -> Markup:
    """A module's name, which a narrow page may break after its dots."""
    return escape(name).replace(".", Markup(".<wbr>"))
