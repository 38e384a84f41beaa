"""Whether a subspace is of the aligned model that an adapter sits on."""

from __future__ import annotations

import logging
import os

from csulora_callback.fingerprints import Fingerprints
from csulora_callback.models.checkpoint import Source, open_checkpoint
from csulora_callback.models.processes import Processes
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
