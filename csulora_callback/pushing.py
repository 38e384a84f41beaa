"""Pushes to the Hub, as far as they have to do with what lies beside a corrected adapter. Nothing here uploads.

A Trainer uploads its output folder with patterns of what is to be left out; for the time of a push there are more of
these. ``push_to_hub`` of a model saves into a folder that is not kept, writes a card of its own over the one that was
saved, and uploads all: nobody tells a save that it is a part of that, so it looks on the stack.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from huggingface_hub import ModelCard
from transformers.utils.hub import PushToHubMixin, hf_api

_LOCK = threading.RLock()  # one push at a time replaces a method that all share
_here = threading.local()


@contextmanager
def leaving_out(patterns: Sequence[str]) -> Iterator[None]:
    """Folders that transformers uploads from this thread go without files of these patterns, also in the background.

    Example:
        >>> with leaving_out(["csulora/raw/*"]):
        ...     "upload_folder" in vars(hf_api())
        True
        >>> "upload_folder" in vars(hf_api())
        False
    """
    api, thread = hf_api(), threading.get_ident()
    with _LOCK:
        earlier, original = vars(api).get("upload_folder"), api.upload_folder

        def upload_folder(*args: object, **kwargs: object) -> object:
            if threading.get_ident() == thread:
                kwargs["ignore_patterns"] = [*_listed(kwargs.get("ignore_patterns")), *patterns]
            return original(*args, **kwargs)

        api.upload_folder = upload_folder
        outer, _here.leaves_out = getattr(_here, "leaves_out", False), True
        try:
            yield
        finally:
            _here.leaves_out = outer
            if earlier is None:
                del api.upload_folder
            else:
                api.upload_folder = earlier


def uploads_all() -> bool:
    """Whether what is saved now is uploaded whole: it is saved in a push that :func:`leaving_out` is not around.

    Example:
        >>> uploads_all()
        False
    """
    return _push_of_model() is not None or (_push_of_trainer() is not None and not getattr(_here, "leaves_out", False))


def card_of_push() -> ModelCard | None:
    """The card that a model's ``push_to_hub``, if what is saved now is saved in one, is about to write over ours.

    Example:
        >>> card_of_push() is None
        True
    """
    frame = _push_of_model()
    return None if frame is None else frame.f_locals.get("model_card")


def _push_of_model() -> FrameType | None:
    frame, sentences = _running(PushToHubMixin.push_to_hub), sys.modules.get("sentence_transformers.base.model")
    return frame if frame is not None or sentences is None else _running(sentences.BaseModel.push_to_hub)


def _push_of_trainer() -> FrameType | None:
    trainers = sys.modules.get("transformers.trainer")  # whose import costs a second
    return None if trainers is None else _running(trainers.Trainer.push_to_hub)


def _running(function: object) -> FrameType | None:
    """The innermost call of a function in this thread."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def _listed(patterns: Sequence[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())
