"""Broken files of every format: one line on stderr says what, in which row and column, and nothing is trained."""

import json

import pytest

from tests.helpers.recipes import chat_pair, chat_tokenizer
from tests.helpers.user_data import SAID, dry_run, lines, sharegpt, turns

RECIPE = "recipes/llama32_1b_sft.yaml"
ROLES = "one of system, user, assistant, human, gpt"
COLUMNS = "messages, or conversations, or prompt and completion, or instruction and output (with input, system)"
ASK = {"role": "user", "content": "a"}
LONG = " ".join("a" * 40)
NO_JSON = "not jsonl that can be read as a table"
NOTHING = "expected rows to learn from, but got none: 1 left out:"
NO_UTF8 = "expected a text file in UTF-8, but it cannot be read as one"
NO_CSV = "not csv that can be read as a table"
TOKENIZING = "ParserError: Error tokenizing data. C error:"


def after(name: str, **cells: object) -> str:
    """A good row of a format, and one in which some cells are others."""
    return lines(SAID[name], {**SAID[name], **cells})


def of_turns(name: str, column: str) -> dict[str, tuple[str | bytes, str]]:
    """What can be wrong with a column of messages."""
    who, what = ("from", "value") if name == "sharegpt" else ("role", "content")
    about = f"row 2: column {column!r}"
    ask = dict(sorted({who: "user", what: "a"}.items()))
    return {
        "null": (after(name, **{column: None}), f"{about}: expected a list of messages, but got nothing"),
        "empty list": (after(name, **{column: []}), f"{about}: expected a list of messages, but got []"),
        "number": (after(name, **{column: 3}), f"{about}: expected a list of messages, but got 3"),
        "object": (after(name, **{column: ask}), f"{about}: expected a list of messages, but got {ask!r}"),
        "texts": (
            after(name, **{column: ["a"]}),
            f"{about}, message 1: expected an object with a role and content, but got 'a'",
        ),
        "no role": (
            after(name, **{column: [ask, {what: "a"}]}),
            f"{about}, message 2: expected {who!r} to be {ROLES}, but got nothing",
        ),
        "unknown role": (
            after(name, **{column: [{who: "tool", what: "a"}]}),
            f"{about}, message 1: expected {who!r} to be {ROLES}, but got 'tool'",
        ),
        "no content": (
            after(name, **{column: [{who: "user"}]}),
            f"{about}, message 1: expected {what!r} to be a text, but got nothing",
        ),
        "content in parts": (
            after(name, **{column: [{who: "user", what: [1]}]}),
            f"{about}, message 1: expected {what!r} to be a text, but got [1]",
        ),
    }


def of_texts(name: str, column: str) -> dict[str, tuple[str | bytes, str]]:
    """What can be wrong with a column of texts."""
    about = f"row 2: column {column!r}: expected a text, but got"
    return {
        f"null {column}": (after(name, **{column: None}), f"{about} nothing"),
        f"number as {column}": (after(name, **{column: 3}), f"{about} 3"),
        f"list as {column}": (after(name, **{column: ["a"]}), f"{about} ['a']"),
        f"object as {column}": (after(name, **{column: {"a": 1}}), f"{about} {{'a': 1}}"),
        f"empty {column}": (lines({**SAID[name], column: " "}), f"{NOTHING} empty text (row 1)"),
    }


def of_files(name: str, column: str) -> dict[str, tuple[str | bytes, str]]:
    """What can be wrong with any file."""
    row = SAID[name]
    rest = [other for other in row if other != column]
    return {
        "empty": ("", f"{NO_JSON} (it is empty)"),
        "blank": ("\n \n", f"{NO_JSON} (it is empty)"),
        "empty array": ("[]", f"{NO_JSON} (it is an empty list)"),
        "not JSON": (
            lines(row) + "{nonsense\n",
            f"{NO_JSON} (line 2, column 2: Expecting property name enclosed in double quotes)",
        ),
        "broken off": (
            lines(row) + f'{{"{column}":',
            f"{NO_JSON} (line 2, column {len(column) + 5}: Expecting value)",
        ),
        "numbers": ("1\n2\n", f"{NO_JSON} (line 1: expected an object, but got 1)"),
        "Latin-1": (
            (lines(row) + "{'é'}").encode("latin-1"),
            f"{NO_UTF8} (line 2: byte 0xe9, invalid continuation byte)",
        ),
        "another column": (
            lines({**{other: row[other] for other in rest}, "words": row[column]}),
            f"expected the columns {COLUMNS}, but got {[*rest, 'words']}. Rename yours.",
        ),
    }


