"""The section in a model card, as text: what is the user's stays, byte for byte, whatever the card looks like."""

import logging

import pytest
from huggingface_hub import ModelCard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from csulora_callback import model_card
from csulora_callback.card_section import section_of
from csulora_callback.model_card import CARD, with_metadata, with_section, without_section

BEGIN, END = with_section("", "").split("\n\n")[0].split("\n")[0], "<!-- csulora:end -->"
RECORD = {
    "status": "corrected",
    "rank": "truncate",
    "penalty": {"name": "guard", "strength": 10.0},
    "subspace": {
        "fingerprint": "f" * 64,
        "energy_kept": 0.5,
        "rank": 64,
        "base": {"source": "org/base@v1", "fingerprint": "b" * 64, "dtypes": ["bfloat16"]},
        "aligned": {"source": "LlamaForCausalLM in memory", "fingerprint": "a" * 64, "dtypes": ["bfloat16"]},
    },
    "metrics": {
        "csulora/update_norm": 2.0,
        "csulora/aligned_energy": 0.125,
        "csulora/partial_energy": 0.25,
        "csulora/off_energy": 0.625,
        "csulora/attenuation": 0.0625,
        "csulora/relative_change": 0.375,
        "csulora/truncation_error": 0.03125,
    },
    "modules": {"q_proj": {}, "v_proj": {}},
}
PIECES = st.sampled_from(
    ["# Mine\n", "text", "\r\n", "\n", "\n\n", "  ", "---\n", "```\n", "<!-- a comment -->\n", "é\u2028"]
)
CARDS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)
MARKERS = st.sampled_from(
    [f"\n{BEGIN}\n", f"\n{END}\n", "\n<!-- csulora:begin -->\r\n", "mine\n", "also mine", "\r\n"]
)


@settings(max_examples=50)
@given(CARDS, st.sampled_from(["One.", "Two\nlines."]))
@example("---\nlicense: mit\n---\r\n\r\n# Mine\r\n", "One.")
@example("", "One.")
def test_a_section_comes_and_goes_and_leaves_no_trace(card, section):
    once = with_section(card, section)
    assert with_section(once, section) == once
    assert with_section(once, "Other.") == with_section(card, "Other.")
    assert without_section(once) == card
    assert once.count("<!-- csulora:begin") == once.count("<!-- csulora:end") == 1


@given(CARDS, CARDS)
@example("\r", "")  # ends in half a line break
def test_what_is_written_around_a_section_stays_where_it_is(above, below):
    assume("<!-- csulora" not in above + below)
    around = f"{above}\n{BEGIN}\nOld.\n{END}\n{below}"
    line_break = "\r\n" if "\r\n" in around else "\n"
    renewed = with_section(around, "New.")
    assert renewed == f"{above}\n{BEGIN}{line_break}New.{line_break}{END}\n{below}"


@given(st.lists(MARKERS, max_size=9).map("".join))
@example(f"mine\n{BEGIN}\nhalf a section of old\n")
@example(f"{BEGIN}\nmine\n{BEGIN}\nold\n{END}\nalso mine\n{END}\n")
def test_of_nested_doubled_and_half_deleted_sections_one_is_left_and_no_text_is_lost(card):
    found = with_section(card, "New.")
    assert found.count("csulora:begin") == found.count("csulora:end") == 1
    assert with_section(found, "New.") == found
    kept = without_section(card)  # without what stands in whole sections, which is ours
    for word in ("mine", "also mine", "half a section of old"):
        assert found.count(word) == kept.count(word)


METADATA = {
    "none": "# Mine\n",
    "as PEFT writes it": "---\nbase_model: org/it\nlibrary_name: peft\ntags:\n- lora\n- transformers\n---\n\n# Mine\n",
    "a user's": "---\n# licence as the lawyers want it\nlicense: mit   # really\nlibrary_name: other\n---\ntext",
    "tags in brackets": "---\ntags: [a, b]\nlicense: mit\n---\ntext\n",
    "no tags in brackets": "---\ntags: []\n---\ntext\n",
    "indented, with Windows' line endings": "---\r\ntags:\r\n  - a\r\n  - b\r\nlicense: mit\r\n---\r\ntext\r\n",
    "keys without values": "---\nbase_model:\nlicense: null\n---\ntext\n",
}


@pytest.mark.parametrize("card", METADATA.values(), ids=METADATA)
def test_metadata_gain_lines_and_lose_nothing(card):
    wanted = {"base_model": "org/aligned", "library_name": "peft"}
    found = with_metadata(card, wanted, tagged=True)
    before, after = (
        ModelCard(text).data.to_dict() for text in (card if card[0] == "-" else f"---\n\n---\n{card}", found)
    )
    assert after.pop("tags") == [*before.pop("tags", []), "csulora"]
    if "keys without" not in card and "base_model:\n" not in card:
        assert after == {**wanted, **before}
    assert with_metadata(found, wanted, tagged=True) == found
    left = iter(found.replace(", csulora", "").replace("csulora", "").splitlines(keepends=True))
    assert all(line in left for line in card.splitlines(keepends=True))  # in their order, and as they were
    untagged = with_metadata(found, wanted, tagged=False)
    assert ModelCard(untagged).data.get("tags", []) == ModelCard(found).data.tags[:-1]


