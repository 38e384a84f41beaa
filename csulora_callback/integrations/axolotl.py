"""The plugin of axolotl: the callback from the key ``csulora`` of its YAML.

This module is there for axolotl to import, and needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.dict import DictDefault
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "axolotl":
        raise
    raise ModuleNotFoundError(
        "csulora_callback.integrations.axolotl is a plugin that axolotl loads, which is not installed: "
        "pip install axolotl. Without it pass CSULoRACallback to a Trainer.",
        name=error.name,
    ) from error
from pydantic import BaseModel

from csulora_callback.callback import CSULoRACallback
from csulora_callback.integrations.settings import make_callback
from csulora_callback.presets import is_data_aware

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SECTION = "csulora"
FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
"""Keys of axolotl that replace the layers' forward passes, so that what goes into a layer cannot be seen there."""


class CSULoRAArgs(BaseModel):
    """What the plugin adds to axolotl's keys; the section is checked where it is read, by :func:`read_callback`."""

    csulora: dict[str, Any] | None = None


class CSULoRAPlugin(BasePlugin):
    """Adds a :class:`~csulora_callback.CSULoRACallback` to every Trainer that axolotl makes.

    ``plugins: [csulora_callback.integrations.axolotl.CSULoRAPlugin]``, and under ``csulora:`` the arguments of the
    callback (:func:`~csulora_callback.integrations.settings.make_callback`).
    """

    def register(self, cfg: dict) -> None:
        """Refuse what cannot be corrected before anything is loaded; axolotl calls this with what the YAML says.

        Raises:
            ValueError: if the section is missing or the callback refuses it, with ReLoRA, and if fused kernels were
                asked for beside a penalty that measures by activations. Those that axolotl would switch on by itself
                stay off then.
        """
        if not _is_listed(cfg):  # axolotl keeps plugins of earlier configurations of the same process
            return
        callback = read_callback(cfg)
        if cfg.get("relora"):
            raise ValueError(
                "relora: expected it off beside CSULoRAPlugin, as it merges uncorrected updates into the base weights "
                "while it trains, but got true. Leave out one of them."
            )
        if not is_data_aware(callback.penalty):
            return
        asked = [key for key in FUSED if cfg.get(key)]
        if asked:
            raise ValueError(
                f"{asked[0]}: expected it off beside a data-aware penalty, which looks at what goes into each layer, "
                f"and a fused kernel passes the layers by, but got true. Set {', '.join(asked)} to false, or take "
                f"another penalty, such as {SECTION}: {{penalty: guard}}."
            )
        cfg.update(dict.fromkeys(FUSED, False))
        logger.warning("%s stay off: the penalty looks at what goes into each layer.", ", ".join(FUSED))

    def get_input_args(self) -> str:
        """Where axolotl finds the plugin's keys."""
        return f"{__name__}.{CSULoRAArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: dict, model: nn.Module) -> list[CSULoRACallback]:
        """A callback of its own for each Trainer."""
        return [read_callback(cfg)] if _is_listed(cfg) else []


def read_callback(cfg: Mapping[str, Any]) -> CSULoRACallback:
    """The callback that axolotl's configuration describes.

    Raises:
        ValueError: what the callback refuses, and a section that is missing.
    """
    settings = DictDefault(cfg).to_dict().get(SECTION)
    if settings is None:
        raise ValueError(f"{SECTION}: expected this section beside CSULoRAPlugin, such as base_model: org/base in it.")
    try:
        return make_callback(settings)
    except ValueError as error:
        raise ValueError(f"{SECTION}: {error}") from None


def _is_listed(cfg: Mapping[str, Any]) -> bool:
    name = f"{CSULoRAPlugin.__module__}.{CSULoRAPlugin.__qualname__}"
    return name in (cfg.get("plugins") or [])
