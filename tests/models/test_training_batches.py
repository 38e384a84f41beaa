"""Batches cut into rows, against the rows that they were made of; what is not certain is left out."""

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, Qwen2AudioConfig, Qwen2VLConfig

from csulora_callback.models import beside_ids
from csulora_callback.models.activations import Texts, known_as_text
from csulora_callback.models.training_batches import TrainedBatch
from csulora_callback.models.training_rows import LENGTH, TrainedRow, TrainingRows
from tests.helpers.vision import IMAGE, MODELS, Pictures, qwen

TEXT = LlamaConfig()
LLAVA = LlavaConfig(image_token_index=IMAGE)


def rows_of(ids, config=TEXT, wanted=None, **given):
    return TrainedBatch(torch.as_tensor(ids), given, config, wanted)


def ids_of(batch):
    return [row.ids for row in batch]


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_batch_is_cut_into_what_it_was_collated_of(kind):
    """Qwen's patches by their grids, however many images a row has; LLaVA's where each row has one, in one tile."""
    images = [1, 3, 0, 2] if kind == "qwen" else [1, 1, 1]
    data, config = Pictures(images, kind), MODELS[kind]().config
    batch = data.collate(list(data))
    ids, cut = batch.pop("input_ids"), []
    cut = rows_of(ids, config, **batch)
    assert cut.left_out == 0
    for row, original in zip(cut, data, strict=True):
        assert row.ids == original["input_ids"]
        expected = {name: value for name, value in original.items() if name != "input_ids"}
        inputs = {name: value for name, value in row.inputs.items() if name != "mm_token_type_ids"}
        assert inputs.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(inputs[name], value)
        if kind == "qwen" and expected:
            assert row.inputs["mm_token_type_ids"].tolist() == [[int(token == IMAGE) for token in row.ids]]


def test_images_of_packed_documents_are_found_by_their_grids():
    data = Pictures([2, 0, 1], "qwen")
    whole = [data.collate([row]) for row in data]
    packed = {name: torch.cat([batch[name] for batch in whole], 1) for name in ("input_ids", "mm_token_type_ids")}
    images = {name: torch.cat([b[name] for b in whole if name in b]) for name in ("pixel_values", "image_grid_thw")}
    steps = torch.cat([torch.arange(len(row["input_ids"])) for row in data])[None]
    cut = rows_of(packed.pop("input_ids"), qwen().config, **packed, **images, position_ids=steps)
    assert ids_of(cut) == [row["input_ids"] for row in data]
    for row, original in zip(cut, data, strict=True):
        assert ("pixel_values" in row.inputs) == ("pixel_values" in original)
        if row.inputs:
            assert torch.equal(row.inputs["pixel_values"], original["pixel_values"])
            assert row.inputs["position_ids"].tolist() == [list(range(len(row.ids)))]


def test_grids_that_do_not_add_up_are_not_believed():
    data = Pictures([1, 2, 0], "qwen")
    batch = data.collate(list(data))
    ids = batch.pop("input_ids")
    moved = {**batch, "image_grid_thw": batch["image_grid_thw"].flip(0)}
    assert (len(rows_of(ids, qwen().config, **moved)), rows_of(ids, qwen().config, **moved).left_out) == (1, 2)
    more = {**batch, "second_per_grid_ts": torch.ones(3)}  # of which nobody says whose they are
    assert rows_of(ids, qwen().config, **more).left_out == 2


def test_lines_are_rows_where_each_row_has_one_image_and_otherwise_nobody_knows():
    ids, pixels = torch.tensor([[IMAGE, 5, 6], [IMAGE, 7, 8]]), torch.arange(2.0)[:, None, None, None]
    whole = rows_of(ids, LLAVA, pixel_values=pixels)
    assert [row.inputs["pixel_values"].item() for row in whole] == [0.0, 1.0]
    two = torch.tensor([[IMAGE, IMAGE, 6], [5, 7, 8]])
    cut = rows_of(two, LLAVA, pixel_values=pixels)
    assert (ids_of(cut), cut.left_out) == ([[5, 7, 8]], 1)
    assert cut[0].inputs == {}
    # Another number of images than rows; none of whose placeholder the config knows; and not one tensor, but a list.
    assert rows_of(ids, LLAVA, pixel_values=torch.ones(3, 1)).left_out == 2
    assert rows_of(ids, TEXT, pixel_values=pixels).left_out == 2
    assert rows_of(ids, LLAVA, pixel_values=[torch.ones(1), torch.ones(1)]).left_out == 2


