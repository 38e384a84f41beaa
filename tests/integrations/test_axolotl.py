"""What axolotl's plugin refuses and leaves off, by axolotl's own reading of a configuration; runs are in the walks."""

import os

import pytest
import yaml

from csulora_callback import Penalty

pytest.importorskip("axolotl", reason="axolotl is not installed")
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # looked at when it is imported

from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from csulora_callback.integrations.axolotl import FUSED, CSULoRAPlugin
from tests.helpers.walks import lay_out

NAME = "csulora_callback.integrations.axolotl.CSULoRAPlugin"
PROBES = [f"tell of weapon {number}" for number in range(16)]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What axolotl makes of a YAML with these keys, in which nothing is on unless it says so."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)

    def load(section, plugins=(NAME,), **keys):
        written = {
            "base_model": "org/aligned",
            "adapter": "lora",
            "lora_r": 4,
            "lora_target_linear": True,
            "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
            "output_dir": "out",
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "bf16": False,
            "plugins": list(plugins),
            **({} if section is None else {"csulora": section}),
            **keys,
        }
        (tmp_path / "walk.yaml").write_text(yaml.safe_dump(written))
        return load_cfg("walk.yaml")

    return load


def callbacks(cfg) -> list:
    return PluginManager.get_instance().add_callbacks_pre_trainer(cfg=cfg, model=None)


def test_the_section_comes_through_axolotls_validation(read):
    cfg = read({"base_model": "org/base", "penalty": "guard", "strength": 3, "max_drift": {"csulora/update_norm": 2}})
    (callback,) = callbacks(cfg)
    assert (callback.base_model, callback.penalty) == ("org/base", Penalty.guard(3))
    assert callback.budget.max_drift == {"csulora/update_norm": 2}
    assert callbacks(cfg)[0] is not callback


@pytest.mark.parametrize(
    ("section", "keys", "said"),
    [
        (None, {}, "csulora: expected this section beside CSULoRAPlugin"),
        ("org/base", {}, "csulora: expected the callback's arguments by name"),
        ({"base_model": "org/base", "rnak": 3}, {}, "csulora: `rnak`: expected a key .* Did you mean 'rank'?"),
        ({"base_model": "org/base", "rank": 0}, {}, "csulora: `rank`: expected a whole number ≥ 1"),
        ({"rank": 3}, {}, "csulora: `base_model`: expected the unaligned base checkpoint"),
        ({"base_model": "org/base"}, {"relora": True, "jagged_restart_steps": 10}, "relora: expected it off"),
        (
            {"base_model": "org/base", "probes": PROBES},
            {"lora_mlp_kernel": True, "lora_o_kernel": True},
            "lora_mlp_kernel: expected it off .* Set lora_mlp_kernel, lora_o_kernel to false",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_loaded(read, section, keys, said):
    with pytest.raises(ValueError, match=said):
        read(section, **keys)


@pytest.mark.parametrize(
    ("section", "on"),
    [
        ({"probes": PROBES}, False),
        ({"probes": PROBES, "strength": 3}, False),
        ({"probes": PROBES, "penalty": "guard"}, True),
        ({"strength": 3}, True),
    ],
)
def test_kernels_that_axolotl_switches_on_by_itself_stay_off_where_activations_are_read(read, section, on):
    cfg = read({"base_model": "org/base", **section})
    assert [bool(cfg[key]) for key in FUSED] == [on] * len(FUSED)


def test_a_configuration_without_the_plugin_gets_no_callback(read):
    """Although axolotl keeps the plugins of earlier ones in the same process, and calls all of them."""
    read({"base_model": "org/base"})
    assert any(isinstance(plugin, CSULoRAPlugin) for plugin in PluginManager.get_instance().plugins.values())
    other = "axolotl.integrations.spectrum.SpectrumPlugin"
    cfg = read(None, plugins=[other], spectrum_top_fraction=0.5)
    assert callbacks(cfg) == []
    CSULoRAPlugin().register(DictDefault(plugins=[other]))  # raises nothing
