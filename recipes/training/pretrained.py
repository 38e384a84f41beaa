"""Checkpoints as transformers loads them, without running code that lies beside them."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from csulora_callback.models.foreign import first_line
from recipes.schema.recipe import RecipeError


def load_pretrained(kind: type, aligned: str, **settings: object) -> PreTrainedModel | PreTrainedTokenizerBase:
    """What one of transformers' auto classes loads from ``model.aligned``.

    Raises:
        RecipeError: naming ``model.aligned`` and why it does not load.
    """
    try:
        # False, as with None transformers asks on the terminal whether to run code that lies beside a model.
        return kind.from_pretrained(aligned, trust_remote_code=False, **settings)
    except Exception as error:  # of files that are missing or broken in one of many ways
        own_code = " without running code that lies beside it" if "trust_remote_code" in str(error) else ""
        raise RecipeError(
            f"'model.aligned': {aligned}: transformers does not load it{own_code} ({first_line(error)})"
        ) from error