def test_recordings_are_cut_as_images_are():
    config = Qwen2AudioConfig(audio_token_index=IMAGE)
    given = {"input_features": torch.arange(24.0).view(2, 3, 4), "feature_attention_mask": torch.ones(2, 4).long()}
    cut = rows_of([[IMAGE, IMAGE, 5], [IMAGE, 6, 7]], config, **given)
    assert torch.equal(torch.cat([row.inputs["input_features"] for row in cut]), given["input_features"])
    assert {row.inputs["feature_attention_mask"].shape for row in cut} == {(1, 4)}
    assert rows_of([[IMAGE, IMAGE, 5], [8, 6, 7]], config, **given).left_out == 1


def test_of_two_kinds_each_row_has_to_have_both():
    config = Qwen2VLConfig(image_token_id=IMAGE, video_token_id=30)
    given = {"pixel_values": torch.ones(2, 3), "pixel_values_videos": torch.ones(2, 3)}
    assert rows_of([[IMAGE, 30, 5], [IMAGE, 30, 6]], config, **given).left_out == 0
    assert rows_of([[IMAGE, 30, 5], [IMAGE, 7, 6]], config, **given).left_out == 2


def test_what_belongs_to_the_only_row_of_a_batch_is_all_there_is():
    given = {"pixel_values": torch.ones(4, 2), "features": torch.ones(9)}
    row = rows_of([[5, 6, 7]], TEXT, **given)[0]
    assert {name: value.shape for name, value in row.inputs.items()} == {"pixel_values": (4, 2), "features": (9,)}
    mask, types = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 2]])
    row = rows_of([[2, 6, 7]], TEXT, attention_mask=mask, token_type_ids=types, **given)[0]
    assert (row.ids, row.inputs["token_type_ids"].tolist()) == ([6, 7], [[1, 2]])
    # This one may have a line for each token, of which one is gone.
    assert rows_of([[2, 6, 7]], TEXT, attention_mask=mask, marks=torch.ones(1, 3)).left_out == 1


def test_a_part_of_a_batch_does_not_keep_all_of_it():
    pixels = torch.ones(2, 3)
    row = rows_of([[IMAGE, 5], [IMAGE, 6]], LLAVA, pixel_values=pixels)[1]
    assert row.inputs["pixel_values"].untyped_storage().nbytes() == 3 * 4
    pixels.zero_()
    assert row.inputs["pixel_values"].tolist() == [[1.0] * 3]


def test_what_is_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr(beside_ids, "MOST_BYTES", 4 * 10)
    assert rows_of([[IMAGE, 5]], LLAVA, pixel_values=torch.ones(1, 10)).left_out == 0
    assert rows_of([[IMAGE, 5]], LLAVA, pixel_values=torch.ones(1, 11)).left_out == 1


def test_no_placeholder_is_cut_off():
    ids = [5] * LENGTH + [IMAGE, 6, 7]
    row = rows_of([ids], LLAVA, pixel_values=torch.ones(1, 2), mm_token_type_ids=torch.arange(len(ids))[None])[0]
    assert row.ids == ids[: LENGTH + 1]
    assert row.inputs["mm_token_type_ids"].shape == (1, LENGTH + 1)
    assert len(rows_of([[IMAGE, *ids[:-3], 9]], LLAVA, pixel_values=torch.ones(1, 2))[0].ids) == LENGTH
    assert len(rows_of([ids], TEXT)[0].ids) == LENGTH


