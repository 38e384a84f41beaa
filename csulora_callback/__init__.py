"""CSULoRA as a training-time callback: every checkpoint that training writes is already the corrected one."""

from importlib.metadata import version

from csulora_callback.correction import Correction, Penalty, correct

__version__ = version("csulora-callback")
__all__ = ["Correction", "Penalty", "correct"]
