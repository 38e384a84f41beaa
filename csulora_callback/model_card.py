"""The model card of a saved adapter: a section of ours in it, between two comments, and what is added to its metadata.

All else in the card is its user's and stays as it is, byte for byte: of the metadata lines are added, none is written
anew. A card that cannot be read, or in which that cannot be done, is left as it is with a warning; no save fails
because of one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from peft.utils import CONFIG_NAME

from csulora_callback.card_section import is_corrected, section_of
from csulora_callback.models.foreign import first_line
from csulora_callback.models.whole_files import write_whole

logger = logging.getLogger(__name__)

CARD = "README.md"
TAG = "csulora"

_BEGIN = "<!-- csulora:begin (written anew with every correction; all that stands outside of it is yours) -->"
_END = "<!-- csulora:end -->"
_MARKER = re.compile(r"^[ \t]*<!-- csulora:(begin|end)\b[^\r\n<>]*-->[ \t]*(?=\r?$)", re.MULTILINE)
_TAGS_IN_LINES = re.compile(r"^tags:[ \t]*(?:\r?\n[ \t]*-[ \t][^\r\n]*)+", re.MULTILINE)
_TAGS_IN_BRACKETS = re.compile(r"^tags:[ \t]*\[([^\r\n]*)\][ \t]*(?=\r?$)", re.MULTILINE)
_BYTE_ORDER_MARK = "\ufeff"


def renew(folder: Path, record: Mapping | None, adapter: Path) -> None:
    """Have the card in ``folder`` say what the record says; there need not be a card yet.

    Args:
        folder: where ``README.md`` is.
        record: of ``correction.json``; ``None`` where none is known any more, as a section that is there then says.
        adapter: the folder of the adapter's config, for the name of its model.
    """
    _rewrite(folder / CARD, lambda card: _renewed(card, record, adapter))


def renew_pushed(card: ModelCard, record: Mapping, adapter: Path) -> None:
    """The same of a card that is in memory, and will be written over the one in the folder."""
    try:
        card.content = _renewed(card.content, record, adapter)
    except Exception as error:  # as in _if_possible
        logger.warning("%s: pushed as it is, without a section on the correction: %s", CARD, first_line(error))


def remove(folder: Path) -> None:
    """Take the section out of the card in ``folder``, and the tag out of its metadata: a card as without us."""
    _rewrite(folder / CARD, lambda card: _untagged(without_section(card)) if _sections(card) else card)


def with_section(card: str, section: str) -> str:
    """The card with this section, in the place of the one that it had, or at its end.

    Of several sections the first is renewed and the others go. Where one of the two comments is missing, what may have
    been a section stays as text.

    Example:
        >>> card = with_section("# My adapter", "Corrected.")
        >>> print(with_section(card, "Corrected again."))
        # My adapter
        <BLANKLINE>
        <!-- csulora:begin (written anew with every correction; all that stands outside of it is yours) -->
        Corrected again.
        <!-- csulora:end -->
    """
    line_break = _line_break(card)
    section = line_break.join([_BEGIN, *section.split("\n"), _END])
    spans = _sections(card)
    if not spans:
        card = _without_strays(card)
        end = len(card.rstrip("\r\n"))
        return card[:end] + (2 * line_break if end else "") + section + card[end:]
    start, end = spans[0]
    before, after = _without_strays(card[:start]), _without_strays(without_section(card[end:]))
    return before + section + after


def without_section(card: str) -> str:
    """The card without any section, and without the empty line before it.

    Example:
        >>> without_section(with_section("# My adapter", "Corrected."))
        '# My adapter'
    """
    kept, place = [], 0
    for start, end in _sections(card):
        before = card[place:start]
        for gap in ("\r\n\r\n", "\n\n"):
            if before.endswith(gap):
                before = before.removesuffix(gap)
                break
        kept.append(before)
        place = end
    return _without_strays("".join([*kept, card[place:]])) if kept else card


def with_metadata(card: str, wanted: Mapping[str, str], tagged: bool) -> str:
    """The card with these keys in its metadata where they are not there, and with our tag, or without it.

    Raises:
        ValueError: if the metadata cannot be read, or are written in a way that cannot be added to.

    Example:
        >>> print(with_metadata("# My adapter", {"library_name": "peft"}, tagged=True))
        ---
        library_name: peft
        tags:
        - csulora
        ---
        # My adapter
    """
    line_break = _line_break(card)
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        data = ModelCardData(**wanted, tags=[TAG] if tagged else None).to_yaml(line_break)
        return line_break.join(["---", data, "---", card])
    there = _data(card)
    absent = {key: value for key, value in wanted.items() if not _has_key(found[2], key)}
    lines = [ModelCardData(**{key: value}).to_yaml(line_break) for key, value in absent.items()]
    block = line_break.join([*([found[2]] if found[2] else []), *lines])
    extended = card[: found.start(2)] + block + card[found.end(2) :]
    if _data(extended) != {**absent, **there}:
        raise ValueError("its metadata are not in lines of `key: value`")
    return _with_tag(extended, tagged)


def _renewed(card: str, record: Mapping | None, adapter: Path) -> str:
    base_model = _base_model(adapter)
    if record is None:
        return with_section(_untagged(card), section_of(None)) if _sections(card) else card
    if _is_half_deleted(card):
        logger.warning(
            "%s: one of the two comments around the section of csulora was missing. What stood there was kept as text "
            "and the section written anew: look at it.",
            CARD,
        )
    wanted = {"library_name": "peft"}
    if base_model and not os.path.isdir(base_model):  # a folder of this machine is no name of a model
        wanted = {"base_model": base_model, **wanted}
    text = with_section(card, section_of(record, base_model))
    return _if_possible(text, lambda card: with_metadata(card, wanted, is_corrected(record)))


def _untagged(card: str) -> str:
    return _if_possible(card, lambda card: _with_tag(card, False))


def _if_possible(card: str, change: Callable[[str], str]) -> str:
    """The card with its metadata changed, or as it is."""
    try:
        return change(card)
    except Exception as error:  # metadata of a user's own making fail in as many ways as YAML has
        logger.warning("%s: its metadata, and with it the tag %s, were left as is: %s", CARD, TAG, first_line(error))
        return card


def _rewrite(path: Path, change: Callable[[str], str]) -> None:
    try:
        before = path.read_bytes() if path.is_file() else b""
        text = before.decode("utf-8")
        mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
        after = (mark + change(text.removeprefix(mark))).encode("utf-8")
        if after != before:
            write_whole(path.resolve(), lambda new: new.write_bytes(after))
    except (OSError, ValueError) as error:  # not text in UTF-8, a folder in its place, or not writable
        logger.warning("%s: left as it is, without a section on the correction: %s", path, first_line(error))


def _sections(card: str) -> list[tuple[int, int]]:
    """From the first comment's start to the second's end, of every pair with no other such comment in between."""
    markers = list(_MARKER.finditer(card))
    return [(one.start(), two.end()) for one, two in pairwise(markers) if (one[1], two[1]) == ("begin", "end")]


def _is_half_deleted(card: str) -> bool:
    return len(_MARKER.findall(card)) != 2 * len(_sections(card))


def _without_strays(text: str) -> str:
    """Without comments of ours that are no section's: they would make one of what someone writes between them."""
    return re.sub(_MARKER.pattern + r"\r?\n?", "", text, flags=re.MULTILINE)