UNUSUAL = {
    "invalid YAML": b"---\ntags: [a\nlicense: mit\n---\n# Mine\n",
    "metadata that are a text": b"---\njust a text\n---\n# Mine\n",
    "tags that are a text": b"---\ntags: lora\n---\n# Mine\n",
    "tags twice": b"---\ntags:\n- a\ntags:\n- b\n---\n# Mine\n",
}


@pytest.mark.parametrize("content", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_metadata_are_left_alone_and_named(tmp_path, caplog, content):
    (tmp_path / CARD).write_bytes(content)
    model_card.renew(tmp_path, RECORD, tmp_path)
    found = (tmp_path / CARD).read_bytes()
    assert found.startswith(content.rstrip(b"\n"))
    assert found.count(BEGIN.encode()) == 1
    model_card.renew(tmp_path, RECORD, tmp_path)
    assert (tmp_path / CARD).read_bytes() == found
    if b"tags:\n- a\ntags" not in content:
        assert "README.md: its metadata, and with it the tag csulora, were left as is" in caplog.text


@pytest.mark.parametrize("content", ["# Mein Ärger".encode("latin-1"), "# Mine".encode("utf-16")])
def test_a_card_in_another_encoding_is_left_alone_and_named(tmp_path, caplog, content):
    (tmp_path / CARD).write_bytes(content)
    for change in (lambda: model_card.renew(tmp_path, RECORD, tmp_path), lambda: model_card.remove(tmp_path)):
        change()
        assert (tmp_path / CARD).read_bytes() == content
        assert f"{tmp_path / CARD}: left as it is" in caplog.text


def test_a_folder_in_the_place_of_the_card_stops_nothing(tmp_path, caplog):
    (tmp_path / CARD / "inside").mkdir(parents=True)
    model_card.renew(tmp_path, RECORD, tmp_path)
    assert f"{tmp_path / CARD}: left as it is" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [CARD]


def test_a_byte_order_mark_and_a_link_stay(tmp_path):
    (tmp_path / "shared.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mine\n")
    (tmp_path / CARD).symlink_to("shared.md")
    model_card.renew(tmp_path, RECORD, tmp_path)
    assert (tmp_path / CARD).is_symlink()
    assert (tmp_path / "shared.md").read_bytes().startswith(b"\xef\xbb\xbf---\nlicense: mit\n")
    assert ModelCard((tmp_path / CARD).read_text(encoding="utf-8-sig")).data.tags == ["csulora"]


def test_half_a_section_is_named(tmp_path, caplog):
    (tmp_path / CARD).write_text(f"# Mine\n\n{BEGIN}\nold text\n")
    with caplog.at_level(logging.WARNING):
        model_card.renew(tmp_path, RECORD, tmp_path)
    assert "one of the two comments around the section of csulora was missing" in caplog.text
    assert "old text" in (tmp_path / CARD).read_text()


def test_the_section_says_what_the_record_says():
    section = section_of(RECORD, base_model="org/it")
    for row in (
        "| penalty | guard (strength 10) |",
        f"| base checkpoint | `org/base@v1` (bfloat16, fingerprint `{'b' * 64}`) |",
        f"| aligned checkpoint | `org/it` (bfloat16, fingerprint `{'a' * 64}`) |",
        "| safety subspace | rank 64; keeps 50.0% of the displacement's energy |",
        "| modules | 2 |",
        "| of it fully aligned / partially / off-subspace | 12.5% / 25.0% / 62.5% |",
        "| attenuation, 1 − ‖X‖/‖Δ‖ | 6.2% |",
        "| truncation error | 3.1% |",
        "csulora restore",
        "Marchenko Breneur, Oleksandr",
    ):
        assert row in section
    assert "`LlamaForCausalLM in memory`" in section_of(RECORD)


def test_the_section_says_which_rank_was_asked_for():
    for rank, energy, said in (
        (None, None, "rank a thirty-second of each module's smaller side; keeps 50.0%"),
        (64, None, "rank 64; keeps 50.0%"),
        (None, 0.9, "smallest rank that keeps 90.0% of the displacement's energy; keeps 50.0%"),
    ):
        record = {**RECORD, "subspace": {**RECORD["subspace"], "rank": rank, "energy": energy}}
        assert f"| safety subspace | {said}" in section_of(record)


def test_an_adapter_that_could_not_be_corrected_says_so_and_has_no_tag(tmp_path):
    record = {**RECORD, "status": "not corrected: the factors hold NaN or Inf", "metrics": {}}
    model_card.renew(tmp_path, record, tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert "**This adapter was not corrected.**" in card.text
    assert "the factors hold NaN or Inf" in card.text
    assert card.data.tags is None
    assert "csulora restore" not in card.text


def test_names_from_elsewhere_break_neither_table_nor_section(tmp_path):
    nasty = f"a|b`c`\n{END}\n<script>"
    record = {**RECORD, "status": f"not corrected: {nasty}", "penalty": {"name": nasty, "x": nasty}}
    record["subspace"] = {"base": {"source": nasty, "fingerprint": nasty, "dtypes": ["float32"]}}
    model_card.renew(tmp_path, record, tmp_path)
    once = (tmp_path / CARD).read_bytes()
    model_card.renew(tmp_path, record, tmp_path)
    assert (tmp_path / CARD).read_bytes() == once
    assert b"\n<script>" not in once
    rows = [line for line in once.decode().splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
