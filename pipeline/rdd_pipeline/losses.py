"""Losses: relative difficulty in two stages, the supervised baseline, and other distillation.

Pure functions, and modules that hold settings and schedule and share one interface,
``forward(outputs, target, teacher, iteration) -> LossOutput``. Equations and decisions are in
docs/method.md, the other methods in docs/distillation.md.
"""

from rdd_pipeline._distil_features import (
    attention_loss,
    cirkd_minibatch_loss,
    ifvd_loss,
    pairwise_loss,
    psd_loss,
)
from rdd_pipeline._distil_logits import centre_logits, csd_loss, cwd_loss, dist_loss
from rdd_pipeline._distil_memory import CIRKDMemory, cirkd_memory_loss
from rdd_pipeline._loss_functions import kd_loss, supervised_loss, tfe_loss, tse_loss
from rdd_pipeline._loss_modules import (
    Diagnostics,
    KDLoss,
    LossOutput,
    NetworkOutputs,
    RDDLoss,
    SupervisedLoss,
    TeacherSignals,
)

__all__ = [
    "CIRKDMemory",
    "Diagnostics",
    "KDLoss",
    "LossOutput",
    "NetworkOutputs",
    "RDDLoss",
    "SupervisedLoss",
    "TeacherSignals",
    "attention_loss",
    "centre_logits",
    "cirkd_memory_loss",
    "cirkd_minibatch_loss",
    "csd_loss",
    "cwd_loss",
    "dist_loss",
    "ifvd_loss",
    "kd_loss",
    "pairwise_loss",
    "psd_loss",
    "supervised_loss",
    "tfe_loss",
    "tse_loss",
]