def test_positions_of_images_are_kept_with_them():
    positions = torch.arange(24).view(3, 2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    given = {"pixel_values": torch.ones(2, 3), "attention_mask": mask, "position_ids": positions}
    cut = rows_of([[IMAGE, 5, 6, 2], [2, IMAGE, 7, 8]], LLAVA, **given)
    assert [row.inputs["position_ids"].tolist() for row in cut] == [
        [[[0, 1, 2]], [[8, 9, 10]], [[16, 17, 18]]],
        [[[5, 6, 7]], [[13, 14, 15]], [[21, 22, 23]]],
    ]
    assert rows_of([[3, 5, 6, 2]], TEXT, position_ids=torch.arange(4)[None])[0].inputs == {}


PACKED = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
FLAT = [[token for document in PACKED for token in document]]
SIGNS = {
    "positions": {"position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3]]},
    "positions from two on": {"position_ids": [[2, 3, 4, 2, 3, 2, 3, 4, 5]]},
    "positions of M-RoPE": {"position_ids": [[[0, 1, 2, 0, 1, 0, 1, 2, 3]]] * 3},
    "an index": {"seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2, 2]]},
    "lengths": {"cu_seq_lens_q": [0, 3, 5, 9]},
}


@pytest.mark.parametrize("signs", SIGNS)
def test_packed_documents_are_rows(signs):
    given = {name: torch.tensor(value) for name, value in SIGNS[signs].items()}
    assert ids_of(rows_of(FLAT, **given)) == PACKED


def test_documents_are_not_rows_where_there_happen_to_be_as_many():
    ids, labels = [[IMAGE, 5, IMAGE, 6], [2, 2, 2, 2]], torch.tensor([[-100, 5, -100, 6], [-100] * 4])
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    cut = rows_of(ids, LLAVA, labels=labels, position_ids=positions, pixel_values=torch.ones(2, 1))
    assert (len(cut), cut.left_out) == (0, 2)


def test_what_is_padded_behind_packed_documents_is_none():
    ids, labels = [[5, 6, 7, 8, 9, 2, 2]], torch.tensor([[-100, 6, 7, -100, 9, -100, -100]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    assert ids_of(rows_of(ids, labels=labels, position_ids=positions)) == [[5, 6, 7], [8, 9]]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert ids_of(rows_of(ids, attention_mask=mask, position_ids=positions)) == [[5, 6, 7], [8, 9]]


def test_padding_on_the_left_is_not_a_document():
    mask, positions = (
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]]),
    )
    cut = rows_of([[2, 2, 5, 6, 7], [3, 4, 5, 6, 7]], attention_mask=mask, position_ids=positions)
    assert ids_of(cut) == [[5, 6, 7], [3, 4, 5, 6, 7]]


def test_the_prompt_of_a_packed_document_is_what_stands_before_its_answer():
    labels = torch.tensor([[-100, -100, 7, -100, 9, -100, 11, 12, 13]])
    positions = torch.tensor(SIGNS["positions"]["position_ids"])
    assert [row.start for row in rows_of(FLAT, labels=labels, position_ids=positions)] == [2, 0, 0]
    alone = {"labels": torch.tensor([[-100, 9]]), "position_ids": torch.tensor([[0, 1]])}
    assert rows_of([[8, 9]], **alone)[0].start == 0


def test_only_rows_that_are_wanted_count():
    cut = rows_of([[5, 6], [7, 8], [9, 10], [11, 12]], wanted=lambda count: [True, False] * (count // 2))
    assert (ids_of(cut), cut.left_out) == ([[5, 6], [9, 10]], 0)
    none = rows_of([[5, 6], [7, 8]], wanted=lambda count: [False] * count)  # a batch of undesirable answers, in KTO
    assert (len(none), none.left_out) == (0, 0)
    unknown = rows_of([[5, 6], [7, 8], [9, 10]], wanted=lambda count: [])
    assert (len(unknown), unknown.left_out) == (0, 3)


def test_a_row_that_takes_the_place_of_one_with_images_has_none_of_them():
    sample = TrainingRows()
    sample.offer([TrainedRow([IMAGE], inputs={"pixel_values": torch.ones(1)})] * 64)
    assert len(sample.inputs) == 64
    sample.offer([TrainedRow([5])] * 640)
    assert all((row == [IMAGE]) == (place in sample.inputs) for place, row in enumerate(sample.rows))
    assert 0 < len(sample.inputs) < 64


def test_files_hold_no_images_and_rows_that_had_some_are_not_read():
    texts = Texts([[IMAGE, 5], [6, 7]], [[8]], 2, [1, 1], inputs={0: {"pixel_values": torch.ones(1)}}, left_out=3)
    kept = Texts.from_json(texts.to_json())
    assert texts.counted.rows == texts.task
    assert (kept.counted.rows, kept.counted.starts, kept.left_out) == ([[6, 7]], [1], 3)
    older = {name: value for name, value in texts.to_json().items() if name not in ("with_inputs", "left_out")}
    assert Texts.from_json(older).counted.rows == texts.task
    assert known_as_text(Texts.from_json(older), LLAVA).counted.rows == [[6, 7]]
