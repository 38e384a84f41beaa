"""CSULoRA as a training-time callback: every checkpoint that training writes is already the corrected one."""

from importlib.metadata import version

from csulora_callback.callback import CSULoRACallback
from csulora_callback.coherence import CoherenceJudge
from csulora_callback.correction import Correction, correct
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.intervals import wilson_interval
from csulora_callback.metrics import SafetyDrift
from csulora_callback.penalty import Penalty
from csulora_callback.refusal import RefusalPhrases
from csulora_callback.refusal_models import RefusalClassifier, RefusalJudge
from csulora_callback.safety_metrics import AttackSuccessRate, Coherence, OverRefusalRate
from csulora_callback.subspace import SafetySubspace

__version__ = version("csulora-callback")
__all__ = [
    "AttackSuccessRate",
    "CSULoRACallback",
    "Coherence",
    "CoherenceJudge",
    "Correction",
    "OverRefusalRate",
    "Penalty",
    "RefusalClassifier",
    "RefusalJudge",
    "RefusalPhrases",
    "SafetyCorrector",
    "SafetyDrift",
    "SafetySubspace",
    "correct",
    "wilson_interval",
]