def of_answers(name: str, column: str, wrap) -> dict[str, tuple[str | bytes, str]]:
    """Rows of the right form in which there is nothing to learn."""
    return {
        "no answer": (lines({**SAID[name], column: wrap("a")}), f"{NOTHING} no assistant turn (row 1)"),
        "empty answer": (lines({**SAID[name], column: wrap("a", " ")}), f"{NOTHING} empty text (row 1)"),
        "long question": (
            lines({**SAID[name], column: wrap(LONG, "a")}),
            f"{NOTHING} no answer within data.max_length (row 1)",
        ),
    }


def mixed(name: str, form: str, other: str, said: str) -> dict[str, tuple[str | bytes, str]]:
    return {
        "mixed": (
            lines(SAID[name], SAID[other]),
            f"row 2: expected {form} as in the first row, but got {said}. Give each format its own file.",
        )
    }


TEMPLATE = "the model's chat template does not take it (TemplateError: "
JSON_LINES = {
    "messages": {
        **of_files("messages", "messages"),
        **of_turns("messages", "messages"),
        **of_answers("messages", "messages", turns),
        **mixed("messages", "chat messages", "alpaca", "Alpaca (instruction, input, output)"),
        "refused by the template": (
            after("messages", messages=[ASK, ASK, {"role": "assistant", "content": "b"}]),
            f"row 2: {TEMPLATE}roles must alternate)",
        ),
    },
    "sharegpt": {
        **of_files("sharegpt", "conversations"),
        **of_turns("sharegpt", "conversations"),
        **of_answers("sharegpt", "conversations", sharegpt),
        **mixed("sharegpt", "ShareGPT", "messages", "chat messages (messages)"),
        "refused by the template": (
            after("sharegpt", conversations=[{"from": "system", "value": "a"}, *sharegpt("a", "b")]),
            f"row 2: {TEMPLATE}no system turns)",
        ),
    },
    "conversational": {
        **of_files("conversational", "completion"),
        **of_turns("conversational", "prompt"),
        "text as completion": (
            after("conversational", completion="b"),
            "row 2: column 'completion': expected a list of messages, but got 'b'",
        ),
        "no answer": (lines({**SAID["conversational"], "completion": [ASK]}), f"{NOTHING} no assistant turn (row 1)"),
        "long question": (
            lines({**SAID["conversational"], "prompt": turns(LONG)}),
            f"{NOTHING} no answer within data.max_length (row 1)",
        ),
        **mixed("conversational", "prompt/completion, conversations", "alpaca", "Alpaca (instruction, input, output)"),
        "refused by the template": (
            after("conversational", prompt=[{"role": "system", "content": "a"}, ASK]),
            f"row 2: {TEMPLATE}no system turns)",
        ),
    },
    "texts": {
        **of_files("texts", "completion"),
        **of_texts("texts", "prompt"),
        **of_texts("texts", "completion"),
        **mixed("texts", "prompt/completion, texts", "messages", "chat messages (messages)"),
        "long question": (
            lines({**SAID["texts"], "prompt": LONG}),
            f"{NOTHING} no answer within data.max_length (row 1)",
        ),
    },
    "alpaca": {
        **of_files("alpaca", "output"),
        **of_texts("alpaca_alone", "instruction"),
        **of_texts("alpaca", "output"),
        **mixed("alpaca", "Alpaca", "texts", "prompt/completion, texts (prompt, completion)"),
        "number as input": (after("alpaca", input=3), "row 2: column 'input': expected a text, but got 3"),
        "long question": (
            lines({**SAID["alpaca"], "input": LONG}),
            f"{NOTHING} no answer within data.max_length (row 1)",
        ),
        "refused by the template": (
            lines({**SAID["alpaca"], "system": "a"}),
            f"row 1: {TEMPLATE}no system turns)",
        ),
    },
}

