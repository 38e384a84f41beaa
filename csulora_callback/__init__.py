"""CSULoRA as a training-time callback: every checkpoint that training writes is already the corrected one."""

from importlib.metadata import version

__version__ = version("csulora-callback")
