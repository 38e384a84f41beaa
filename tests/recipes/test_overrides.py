"""What an override does to a recipe's sections: keys are set, mappings replace, null removes."""

import pytest

from recipes.files.recipe import load_recipe
from recipes.schema.recipe import Correction, Preset, Training

FILE = """
output: a
training: {max_steps: 7, seed: 3}
corrections: {csulora: {preset: csulora, rank: 8}, guard: {preset: guard, rank: 8}}
smoke_overrides: ["training.max_steps=1", "corrections.csulora.rank=2"]
"""


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    return lambda *overrides: load_recipe(str(path), list(overrides))


def test_a_key_is_set_and_the_others_stay(loaded):
    recipe = loaded("corrections.guard.strength=3", "training.seed=5")
    assert recipe.corrections["guard"] == Correction(Preset.guard, strength=3.0, rank=8)
    assert (recipe.training.seed, recipe.training.max_steps) == (5, 7)


def test_a_mapping_replaces_what_is_there(loaded):
    mine = Correction(Preset.projection)
    assert loaded("corrections={mine: {preset: projection}}").corrections == {"mine": mine}
    assert loaded("training={seed: 4}").training == Training(seed=4)
    one = loaded("corrections.guard={preset: projection}").corrections
    assert (one["guard"], one["csulora"].rank) == (mine, 8)  # not the rank of the guard that was there


def test_null_removes_an_entry_or_a_section(loaded):
    assert list(loaded("corrections.csulora=null").corrections) == ["guard"]
    assert loaded("training=null").training == Training()
    in_order = loaded("corrections.csulora=null", "corrections.csulora.preset=guard").corrections
    assert in_order["csulora"] == Correction(Preset.guard)  # the later override finds nothing of the old one


def test_overrides_come_after_those_of_a_smoke_test(loaded):
    recipe = loaded("smoke=true", "corrections.guard=null")
    assert (recipe.training.max_steps, recipe.corrections["csulora"].rank, len(recipe.corrections)) == (1, 2, 1)
    assert loaded("smoke=true", "training.max_steps=5").training.max_steps == 5
