"""Whose the factors in an adapter's file are: told by ranks, shapes or a record, or not guessed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import equal
from csulora_callback.models.saved_adapter import SavedAdapter


class Experts(nn.Module):
    """Three parameters of one module, of which two look the same; ``is_transposed`` as transformers' experts say."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3, 6, 4))
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 4))
        self.is_transposed = is_transposed


class Model(nn.Module):
    def __init__(self, **experts) -> None:
        super().__init__()
        self.experts, self.linear = Experts(**experts), nn.Linear(4, 4)


def saved(folder: Path, *parameters: str, model: nn.Module | None = None, **lora):
    targets = [f"experts.{parameter}" for parameter in parameters]
    settings = {"r": 2, "target_modules": ["linear"], "target_parameters": targets, "init_lora_weights": False}
    model = get_peft_model(model or Model(), LoraConfig(**{**settings, **lora}))
    model.save_pretrained(folder)
    return find_adapter(model)


def shapes(model: nn.Module):
    whole = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.ndim == 3}
    known = {f"{name}[{number}]": tuple(shape[1:]) for name, shape in whole.items() for number in range(shape[0])}
    return lambda names, config: {name: known[name] for name in names if name in known}


def assert_told(read: SavedAdapter, adapter) -> None:
    assert equal(read.factors, adapter.read())
    assert read.scalings == {name: layer.scaling for name, layer in adapter.layers.items()}


def test_one_parameter_needs_no_telling(tmp_path):
    adapter = saved(tmp_path, "up")
    assert_told(SavedAdapter.read(tmp_path), adapter)


def test_a_matrix_is_the_weight_of_its_module_also_where_other_names_end_alike(tmp_path):
    adapter = saved(
        tmp_path, target_modules=[], target_parameters=["up", "down", "linear.weight"], rank_pattern={"up": 4}
    )
    assert_told(SavedAdapter.read(tmp_path), adapter)


@pytest.mark.parametrize("rank", [3, 4, 6])  # other readings: no whole number of experts, or unequal numbers
def test_ranks_tell(tmp_path, rank):
    adapter = saved(tmp_path, "gate", "up", rank_pattern={"gate": rank}, alpha_pattern={"up": 5})
    assert_told(SavedAdapter.read(tmp_path), adapter)


def test_shapes_tell(tmp_path):
    adapter = saved(tmp_path, "up", "down")
    assert_told(SavedAdapter.read(tmp_path, shapes(Model())), adapter)


@pytest.mark.parametrize("stored", [None, shapes(Model()), lambda names, config: {}])
def test_what_cannot_be_told_is_refused_by_name(tmp_path, stored):
    saved(tmp_path, "gate", "up")
    with pytest.raises(ValueError, match=r"'experts' are of parameters of it \('gate' or 'up'\), and which are whose"):
        SavedAdapter.read(tmp_path, stored)


def test_a_record_tells_by_its_order(tmp_path):
    adapter = saved(tmp_path, "gate", "up", "down")
    assert_told(SavedAdapter.read(tmp_path, names=list(adapter.layers)), adapter)
    with pytest.raises(ValueError, match="which are whose cannot be told"):
        SavedAdapter.read(tmp_path, names=[name for name in adapter.layers if "up" not in name])


def test_experts_are_stored_as_others_of_their_module_show(tmp_path):
    for is_transposed in (False, True):
        folder, model = tmp_path / str(is_transposed), Model(is_transposed=is_transposed)
        adapter = saved(
            folder, "up", "down", model=model, rank_pattern={"down": 4}
        )  # down is square, and so is linear
        read = SavedAdapter.read(folder)
        told = read.stored_transposed(shapes(Model())(list(read.factors), None))
        assert told == {name: layer.stored_transposed for name, layer in adapter.layers.items()}
        assert told["experts.down[0]"] == is_transposed
        assert not told["linear"]


def test_square_experts_alone_are_refused_by_name(tmp_path):
    saved(tmp_path, "down")
    read = SavedAdapter.read(tmp_path)
    with pytest.raises(ValueError, match=r"module 'experts.down\[0\]' is square, and whether its weight is stored"):
        read.stored_transposed(shapes(Model())(list(read.factors), None))


def test_a_matrix_by_any_name_is_a_module_only_if_it_is_a_weight(tmp_path):
    linear = saved(tmp_path, model=Model(), target_modules=[], target_parameters=["linear.weight"])
    assert list(linear.layers) == ["linear"]
    assert_told(SavedAdapter.read(tmp_path), linear)
    for number, (shape, why) in enumerate(
        (((5, 4), "a matrix that is not its weight"), ((1, 5, 4), "a stack of one"))
    ):
        model = Model()
        model.experts.table = nn.Parameter(torch.randn(shape))
        with pytest.raises(ValueError, match=f"module 'experts': LoRA on its parameter 'table', {why}"):
            saved(tmp_path / str(number), "table", model=model)
