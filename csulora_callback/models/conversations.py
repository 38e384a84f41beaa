"""Fine-tuning data in the formats that are around, row by row as conversations, or as a text and the one after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import repr as short

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_EMPTY = "empty text"
_COLUMNS = "messages, or conversations, or prompt and completion, or instruction and output (with input, system)"


@dataclass(frozen=True)
class Format:
    """A way to write down what is to be learned.

    Attributes:
        name: what people call it.
        columns: those that every row fills.
        convert: gives a row as ``messages``, all of which is learned, or as ``prompt`` and ``completion``, which alone
            is learned; both are texts, or lists of messages. It raises ``ValueError`` for a row of another form.
        optional: columns that a row may fill.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[dict], dict]
    optional: tuple[str, ...] = ()

    def described(self, columns: Sequence[str]) -> str:
        """For a person, with those of the columns that are its own."""
        return f"{self.name} ({', '.join(self.used(columns))})"

    def used(self, columns: Sequence[str]) -> list[str]:
        """Those of the columns that are its own."""
        return [column for column in columns if column in (*self.columns, *self.optional)]

    def filled(self, row: dict) -> bool:
        """Whether a row has something in all of its columns."""
        return all(row.get(column) is not None for column in self.columns)


def recognize(columns: Sequence[str], first: dict) -> Format:
    """The format of a table, from its columns and its first row; where several are there, the first of ``FORMATS``.

    Raises:
        ValueError: if the columns are those of no format.

    Example:
        >>> row = {"instruction": "Name a bird.", "output": "A wren."}
        >>> recognize(list(row), row).name
        'Alpaca'
    """
    there = [form for form in FORMATS if set(form.columns) <= set(columns)]
    if not there:
        raise ValueError(f"expected the columns {_COLUMNS}, but got {list(columns)}. Rename yours.")
    return _filled(first, there) or there[0]


def convert(form: Format, row: dict) -> dict:
    """A row as ``messages``, or as ``prompt`` and ``completion``; other columns are left out.

    Raises:
        ValueError: that names the column, and the message in it, and says what was expected there.

    Example:
        >>> turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
        >>> convert(SHAREGPT, {"conversations": turns})
        {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]}
    """
    if not form.filled(row):
        other = _filled(row, FORMATS)
        if other is not None:
            raise ValueError(
                f"expected {form.name} as in the first row, but got {other.described(row)}. Give each format its own "
                "file."
            )
    return form.convert(row)


def why_left_out(row: dict) -> str | None:
    """Why nothing is to be learned from a row as :func:`convert` gives it; ``None`` where something is.

    Example:
        >>> why_left_out({"messages": [{"role": "user", "content": "Hi"}]})
        'no assistant turn'
    """
    if isinstance(row.get("prompt"), str):
        return None if row["prompt"].strip() and row["completion"].strip() else _EMPTY
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if not any(turn["role"] == "assistant" for turn in row.get("completion", turns)):
        return "no assistant turn"
    # An empty system turn is none, or keeps a template from adding its own; other empty ones teach to say nothing.
    return _EMPTY if any(turn["role"] != "system" and not turn["content"].strip() for turn in turns) else None


def asked_and_answered(row: dict) -> tuple[str | list[dict], str]:
    """The prompt and the answer in a row as :func:`convert` gives it: what stands before its last answer, and that.

    Example:
        >>> asked_and_answered({"prompt": "Name a bird.", "completion": "A wren."})
        ('Name a bird.', 'A wren.')
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        >>> asked_and_answered({"messages": turns})
        ([{'role': 'user', 'content': 'Hi'}], 'Hello.')
    """
    if isinstance(row.get("prompt"), str):
        return row["prompt"], row["completion"]
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last], turns[last]["content"]


def _filled(row: dict, forms: Sequence[Format]) -> Format | None:
    form = next((form for form in forms if form.filled(row)), None)
    return CONVERSATIONAL if form is TEXTS and isinstance(row["prompt"], list) else form


def _messages(row: dict) -> dict:
    return {"messages": _turns("messages", row["messages"])}


def _sharegpt(row: dict) -> dict:
    return {"messages": _turns("conversations", row["conversations"])}


def _texts(row: dict) -> dict:
    return {column: _text(column, row[column]) for column in ("prompt", "completion")}


def _conversational(row: dict) -> dict:
    return {column: _turns(column, row[column]) for column in ("prompt", "completion")}


def _alpaca(row: dict) -> dict:
    asked, answer = (_text(column, row[column]) for column in ("instruction", "output"))
    given, system = (
        _text(column, row[column]) if row.get(column) is not None else "" for column in ("input", "system")
    )
    turns = [{"role": "system", "content": system}] if system.strip() else []
    # Joined as LLaMA-Factory does where there is a chat template; Alpaca's own headings are for models without one.
    question = "\n".join(text for text in (asked, given) if text.strip())
    turns.append({"role": "user", "content": question})
    return {"prompt": turns, "completion": [{"role": "assistant", "content": answer}]}


def _text(column: str, cell: object) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"column {column!r}: expected a text, but got {_shown(cell)}")
    return cell


def _turns(column: str, cell: object) -> list[dict]:
    """The messages of a cell, which may be called ``from`` and ``value``; keys without a value are other messages'."""
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"column {column!r}: expected a list of messages, but got {_shown(cell)}")
    turns = []
    for place, turn in enumerate(cell, start=1):
        about = f"column {column!r}, message {place}"
        if not isinstance(turn, dict):
            raise ValueError(f"{about}: expected an object with a role and content, but got {_shown(turn)}")
        turn = {key: value for key, value in turn.items() if value is not None}
        who, what = ("from", "value") if turn.keys() & {"from", "value"} else ("role", "content")
        if turn.get(who) not in list(_ROLES):
            raise ValueError(
                f"{about}: expected {who!r} to be one of {', '.join(_ROLES)}, but got {_shown(turn.get(who))}"
            )
        if not isinstance(turn.get(what), str):
            raise ValueError(f"{about}: expected {what!r} to be a text, but got {_shown(turn.get(what))}")
        more = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turns.append({**more, "role": _ROLES[turn[who]], "content": turn[what]})
    return turns


def _shown(value: object) -> str:
    return "nothing" if value is None else short(value)


MESSAGES = Format("chat messages", ("messages",), _messages)
SHAREGPT = Format("ShareGPT", ("conversations",), _sharegpt)
TEXTS = Format("prompt/completion, texts", ("prompt", "completion"), _texts)
CONVERSATIONAL = Format("prompt/completion, conversations", ("prompt", "completion"), _conversational)
ALPACA = Format("Alpaca", ("instruction", "output"), _alpaca, optional=("input", "system"))
FORMATS = (MESSAGES, SHAREGPT, TEXTS, ALPACA)
