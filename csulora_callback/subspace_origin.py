"""Whether a subspace is of the aligned model that an adapter sits on."""

from __future__ import annotations

import logging
import os

from csulora_callback.fingerprints import Fingerprints
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.checkpoint import Source, open_checkpoint
from csulora_callback.models.processes import Processes
from csulora_callback.models.under_adapter import NoFullPrecision, weights_under
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_cache import default_cache_dir

logger = logging.getLogger(__name__)


def check_origin(
    subspace: SafetySubspace, aligned: Source, processes: Processes, cache_dir: str | os.PathLike | None = None
) -> None:
    """Refuse a subspace that was estimated from other aligned weights than the adapter sits on.

    Args:
        subspace: the subspace.
        aligned: weights in memory, or files, which are not read where they look as they did when they last were.
        processes: all of which have to call.
        cache_dir: where it is kept how files looked; by default in the user's cache.

    Raises:
        ValueError: if its fingerprint says so. Weights of another dtype cannot be compared, and cost a warning.
    """
    origin, names = subspace.metadata["aligned"], list(subspace)
    checkpoint = processes.together(lambda: open_checkpoint(aligned, names))
    checkpoint = checkpoint.first_rows({name: len(subspace[name].U) for name in names})
    dtype = str(checkpoint.dtype(names[0])).removeprefix("torch.")
    if origin["dtypes"] != [dtype]:
        logger.warning(
            "The subspace was estimated from %s weights and the model holds %s ones: whether they are the same "
            "checkpoint cannot be checked.",
            "/".join(origin["dtypes"]),
            dtype,
        )
        return
    if cache_dir is None and checkpoint.files(names):
        cache_dir = default_cache_dir()
    if Fingerprints(cache_dir, processes).of(checkpoint, names) != origin["fingerprint"]:
        raise ValueError(
            f"`subspace`: expected one of the aligned model in use ({checkpoint.source}), but the fingerprint of the "
            f"weights it was estimated from ({origin['source']}) is another. Estimate it again, from this model."
        )


def check_under(
    subspace: SafetySubspace, adapter: Adapter, processes: Processes, cache_dir: str | os.PathLike | None = None
) -> None:
    """As :func:`check_origin`, of the weights that an adapter sits on.

    Where they are quantized and their files, too, they cannot be compared, and this costs a warning.
    """
    aligned, why = processes.together(lambda: _under(adapter))
    reasons = [each for each in processes.gather(why) if each is not None]
    if reasons:
        logger.warning("Whether the subspace is one of the model in use cannot be checked. %s", reasons[0])
    else:
        check_origin(subspace, aligned, processes, cache_dir)


def _under(adapter: Adapter) -> tuple[Source | None, str | None]:
    try:
        return weights_under(adapter), None
    except NoFullPrecision as error:
        return None, str(error)
