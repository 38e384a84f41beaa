"""Heat maps of the drift for the trackers that take images, whichever trainer they belong to."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.corrector import SafetyCorrector

if TYPE_CHECKING:
    import numpy as np

    Images = Mapping[str, np.ndarray]  # by name, each (height, width, 3) in 8 bits
    Send = Callable[[Images, int], None]  # gives a tracker those of a step

logger = logging.getLogger(__name__)

_LOGGERS = ("lightning.pytorch.loggers", "pytorch_lightning.loggers")  # one project, two import names


def check_drawing() -> None:
    """Refuse to start where nothing could be drawn.

    Raises:
        ImportError: naming the extra that is missing.
    """
    from csulora_callback.reporting.extra import report_extra

    with report_extra("`heat_maps=True`"):
        import csulora_callback.reporting.heat_maps  # noqa: F401


def warn_if_unseen(trackers: list[Send], evaluates: bool) -> None:
    """Say before training that heat maps were asked for, and nobody will see any.

    Args:
        trackers: of :func:`of_callbacks` or :func:`of_loggers`.
        evaluates: whether the run evaluates.
    """
    if not trackers:
        logger.warning(
            "`heat_maps`: expected a tracker that takes images (TensorBoard, W&B, MLflow, or in transformers.Trainer "
            "trackio), but this run reports to none. No heat map is drawn."
        )
    elif not evaluates:
        logger.warning("`heat_maps`: expected a run that evaluates, but this one does not. No heat map is drawn.")


def send_heat_maps(corrector: SafetyCorrector, adapter: CorrectedAdapter, trackers: list[Send], step: int) -> None:
    """Draw an adapter before and after its correction; one that could not be corrected has nothing to show.

    Args:
        corrector: which made the correction.
        adapter: of the moment.
        trackers: of :func:`of_callbacks` or :func:`of_loggers`.
        step: as the tracker counts.
    """
    if not trackers:
        return
    # Not out of the record: it is made once, and what is noted in it until the next save would be left out.
    inspections = corrector.inspect(adapter)
    if not inspections:
        return
    from csulora_callback.reporting.heat_maps import draw_pixels, heat_maps  # matplotlib is an extra

    images = {f"csulora/heat_map/{name}": draw_pixels(shown) for name, shown in heat_maps(**inspections).items()}
    for send in trackers:
        send(images, step)


def of_callbacks(callbacks: Iterable[object]) -> list[Send]:
    """The trackers that take images among the callbacks of ``transformers.Trainer``."""
    from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

    ways = {
        TensorBoardCallback: lambda tracker, *images: _to_tensorboard(tracker.tb_writer, *images),
        WandbCallback: lambda tracker, *images: _to_wandb(*images),
        TrackioCallback: lambda tracker, *images: _to_trackio(*images),
        MLflowCallback: lambda tracker, *images: _to_mlflow(*images),
    }
    return _found(callbacks, ways)


def of_loggers(loggers: Iterable[object]) -> list[Send]:
    """The trackers that take images among the loggers of Lightning's ``Trainer``; it has none of trackio."""
    ways = {}
    for module in (sys.modules[name] for name in _LOGGERS if name in sys.modules):
        ways[module.TensorBoardLogger] = lambda tracker, *images: _to_tensorboard(tracker.experiment, *images)
        ways[module.WandbLogger] = _to_wandb_logger
        ways[module.MLFlowLogger] = _to_mlflow_logger
    return _found(loggers, ways)


def _found(trackers: Iterable[object], ways: Mapping[type, Callable]) -> list[Send]:
    return [partial(way, tracker) for tracker in trackers for kind, way in ways.items() if isinstance(tracker, kind)]


def _to_tensorboard(writer: object, images: Images, step: int) -> None:
    for name, image in images.items():
        writer.add_image(name, image, step, dataformats="HWC")


# As the callbacks of transformers.Trainer report: to the run of this process, with the step beside what is logged.


def _to_wandb(images: Images, step: int) -> None:
    import wandb

    wandb.log({**{name: wandb.Image(image) for name, image in images.items()}, "train/global_step": step})


def _to_trackio(images: Images, step: int) -> None:
    import trackio

    trackio.log({**{name: trackio.Image(image) for name, image in images.items()}, "train/global_step": step})


def _to_mlflow(images: Images, step: int) -> None:
    import mlflow

    for name, image in images.items():
        mlflow.log_image(image, key=name, step=step)


def _to_wandb_logger(logger: object, images: Images, step: int) -> None:
    for name, image in images.items():
        logger.log_image(name, [image], step)


def _to_mlflow_logger(logger: object, images: Images, step: int) -> None:
    for name, image in images.items():
        logger.experiment.log_image(logger.run_id, image, key=name, step=step)