CSV = {
    "empty": ("", f"{NO_CSV} (it is empty)"),
    "header": ("instruction,output\n", f"{NO_CSV} (there is no row below the header)"),
    "Latin-1": (
        "instruction,output\né,a\n".encode("latin-1"),
        f"{NO_UTF8} (line 2: byte 0xe9, invalid continuation byte)",
    ),
    "UTF-16": (
        "instruction,output\na,b\n".encode("utf-16"),
        f"{NO_UTF8} (line 1: byte 0xff, invalid start byte)",
    ),
    "another column": (
        "instruction,answer\na,b\n",
        f"expected the columns {COLUMNS}, but got ['instruction', 'answer']. Rename yours.",
    ),
    "semicolons": (
        "instruction;output\na;b\n",
        f"expected the columns {COLUMNS}, but got ['instruction;output']. Rename yours.",
    ),
    "no header": ("a,b\nc,d\n", f"expected the columns {COLUMNS}, but got ['a', 'b']. Rename yours."),
    "too many fields": (
        "instruction,output\na,b,c\n",
        f"{NO_CSV} (ValueError: expected 2 fields in line 2, saw 3)",
    ),
    "too many fields later": (
        "instruction,output\na,b\na,b,c\n",
        f"{NO_CSV} ({TOKENIZING} Expected 2 fields in line 3, saw 3)",
    ),
    "an open quote": (
        'instruction,output\na,"b\n',
        f"{NO_CSV} ({TOKENIZING} EOF inside string starting at row 1)",
    ),
    "empty output": ("instruction,output\na,\n", f"{NOTHING} empty text (row 1)"),
    "too few fields": ("instruction,output\na\n", f"{NOTHING} empty text (row 1)"),
    "messages in a cell": ('messages\n"[]"\n', "row 1: column 'messages': expected a list of messages, but got '[]'"),
}

JSON = {
    "empty": ("", "not json that can be read as a table (it is empty)"),
    "number": ("3", "not json that can be read as a table (line 1: expected an object, but got 3)"),
    "no objects": ("[{}, 3]", "not json that can be read as a table (item 2: expected an object, but got 3)"),
    "texts": ('["a", "b"]', f"expected the columns {COLUMNS}, but got ['text']. Rename yours."),
    "rows below a key": (
        json.dumps({"data": [SAID["messages"]]}),
        f"expected the columns {COLUMNS}, but got ['data']. Rename yours.",
    ),
    "broken off": (
        json.dumps([SAID["alpaca"]], indent=1)[:-2],
        "not json that can be read as a table (line 6, column 3: Expecting ',' delimiter)",
    ),
}

FILES = {
    **{f"{name}.jsonl": cases for name, cases in JSON_LINES.items()},
    "alpaca.csv": CSV,
    "messages.json": JSON,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny pair whose chat template takes users and assistants in turn."""
    folder = tmp_path_factory.mktemp("pair")
    overrides = chat_pair(folder)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% if (loop.index % 2 == 0) != (m['role'] == 'assistant') %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder / "aligned")
    return overrides


CASES = [
    pytest.param(file, case, marks=[] if file == "messages.jsonl" else pytest.mark.slow)
    for file, cases in FILES.items()
    for case in cases
]


@pytest.mark.parametrize(("file", "case"), CASES)
def test_a_broken_file_gets_one_line(pair, tmp_path, capfd, file, case):
    content, message = FILES[file][case]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert dry_run(path, pair) == 2
    printed = capfd.readouterr()
    assert printed.err == f"{RECIPE}: 'data.source': {path}: {message}\n"
    assert not printed.out


def test_every_format_has_ten_broken_files():
    assert all(len(cases) >= 10 for file, cases in FILES.items() if file != "messages.json")