def _data(card: str) -> dict:
    return ModelCard(card).data.to_dict()


def _with_tag(card: str, tagged: bool) -> str:
    """The card with or without our tag, as one line or one word of its metadata; see :func:`with_metadata`."""
    found = REGEX_YAML_BLOCK.search(card)
    before = {} if found is None else _data(card)
    tags = before.get("tags", [])
    if isinstance(tags, list) and (TAG in tags) == tagged:
        return card
    block, line_break = found[2], _line_break(card)
    if tagged:
        if (lines := _TAGS_IN_LINES.search(block)) is not None:
            indent = re.findall(r"\n([ \t]*)-", lines[0])[-1]
            block = f"{block[: lines.end()]}{line_break}{indent}- {TAG}{block[lines.end() :]}"
        elif (words := _TAGS_IN_BRACKETS.search(block)) is not None:
            both = ", ".join([*([words[1].strip()] if words[1].strip() else []), TAG])
            block = f"{block[: words.start(1)]}{both}{block[words.end(1) :]}"
        elif not _has_key(block, "tags"):
            block = f"{block}{line_break}tags:{line_break}- {TAG}"
    elif tags == [TAG]:
        block = re.sub(rf"(\r?\n|^)tags:[ \t]*(\r?\n[ \t]*- {TAG}|\[{TAG}\])[ \t]*(?=\r?\n|$)", "", block)
    else:
        block = re.sub(rf"\r?\n[ \t]*- {TAG}(?=\r?\n|$)|, {TAG}(?=[,\]])", "", block, count=1)
    changed = card[: found.start(2)] + block + card[found.end(2) :]
    others = [tag for tag in tags if tag != TAG]
    expected = {**before, "tags": [*others, TAG] if tagged else others}
    if {"tags": [], **_data(changed)} != expected:
        raise ValueError("its tags are not a plain list")
    return changed


def _has_key(block: str, key: str) -> bool:
    """Also one without a value, which is its user's too."""
    return re.search(rf"^[\"']?{key}[\"']?[ \t]*:", block, re.MULTILINE) is not None


def _base_model(adapter: Path) -> str | None:
    try:
        name = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):  # of the config others complain
        return None
    return name if isinstance(name, str) else None


def _line_break(card: str) -> str:
    return "\r\n" if "\r\n" in card else "\n"
