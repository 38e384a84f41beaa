"""CSULoRA as a training-time callback: every checkpoint that training writes is already the corrected one."""

from importlib.metadata import version

from csulora_callback.callback import CSULoRACallback
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.judging.coherence import CoherenceJudge
from csulora_callback.judging.intervals import wilson_interval
from csulora_callback.judging.refusal import RefusalPhrases
from csulora_callback.judging.refusal_models import RefusalClassifier, RefusalJudge
from csulora_callback.judging.safety_metrics import AttackSuccessRate, Coherence, OverRefusalRate
from csulora_callback.method.correction import Correction, correct
from csulora_callback.method.drift import SafetyDrift
from csulora_callback.method.penalty import Penalty
from csulora_callback.posthoc import CorrectedFolder, correct_adapter, restore_adapter
from csulora_callback.reporting.report.write import write_report
from csulora_callback.screening import ScreenedRows, screen_data
from csulora_callback.subspace import SafetySubspace

__version__ = version("csulora-callback")
__all__ = [
    "AttackSuccessRate",
    "CSULoRACallback",
    "Coherence",
    "CoherenceJudge",
    "CorrectedFolder",
    "Correction",
    "OverRefusalRate",
    "Penalty",
    "RefusalClassifier",
    "RefusalJudge",
    "RefusalPhrases",
    "SafetyCorrector",
    "SafetyDrift",
    "SafetySubspace",
    "ScreenedRows",
    "correct",
    "correct_adapter",
    "restore_adapter",
    "screen_data",
    "wilson_interval",
    "write_report",
]
