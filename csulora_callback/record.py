"""The record of a correction as text: sealed by a digest of its own, and believed only with the right types."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping

from csulora_callback.models.foreign import stays_inside

FORMAT = 2


def seal(record: dict, files: dict[str, str]) -> str:
    """The record as JSON, with the digests of the files beside it and one of the whole.

    Example:
        >>> sorted(json.loads(seal({"format": 2, "modules": {}}, {"raw/adapter_config.json": "0" * 64})))
        ['files', 'format', 'modules', 'sha256']
    """
    record = {**record, "files": files}
    text = json.dumps({**record, "sha256": _digest(record)} | {"modules": {}}, indent=2, allow_nan=False)
    # One line each: of a mixture of experts there are thousands.
    modules = [
        f"    {json.dumps(name)}: {json.dumps(own, allow_nan=False)}" for name, own in record["modules"].items()
    ]
    return text.replace('\n  "modules": {}', '\n  "modules": {\n' + ",\n".join(modules) + "\n  }", 1)


def checked(content: bytes, source: str) -> dict:
    """The record in a file's ``content``, if it is one and as it was written.

    Raises:
        ValueError: naming ``source``, if it is not JSON, of another format, of other types, or was changed.

    Example:
        >>> checked(b"[]", "correction.json")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: correction.json: expected the record of a correction, but got a list.
    """
    try:
        record = json.loads(content.decode("utf-8"))
        found = _digest(record)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, but it cannot be read ({str(error)[:200]}).") from error
    remedy = "It was changed, or another program wrote it; take it from a copy of the checkpoint."
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected the record of a correction, but got a {type(record).__name__}. {remedy}")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{source}: expected a record of format {FORMAT}, but got {record.get('format')!r}. Use the version of "
            "csulora_callback that wrote it."
        )
    for key, (fits, expected) in _FIELDS.items():
        if not fits(record.get(key)):
            raise ValueError(
                f"{source}: expected `{key}` to be {expected}, but got {_short(record.get(key))}. {remedy}"
            )
    if record["sha256"] != found:
        raise ValueError(f"{source}: expected the content that its sha256 states, but got another. {remedy}")
    return record


def exceeded(record: Mapping) -> str | None:
    """What became of training as a drift budget was exceeded, and in what, in words; ``None`` where nothing was.

    Example:
        >>> exceeded({"budget": {"on_exceed": "stop", "exceeded": ["drift is 3", "refusing is 0"]}})
        'training was stopped: drift is 3; refusing is 0.'
        >>> exceeded({}) is None
        True
    """
    budget = record.get("budget")
    if budget is None or not budget["exceeded"]:
        return None
    then = "was stopped" if budget["on_exceed"] == "stop" else "went on"
    return f"training {then}: {'; '.join(budget['exceeded'])}."


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and stays_inside(value)  # a folder is looked for by it


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_number(value: object) -> bool:
    """Whether it is a finite number.

    Example:
        >>> is_number(0), is_number(True), is_number(float("nan"))
        (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_section(value: object) -> bool:
    return isinstance(value, dict)


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _are_digests(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_digest, value.values()))


def _are_modules(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(module, dict) and is_number(module.get("scaling")) for module in value.values())
    )


def _is_budget(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.get("on_exceed") in ("warn", "stop")
        and isinstance(value.get("exceeded"), list)
        and all(map(_is_text, value["exceeded"]))
    )


def _are_reasons(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_text, value.values())))


_FIELDS = {
    "status": (_is_text, "a text"),
    "adapter": (_is_name, "the name of an adapter"),
    "penalty": (_is_section, "a section"),
    "subspace": (_is_section, "a section"),
    "raw_digest": (_is_digest, "a SHA-256"),
    "corrected_digest": (_is_digest, "a SHA-256"),
    "metrics": (_are_numbers, "numbers by name"),
    "modules": (_are_modules, "sections by module, each with a finite `scaling`"),
    "versions": (_is_section, "a section"),
    "budget": (_is_budget, "a section with `on_exceed` and texts of what was `exceeded`, or to be missing"),
    "not_corrected": (_are_reasons, "reasons by name, or to be missing"),
    "files": (_are_digests, "SHA-256 by file"),
    "sha256": (_is_digest, "a SHA-256"),
}


def _digest(record: object) -> str:
    """Of all that a record says, except of this digest itself; not a number and infinity are no JSON."""
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
