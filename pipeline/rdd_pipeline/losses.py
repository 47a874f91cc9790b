"""Losses: relative difficulty in two stages, logit distillation, and the supervised baseline.

Pure functions, and modules that hold settings and schedule and share one interface,
``forward(outputs, target, teacher, iteration) -> LossOutput``. Equations and decisions are in
docs/method.md.
"""

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
    "Diagnostics",
    "KDLoss",
    "LossOutput",
    "NetworkOutputs",
    "RDDLoss",
    "SupervisedLoss",
    "TeacherSignals",
    "kd_loss",
    "supervised_loss",
    "tfe_loss",
    "tse_loss",
]
